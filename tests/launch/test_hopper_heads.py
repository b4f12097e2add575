"""How a causal problem's heads come to the Hopper kernels' blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import H100
from flashcore.launch import hopper
from flashcore.launch.binding import Binding, Tma

FLAT = Config("hopper", 64, 64, 4, 1, "", 128)


def problem(batch: int, heads: int, heads_kv: int, seqlen: int, head_dim: int = 64, layout: str = "bhsd") -> Problem:
    def strides(heads: int) -> tuple[int, int, int]:
        whole = heads * seqlen * head_dim
        return (whole, head_dim, heads * head_dim) if layout == "bshd" else (whole, seqlen * head_dim, head_dim)

    q, k = strides(heads), strides(heads_kv)
    return Problem(
        torch.float16, batch, heads, heads_kv, seqlen, seqlen, head_dim, head_dim, q, k, k, q, is_causal=True
    )  # fmt: skip


def bind(asked: Problem, config: Config = FLAT) -> Binding:
    return hopper.bind(asked, config, 0.125, H100)


def descriptor(binding: Binding, name: str) -> Tma:
    found = binding.args[f"{name}_desc"]
    assert isinstance(found, Tma)
    return found


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_heads_that_share_keys_share_blocks(layout: str) -> None:
    asked = problem(3, 8, 2, 200, layout=layout)
    binding = bind(asked)
    assert (binding.constexprs["PACK"], binding.constexprs["GROUP"]) == (4, 1)
    assert binding.grid == (2, 13, 3), "16 positions of four heads are the rows of a block"
    sb, sh, sr = asked.stride_q
    for name in "qo":
        found = descriptor(binding, name)
        assert found.shape == (3, 2, 200, 4, 64) and found.box == (1, 1, 16, 4, 64)
        assert found.strides == (sb, 4 * sh, sr, sh, 1)
    assert len(descriptor(binding, "k").box) == len(descriptor(binding, "v").box) == 4


@pytest.mark.parametrize(
    "change", [{"is_causal": False}, {"heads_kv": 8}, {"heads_q": 6}, {"window": (9, 0)}, {"seqlen_q": 2**20}]
)
def test_heads_have_blocks_of_their_own(change: dict[str, Any]) -> None:
    assert bind(dataclasses.replace(problem(3, 8, 2, 200), **change)).constexprs["PACK"] == 1


def test_blocks_that_stay_have_one_head() -> None:
    assert bind(problem(3, 8, 2, 200), dataclasses.replace(FLAT, schedule="persistent")).constexprs["PACK"] == 1


@pytest.mark.parametrize(
    ("asked", "grid"),
    [
        (problem(1, 32, 32, 16_384), (4, 256, 8)),  # 4 MiB of K and V a head
        (problem(2, 32, 32, 8192), (8, 128, 8)),
        (problem(1, 32, 8, 16_384, 128), (2, 1024, 4)),
        (problem(8, 32, 32, 2048), (32, 32, 8)),
        (problem(1, 3, 3, 2**19), (3, 8192, 1)),  # an odd number of heads
    ],
)
def test_heads_at_work_at_once_fit_into_the_l2(asked: Problem, grid: tuple[int, int, int]) -> None:
    binding = bind(asked)
    assert binding.grid == grid
    shape, strides = descriptor(binding, "k").shape, descriptor(binding, "k").strides
    assert shape[0] * shape[1] == asked.batch * asked.heads_kv
    assert shape[0] == 1 or strides[0] == shape[1] * strides[1], "as many heads further on"


def test_heads_are_one_group_where_strides_say_so() -> None:
    apart = problem(2, 32, 32, 8192, layout="bshd")
    assert bind(apart).grid == (32, 128, 2)
    assert bind(dataclasses.replace(apart, batch=1)).grid == (8, 128, 4)
    assert bind(dataclasses.replace(problem(2, 32, 32, 8192), is_causal=False)).grid == (128, 32, 2)
