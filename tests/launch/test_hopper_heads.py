"""How a causal problem's heads come to the Hopper kernels' blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import H100
from flashcore.launch import hopper, select
from flashcore.launch.binding import Binding, Scalar, Tma
from flashcore.launch.capability import reasons

FLAT = Config("hopper", 64, 64, 4, 1, "", 128)
TWO = Config("hopper", 128, 128, 8, 2, "specialized", 240)
THREE = Config("hopper", 192, 128, 12, 2, "specialized", 160)
FOUR = Config("hopper", 256, 128, 16, 5, "specialized", 128)


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


def scalars(binding: Binding) -> dict[str, Any]:
    return {name: a.value for name, a in binding.args.items() if isinstance(a, Scalar)}


def descriptor(binding: Binding, name: str) -> Tma:
    found = binding.args[f"{name}_desc"]
    assert isinstance(found, Tma)
    return found


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_heads_that_share_keys_share_blocks(layout: str, is_causal: bool) -> None:
    asked = dataclasses.replace(problem(3, 8, 2, 200, layout=layout), is_causal=is_causal)
    binding = bind(asked)
    assert (binding.constexprs["PACK_GQA"], binding.constexprs["GROUP"]) == (4, 1)
    grid = (2, 13, 3) if is_causal else (13, 2, 3)
    assert binding.grid == grid, "16 positions of four heads are the rows of a block"
    sb, sh, sr = asked.stride_q
    for name in "qo":
        found = descriptor(binding, name)
        assert found.shape == (3, 2, 200, 4, 64) and found.box == (1, 1, 16, 4, 64)
        assert found.strides == (sb, 4 * sh, sr, sh, 1)
    assert len(descriptor(binding, "k").box) == len(descriptor(binding, "v").box) == 4


@pytest.mark.parametrize(
    "change",
    [{"heads_kv": 8}, {"heads_q": 6}, {"window": (9, 0)}, {"seqlen_q": 2**20}, {"seqlen_q": 256},
     {"seqlen_q": 250}],
)  # fmt: skip
def test_heads_have_blocks_of_their_own(change: dict[str, Any]) -> None:
    assert bind(dataclasses.replace(problem(3, 8, 2, 200), **change)).constexprs["PACK_GQA"] == 1


def test_blocks_that_stay_have_one_head_and_serve_where_that_is_enough() -> None:
    stays = dataclasses.replace(FLAT, schedule="persistent")
    assert bind(problem(3, 8, 2, 200), stays).constexprs["PACK_GQA"] == 1
    assert {"", "persistent"} <= {c.schedule for c in select.candidates(problem(3, 8, 2, 256), H100)}
    assert {c.schedule for c in select.candidates(problem(3, 8, 2, 200), H100) if c.kernel == "hopper"} == {""}


def test_heads_in_one_block_are_looked_up_as_one_head_of_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []
    monkeypatch.setattr(select.lookup, "nearest", lambda problem, rows: asked.append(problem))
    for found in (problem(3, 8, 2, 200), problem(3, 8, 2, 256), problem(3, 8, 8, 200)):
        select.select(found, H100)
    sizes = [(p.batch * p.heads_q, p.seqlen_q, p.seqlen_k) for p in asked]
    assert sizes == [(6, 800, 200), (24, 256, 256), (24, 200, 200)]


@pytest.mark.parametrize(
    ("asked", "grid"),
    [
        (problem(8, 8, 8, 128), (8, 2, 8)),  # a block for every SM
        (problem(8, 8, 8, 512), (64, 8, 1)),
        (problem(32, 8, 8, 1024), (128, 16, 2)),  # 32 MiB of K and V
        (problem(64, 16, 16, 512), (64, 8, 16)),  # 8 MiB
        (problem(128, 16, 16, 128), (32, 2, 64)),  # 1 MiB
        (problem(1, 16, 16, 16_384), (8, 256, 2)),
        (problem(8, 32, 8, 512, 128), (128, 8, 2)),
        (problem(127, 16, 16, 512), (127, 8, 16)),
    ],
)
def test_causal_heads_start_together_while_the_l2_has_their_keys(asked: Problem, grid: tuple[int, int, int]) -> None:
    assert bind(asked).grid == grid
    assert grid[0] * grid[2] == asked.batch * asked.heads_q and grid[0] % asked.group == 0


def test_without_a_diagonal_blocks_are_as_long_as_each_other() -> None:
    assert bind(dataclasses.replace(problem(8, 8, 8, 512), is_causal=False)).grid == (8, 8, 8)


def test_heads_that_reciprocals_would_confuse_are_refused() -> None:
    asked = problem(65_535, 257, 257, 16)
    assert "reciprocal" in " ".join(reasons("hopper", asked, H100))
    assert not reasons("hopper", dataclasses.replace(asked, batch=65_000), H100)
    assert not reasons("hopper", dataclasses.replace(asked, is_causal=False), H100)


# -- items of warpgroups -----------------------------------------------------------------------------------------


def dealt(values: dict[str, Any], is_causal: bool) -> Iterator[tuple[int, int, int]]:
    """(block, row tile, pair of head and batch) as the kernel deals its items."""
    for block, turn in product(range(values["blocks"]), range(-(-values["items"] // values["blocks"]))):
        place = (block + turn * values["shift"]) % values["blocks"]
        if not values["shift"] and turn % 2:
            place = values["blocks"] - 1 - block
        item = turn * values["blocks"] + place
        if item < values["items"]:
            cohort, place = divmod(item, values["cohort"])
            level, pair = divmod(place, values["together"])
            row_tile = values["row_tiles"] - 1 - level if is_causal else level
            yield block, row_tile, cohort * values["together"] + pair


@pytest.mark.parametrize(
    ("batch", "heads", "heads_kv", "seqlen", "together", "shift"),
    [(32, 8, 8, 512, 4, 4), (32, 8, 8, 1024, 1, 1), (8, 16, 16, 2048, 4, 4), (8, 32, 8, 2048, 4, 4),
     (4, 16, 16, 4096, 2, 4), (8, 12, 12, 4096, 3, 0), (2, 16, 16, 8192, 32, 0), (1, 16, 16, 16_384, 16, 0),
     (512, 16, 16, 16_384, 1, 0)],
)  # fmt: skip
def test_how_causal_items_are_dealt(
    batch: int, heads: int, heads_kv: int, seqlen: int, together: int, shift: int
) -> None:
    """Few heads together where K and V then stay in the L2; all of them where only that makes shares even."""
    values = scalars(bind(problem(batch, heads, heads_kv, seqlen, 128), THREE))
    assert (values["together"], values["shift"]) == (together, shift)
    assert values["cohort"] == together * values["row_tiles"]


@pytest.mark.parametrize(
    ("batch", "heads", "heads_kv", "seqlen", "together", "shift"),
    [(32, 8, 8, 512, 4, 4), (16, 16, 16, 1024, 2, 1), (512, 16, 16, 512, 4, 4), (32, 8, 2, 512, 4, 4),
     (32, 8, 8, 576, 1, 0), (32, 8, 8, 1100, 1, 0)],
)  # fmt: skip
def test_items_without_a_mask_are_dealt_evenly_where_the_last_row_tile_has_fewer_rows(
    batch: int, heads: int, heads_kv: int, seqlen: int, together: int, shift: int
) -> None:
    """At 576 and 1,100 each of three warpgroups has rows: all items are alike."""
    asked = dataclasses.replace(problem(batch, heads, heads_kv, seqlen, 128), is_causal=False)
    values = scalars(bind(asked, THREE))
    assert (values["together"], values["shift"]) == (together, shift)
    for config in (TWO, FOUR):
        narrow = dataclasses.replace(problem(batch, heads, heads_kv, seqlen), is_causal=False)
        values = scalars(bind(narrow, config))
        assert (values["together"], values["shift"]) == (1, 0), "which compute rows that are not there as well"


@pytest.mark.parametrize(
    ("batch", "heads", "seqlen", "together"),
    [(1, 32, 16_384, 1), (2, 32, 8192, 2), (32, 8, 1024, 8), (1, 16, 16_384, 16), (1, 8, 16_384, 8),
     (1, 32, 16_000, 32)],
)  # fmt: skip
def test_items_of_four_warpgroups_are_dealt_to_and_fro(batch: int, heads: int, seqlen: int, together: int) -> None:
    """They have no registers left for more; few heads together where shares stay even."""
    values = scalars(bind(problem(batch, heads, heads, seqlen), FOUR))
    assert (values["together"], values["shift"]) == (together, 0)


@pytest.mark.parametrize(
    ("batch", "heads", "seqlen", "config", "is_causal"),
    [(1, 16, 16_384, THREE, True), (2, 16, 8192, THREE, True), (3, 7, 2500, THREE, True), (8, 16, 2048, THREE, True),
     (1, 32, 16_384, FOUR, True), (1, 8, 16_384, FOUR, True), (8, 8, 4096, FOUR, True), (32, 8, 512, THREE, False),
     (16, 16, 1024, THREE, False), (32, 8, 640, THREE, False), (512, 16, 512, THREE, False)],
)  # fmt: skip
def test_every_item_is_dealt_once_and_shares_are_even(
    batch: int, heads: int, seqlen: int, config: Config, is_causal: bool
) -> None:
    asked = problem(batch, heads, heads, seqlen, 128 if config is THREE else 64)
    values = scalars(bind(dataclasses.replace(asked, is_causal=is_causal), config))
    found = list(dealt(values, is_causal))
    assert len(set(found)) == len(found) == values["items"]
    assert {(row_tile, pair) for _, row_tile, pair in found} == set(
        product(range(-(-seqlen // config.block_m)), range(batch * heads))
    )
    shares = [0] * values["blocks"]  # tiles of keys; without a mask, where all see as many, warpgroups that have rows
    for block, row_tile, _ in found:
        end = min((row_tile + 1) * config.block_m, seqlen)
        shares[block] += -(-end // 128) if is_causal else -(-(end - row_tile * config.block_m) // 64)
    assert max(shares) < 1.07 * sum(shares) / len(shares)


@given(st.integers(1, 70_000), st.sampled_from([1, 3, 4]), st.integers(192, 40_000))
def test_items_are_few_enough_for_reciprocals(heads_kv: int, group: int, seqlen: int) -> None:
    asked = problem(1, heads_kv * group, heads_kv, seqlen, 128)
    if select._counts(asked, 128):
        values = scalars(bind(asked, THREE))
        assert values["cohort"] * (values["items"] + 2 * values["blocks"]) < 2**32
        assert heads_kv * group % values["together"] == 0 and values["together"] % group == 0
