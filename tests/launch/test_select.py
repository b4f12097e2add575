"""The choice of kernel and tile: pure, on the allow-list, and the same for the same question."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Mask, Problem
from flashcore.core.target import A100, H100, H200, L4, Target
from flashcore.launch import select as room
from flashcore.launch.select import candidates, portable_smem, select, shipped
from flashcore.tuning import lookup
from flashcore.tuning.lookup import row

T4 = Target("Tesla T4", (7, 5), 40, 65_536, 65_536, 4 * 2**20)
TARGETS = (H100, H200, A100, L4)


def problem(
    batch: int = 8, seqlen: int = 128, head_dim: int = 64, *, dtype: torch.dtype = torch.float16, **change: Any
) -> Problem:
    strides = (8 * seqlen * head_dim, seqlen * head_dim, head_dim)
    plain = Problem(
        dtype, batch, 8, 8, seqlen, seqlen, head_dim, head_dim, strides, strides, strides, strides
    )  # fmt: skip
    return dataclasses.replace(plain, **change)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[lookup.Row]]:
    """A tuning table for every architecture, empty until the test fills it."""
    table: list[lookup.Row] = []
    monkeypatch.setattr(lookup, "table", lambda arch: tuple(table))
    room._rows.cache_clear()
    yield table
    room._rows.cache_clear()


SHAPES = [
    problem(batch, seqlen, head_dim, is_causal=causal)
    for batch, seqlen, head_dim, causal in itertools.product(
        (1, 8, 70_000), (1, 17, 128, 197, 512, 16_384), (8, 40, 64, 80, 96, 104, 128, 160, 256), (False, True)
    )
]


@pytest.mark.parametrize("target", TARGETS)
def test_every_answer_is_on_the_allow_list_and_fits(target: Target) -> None:
    for asked in SHAPES:
        config = select(asked, target)
        assert config in candidates(asked, target)
        assert config == select(dataclasses.replace(asked), target)
        if config.kernel == "portable":
            assert portable_smem(asked, config, target) <= target.smem_per_block


@pytest.mark.parametrize("target", [A100, L4])
def test_a_rule_serves_where_nothing_was_measured(target: Target, rows: list[lookup.Row]) -> None:
    def tile(*args: Any, **kwargs: Any) -> tuple[int, int]:
        config = select(problem(*args, **kwargs), target)
        return config.block_m, config.block_n

    assert tile(32, 512) == (128, 64)  # plenty of rows: K and V pass L2 half as often
    assert tile(16, 128) == (64, 64)
    assert tile(1, 128)[0] < 64  # 16 blocks of 64 rows would leave most SMs idle
    assert tile(64, 8)[0] == 16  # more rows than there are would be computed for nothing
    assert tile(32, 512, 256)[1] == 32


def test_blocks_stay_for_several_items_only_where_keys_are_few(rows: list[lookup.Row]) -> None:
    for asked in (problem(16, 512), problem(16, 960)):
        assert select(asked, H200).schedule == "persistent"
    for asked in (problem(8, 128), problem(4, 1024), problem(8, 1100), problem(4, 2048, is_causal=True)):
        assert select(asked, H200).schedule == ""


def test_four_warpgroups_share_many_keys_where_all_of_them_have_rows_to_the_end() -> None:
    def four(*sizes: int, **change: Any) -> bool:
        return select(problem(*sizes, **change), H200).block_m == 256

    for sizes in (
        (1, 16_384), (8, 2048), (16, 2048, 48), (8, 4096, 40), (33, 4096, 56), (8, 2048, 32), (16, 1024), (16, 1500),
        (16, 512, 40), (16, 768, 48), (32, 1000, 24), (8, 2000, 40), (4, 1024, 40), (2, 2048), (32, 512), (64, 768),
        (32, 768, 32), (11, 1536, 32),
    ):  # fmt: skip
        assert four(*sizes)
        assert not four(*sizes, softcap=30.0)
    for sizes in (
        (32, 896), (16, 512), (24, 512), (32, 640), (32, 512, 32), (4, 1024), (16, 384, 40), (8, 512, 40),
        (32, 577, 40), (16, 1100), (8, 2048, 16), (8, 2048, 72), (5, 2048), (1, 2048),
    ):  # fmt: skip
        assert not four(*sizes)
    assert four(16, 512, 64, head_dim_v=40)
    for sizes in (
        (1, 16_384), (2, 8192, 32), (4, 4096), (4, 4096, 48), (4, 4096, 40), (16, 1024, 40), (8, 2000, 24),
    ):  # fmt: skip
        assert four(*sizes, is_causal=True)
    for sizes in ((8, 2048), (4, 4096, 32), (8, 2048, 48), (32, 512, 40), (1, 2048, 40), (1, 16_384, 72)):
        assert not four(*sizes, is_causal=True)
    assert not four(1, 16_384, is_causal=True, seqlen_k=8192), "rows that see no key"
    few_rows = dataclasses.replace(problem(17, 2048), seqlen_q=200)
    assert select(few_rows, H200).block_m == 64
    assert select(problem(8, 2048), H200, block_m=64).block_m == 64
    assert select(problem(8, 2048), A100).kernel == "portable"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "seqlen", "tile"),
    [
        (torch.float16, 32, 128, (128, 168, "")), (torch.float16, 32, 512, (64, 96, "")),
        (torch.float16, 64, 128, (64, 128, "")), (torch.float16, 64, 256, (64, 128, "persistent")),
        (torch.float16, 64, 512, (128, 168, "")), (torch.float16, 64, 576, (64, 128, "")),
        (torch.bfloat16, 64, 1024, (128, 168, "")), (torch.bool, 64, 128, (128, 128, "")),
        (torch.bool, 64, 512, (64, 96, "")), (torch.float16, 128, 512, (64, 168, "")),
    ],
)  # fmt: skip
def test_masks_get_the_tile_that_was_fastest(
    dtype: torch.dtype, head_dim: int, seqlen: int, tile: tuple[int, int, str]
) -> None:
    asked = problem(32, seqlen, head_dim, mask=Mask(dtype, (0, seqlen * seqlen, seqlen, 1)))
    chosen = select(asked, H100)
    assert (chosen.block_n, chosen.maxnreg, chosen.schedule) == tile
    lse = select(dataclasses.replace(asked, return_lse=True), H100)
    assert (lse.block_n, lse.schedule) == (64, "")


def test_a_bias_of_each_sequence_and_few_blocks_get_tiles_of_their_own() -> None:
    each = problem(32, 512, 32, mask=Mask(torch.float16, (8 * 512 * 512, 512 * 512, 512, 1)))
    few = problem(8, 512, mask=Mask(torch.float16, (0, 512 * 512, 512, 1)))
    assert [select(p, H100).block_n for p in (each, few)] == [128, 64]


def test_blocks_of_unlike_lengths_stay_for_more_than_two_items_and_have_64_packed_rows(rows: list[lookup.Row]) -> None:
    few, enough = problem(8, 512, heads_q=12), problem(32, 256, heads_q=12)
    assert [select(p, H100).schedule for p in (few, enough)] == ["persistent"] * 2
    lengths = [dataclasses.replace(p, seqused_k=True) for p in (few, enough)]
    assert [select(p, H100).schedule for p in lengths] == ["", "persistent"]
    assert select(lengths[1], H100).maxnreg == 128
    wide = problem(32, 512, 96)
    assert select(dataclasses.replace(wide, seqused_k=True), H100).block_m == 128
    row = (0, 96, 8 * 96)
    packed = dataclasses.replace(wide, packed=(9_000, 9_000), stride_q=row, stride_k=row, stride_v=row, stride_o=row)
    assert select(packed, H100).block_m == 64


def test_rows_that_end_in_half_a_sector_get_tiles_of_128_rows(rows: list[lookup.Row]) -> None:
    def rows_of(*args: int, **change: Any) -> int:
        return select(problem(*args, **change), H200).block_m

    bias, bools = (Mask(dtype, (0, 512 * 512, 512, 1)) for dtype in (torch.float16, torch.bool))
    lengths = {"seqused_k": True}
    for head_dim, half in ((24, True), (32, False), (40, True), (48, False), (56, True), (104, True), (112, False)):
        for asked in ({}, {"is_causal": True}, {"mask": bias}, lengths):
            assert rows_of(32, 448, head_dim, **asked) == (128 if half else 64), (head_dim, asked)
    assert rows_of(1, 512, 40) == 64, "too few blocks"
    assert rows_of(32, 448, 64, head_dim_v=40) == 128
    rows.append(row(problem(8, 512, 40), Config("hopper", 128, 128, 8, 1, "", 128), 13.3, H200.name, "0123abc"))
    room._rows.cache_clear()
    assert [select(problem(batch, 512, 40), H200).block_n for batch in (8, 6)] == [128, 128]
    assert rows_of(2, 512, 40) == 64, "as many blocks of 64 rows as SMs, whatever the row of more heads says"
    window, causal = {"window": (64, 64)}, lengths | {"is_causal": True}
    for head_dim, asked, tile in (
        (40, window, 64), (72, window, 128), (104, window, 64), (80, window, 64), (40, causal, 64), (72, causal, 128),
        (96, causal, 64), (96, lengths, 128), (40, {"mask": bools}, 64), (104, {"mask": bools}, 128),
    ):  # fmt: skip
        assert rows_of(32, 512, head_dim, **asked) == tile, (head_dim, asked)


def test_more_rows_than_64_won_nowhere_where_blocks_of_64_are_no_more_than_sms() -> None:
    few = [row for row in lookup.table(90) if -(-row.seqlen_q // 64) * row.heads <= H200.sms]
    assert few and not [row for row in few if row.block_m > 64]


def test_a_measured_row_decides(rows: list[lookup.Row]) -> None:
    asked = problem()
    winner = Config("portable", 64, 128, 4, 3)
    assert select(asked, H100) != winner
    rows.append(row(asked, winner, 3.5, H100.name, "0123abc"))
    room._rows.cache_clear()
    assert select(asked, H100) == winner
    assert select(asked, H200) == winner  # tables belong to an architecture
    assert select(problem(dtype=torch.bfloat16, seqlen=192), H100) == winner
    assert select(problem(is_causal=True), H100) != winner


def test_a_measured_row_yields_to_a_manual_tile(rows: list[lookup.Row]) -> None:
    rows += [
        row(problem(), Config("portable", 64, 128, 4, 3), 3.5, H100.name, "0123abc"),
        row(problem(16), Config("portable", 64, 64, 4, 3), 4.0, H100.name, "0123abc"),
    ]
    assert select(problem(), H100, block_n=64) == Config("portable", 64, 64, 4, 3)  # the nearest row with that tile
    assert select(problem(), H100, block_m=128).block_m == 128


def test_a_row_off_the_allow_list_warns_and_is_not_used(rows: list[lookup.Row]) -> None:
    before = select(problem(), A100)
    room._rows.cache_clear()
    for hostile in (
        Config("portable", 4096, 4096, 32, 9),
        Config("portable", 64, 64, 4, 2, "split", 16),
        Config("os.system", 64, 64, 4, 2),
    ):
        rows[:] = [row(problem(), hostile, 0.001, H100.name, "0123abc")]
        room._rows.cache_clear()
        with pytest.warns(RuntimeWarning, match="1 rows name a configuration that is not on the allow-list"):
            assert select(problem(), A100) == before


def test_the_shipped_table_is_all_on_the_allow_list(recwarn: pytest.WarningsRecorder) -> None:
    room._rows.cache_clear()
    assert sum(map(len, room._rows(H100).values())) == len(lookup.table(90)) > 0
    assert not recwarn.list


@pytest.mark.parametrize("target", TARGETS)
def test_a_manual_tile_is_taken(target: Target) -> None:
    for m, n in ((64, 64), (64, 32), (128, 64)):
        config = select(problem(), target, block_m=m, block_n=n)
        assert (config.block_m, config.block_n) == (m, n)
    assert select(problem(), target, block_m=128).block_m == 128
    assert select(problem(), target, block_n=32).block_n == 32


@pytest.mark.parametrize("tile", [(48, 64), (64, 48), (0, 64), (-64, 64), (512, 512), (64, 10**30)])
def test_an_impossible_tile_says_which_exist(tile: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"64x64.*got {tile[0]} x {tile[1]}"):
        select(problem(), H100, block_m=tile[0], block_n=tile[1])


def test_a_tile_of_another_head_dimension_is_impossible() -> None:
    select(problem(head_dim=64), H100, block_m=128, block_n=128)
    with pytest.raises(ValueError, match="for this problem on NVIDIA H100"):
        select(problem(head_dim=256), H100, block_m=128, block_n=128)


def test_an_explicit_backend_serves_or_raises() -> None:
    assert select(problem(), H100, backend="portable").kernel == "portable"
    assert select(problem(), H100, backend="reference") == Config("reference", 0, 0, 0, 0)
    with pytest.raises(UnsupportedError) as refusal:
        select(problem(dtype=torch.float32), H100, backend="hopper")
    assert set(refusal.value.reasons) == {"hopper"}
    assert "float32" in str(refusal.value)
    with pytest.raises(ValueError, match="'portable'.*'reference'.*got 'fa9'"):
        select(problem(), H100, backend="fa9")


def test_what_no_kernel_serves_carries_all_reasons() -> None:
    with pytest.raises(UnsupportedError) as refusal:
        select(problem(head_dim=260, head_dim_v=8), T4)
    assert set(refusal.value.reasons) == set(room.KERNELS)
    assert len(refusal.value.reasons["portable"]) == 2
    with pytest.raises(UnsupportedError):
        candidates(problem(head_dim=260), H100)


def test_a_gpu_with_little_shared_memory() -> None:
    tiny = dataclasses.replace(L4, smem_per_block=48 * 1024)
    most = {c.block_m * c.block_n * c.num_stages for c in candidates(problem(head_dim=128), L4)}
    assert {c.block_m * c.block_n * c.num_stages for c in candidates(problem(head_dim=128), tiny)} < most
    with pytest.raises(UnsupportedError, match="shared memory"):
        select(problem(head_dim=256), dataclasses.replace(L4, smem_per_block=1024))


@pytest.mark.parametrize("target", TARGETS)
def test_what_ships_covers_every_candidate_and_every_answer(target: Target) -> None:
    variants = list(shipped(target))
    assert len(variants) == len(set(variants))
    compiled = {config for _, config in variants}
    for asked in SHAPES:
        assert set(candidates(asked, target)) <= compiled
    assert {p.dtype for p, _ in variants} == {torch.float16, torch.bfloat16}
    assert {p.is_causal for p, _ in variants} == {p.return_lse for p, _ in variants} == {False, True}
