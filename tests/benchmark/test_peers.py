"""Each adapter against a stand-in for its package: that package's entry and layout, computing on the CPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.benchmark import contest
from flashcore.benchmark.peers import ALL, PEERS, Peer
from flashcore.benchmark.shapes import Shape

SHAPES = [Shape(2, 4, 24, 16), Shape(2, 4, 24, 16, is_causal=True), Shape(2, 4, 24, 16, heads_kv=2)]


def bshd_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    assert all(t.is_contiguous() for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    made = ModuleType(name)
    for attribute, value in contents.items():
        setattr(made, attribute, value)
    monkeypatch.setitem(sys.modules, name, made)


def admitted(peer: Peer, shape: Shape) -> contest.Admission:
    return contest.admit(peer, shape, shape.inputs("cpu"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@pytest.mark.parametrize(("name", "package"), [("fa2", "flash_attn"), ("fa3", "flash_attn_interface"),
                                               ("fa4", "flash_attn.cute")])  # fmt: skip
def test_flash_attn(name: str, package: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Any:
        out = bshd_attention(q, k, v, causal)
        return (out, None) if name == "fa4" else out

    module(monkeypatch, "flash_attn")
    module(monkeypatch, package, flash_attn_func=flash_attn_func)
    assert admitted(PEERS[name], shape).status == "ok"


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "flash_attn")
    found = admitted(PEERS["fa2"], SHAPES[0])
    assert found.status == "missing" and "pip install flash-attn" in found.reason


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_flashinfer(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str) -> None:
            assert layout == "NHD" and workspace.dtype == torch.uint8

        def plan(self, q_starts: Tensor, k_starts: Tensor, heads: int, kv_heads: int, head_dim: int, *, causal: bool,
                 q_data_type: torch.dtype) -> None:  # fmt: skip
            assert q_starts.tolist() == k_starts.tolist() == [0, 24, 48]
            assert (heads, kv_heads, head_dim) == (shape.heads, shape.kv_heads, shape.head_dim)
            self.causal = causal

        def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.unflatten(0, (2, 24)) for t in (q, k, v))
            return bshd_attention(q, k, v, self.causal).flatten(0, 1)

    module(monkeypatch, "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=Wrapper)
    assert admitted(PEERS["flashinfer"], shape).status == "ok"


@pytest.mark.parametrize(("shape", "status"), list(zip(SHAPES, ["ok", "ok", "refused"], strict=True)))
def test_xformers(shape: Shape, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        return bshd_attention(q, k, v, isinstance(attn_bias, LowerTriangularMask))

    contents = {"memory_efficient_attention": memory_efficient_attention, "LowerTriangularMask": LowerTriangularMask}
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", **contents)
    assert admitted(PEERS["xformers"], shape).status == status


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "flashcore"])
def test_those_that_run_on_a_cpu(name: str, shape: Shape) -> None:
    assert admitted(ALL[name], shape).status == "ok"


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "flashinfer", "xformers"])
def test_what_is_not_installed_is_named_with_its_install_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "flashinfer", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, package, None)
    found = admitted(PEERS[name], Shape(1, 2, 40, 16))
    assert found.status == "missing" and "pip install" in found.reason


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # what other libraries warn of
@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("shape", [Shape(2, 8, 128, 64), Shape(2, 8, 256, 64, is_causal=True)], ids=lambda s: s.label)
def test_on_a_gpu(name: str, shape: Shape) -> None:
    found = contest.admit(ALL[name], shape, shape.inputs())
    if found.status in ("missing", "refused"):
        pytest.skip(found.reason)
    assert found.status == "ok", found.reason
