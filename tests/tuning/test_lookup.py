"""Tuning tables: read strictly, looked up by a stated rule, written so that they can be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.tuning import lookup
from flashcore.tuning.lookup import Row, nearest, parse, read, row, write

PROBLEM = Problem(
    torch.float16, 8, 8, 8, 128, 128, 64, 64, (65536, 8192, 64), (65536, 8192, 64), (65536, 8192, 64), (65536, 8192, 64)
)
CONFIG = Config("portable", 64, 32, 4, 2)
ROW = row(PROBLEM, CONFIG, 3.73, "NVIDIA H100 80GB HBM3", "0123abc")


def at(**change: Any) -> Row:
    return dataclasses.replace(ROW, **change)


def asked(**change: Any) -> Problem:
    return dataclasses.replace(PROBLEM, **change)


def text(**change: Any) -> str:
    entry = {**dataclasses.asdict(ROW), **change}
    return json.dumps({"format": 1, "arch": 90, "rows": [entry]})


# -- reading and writing ----------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    guess = at(us=None, machine="", commit="", provenance="a guess")
    rows = (ROW, at(seqlen_q=256, maxnreg=128, schedule="flat", kernel="hopper"), guess)
    path = tmp_path / "sm90.json"
    write(path, 90, rows)
    assert read(path, 90) == rows
    assert rows[0].config == CONFIG
    assert rows[1].config == Config("hopper", 64, 32, 4, 2, "flat", 128)
    assert len(path.read_text().splitlines()) == 6 + 3  # a row is a line: a diff shows which problem changed
    assert [p.name for p in tmp_path.iterdir()] == ["sm90.json"]


def test_a_table_that_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "sm90.json"
    write(path, 90, [ROW])
    for bad in (at(us=float("nan")), at(us=-1.0), at(commit=""), at(dtype="float64")):
        with pytest.raises(ValueError):
            write(path, 90, [bad])
    assert read(path, 90) == (ROW,)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "sm90.json").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "sm90.json", 90, [ROW])
    assert [p.name for p in tmp_path.iterdir()] == ["sm90.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 0}, {"block_m": -64}, {"block_m": 2**40}, {"block_m": 64.0}, {"block_m": True}, {"block_m": "64"},
        {"block_m": None}, {"block_m": [64]}, {"us": 3}, {"us": "3"}, {"us": 0.0}, {"us": 1e300}, {"is_causal": 1},
        {"dtype": "float8"}, {"dtype": 16}, {"kernel": None}, {"maxnreg": 0}, {"maxnreg": 1.5}, {"provenance": "x"},
        {"us": None}, {"machine": ""}, {"commit": ""}, {"extra": 1}, {"us": None, "machine": "", "commit": ""},
    ],
)  # fmt: skip
def test_bad_rows(change: dict[str, Any]) -> None:
    assert parse(text(), 90) == (ROW,)
    with pytest.raises(ValueError, match="row 0"):
        parse(text(**change), 90)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Row)])
def test_no_field_may_be_missing(field: str) -> None:
    document = json.loads(text())
    del document["rows"][0][field]
    with pytest.raises(ValueError, match="row 0"):
        parse(json.dumps(document), 90)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "3", '"rows"', "{", '{"format": 1}', '{"format": 1, "arch": 90, "rows": {}}',
        '{"format": 2, "arch": 90, "rows": []}', '{"format": 1, "arch": 80, "rows": []}',
        '{"format": 1, "arch": 90, "rows": [3]}', '{"format": 1, "arch": 90, "rows": [], "run": "rm"}',
        text(us=float("inf")), text(us=float("nan")), text(block_m=10**5000 // 10**4999) + "}", "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe\x00",
    ],
)  # fmt: skip
def test_a_bad_file_warns_and_counts_as_empty(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "sm90.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match="sm90.json is not used"):
        assert read(path, 90) == ()


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sm90.json"
    path.write_text(text() + " " * lookup.MAX_BYTES)
    with pytest.warns(RuntimeWarning, match="more than"):
        assert read(path, 90) == ()


def test_a_missing_file_warns(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert read(tmp_path / "sm90.json", 90) == ()


def test_shipped_tables_are_valid_and_nobody_else_has_one() -> None:
    assert lookup.table(86) == ()
    for path in lookup.TABLES.glob("*.json"):
        arch = int(path.stem.removeprefix("sm"))
        assert parse(path.read_text(), arch)


# -- the nearest row --------------------------------------------------------------------------------------------


def test_the_same_problem_finds_its_row() -> None:
    rows = [at(seqlen_q=256), at(heads=128), ROW, at(seqlen_k=256)]
    assert nearest(PROBLEM, rows) is ROW


def test_the_nearest_by_ratio_wins() -> None:
    short, long = at(seqlen_q=128, seqlen_k=128), at(seqlen_q=512, seqlen_k=512)
    assert nearest(asked(seqlen_q=197, seqlen_k=197), [short, long]) is short
    assert nearest(asked(seqlen_q=320, seqlen_k=320), [short, long]) is long
    few, many = at(heads=64), at(heads=256)
    assert nearest(asked(batch=15), [few, many]) is few
    assert nearest(asked(batch=17), [few, many]) is many


def test_a_tie_goes_to_the_same_dtype_then_to_the_first() -> None:
    half, brain = at(), at(dtype="bfloat16")
    assert nearest(asked(dtype=torch.bfloat16), [half, brain]) is brain
    assert nearest(PROBLEM, [brain, half]) is half
    assert nearest(PROBLEM, [brain]) is brain
    first, second = at(block_n=64), at(block_n=128)
    assert nearest(PROBLEM, [first, second]) is first


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": True}, {"seqlen_q": 513}, {"seqlen_q": 31}, {"seqlen_k": 513}, {"batch": 33}, {"batch": 1},
        {"head_dim": 104}, {"head_dim": 40}, {"seqlen_q": 0}, {"seqlen_k": 0},
    ],
)  # fmt: skip
def test_out_of_reach(change: dict[str, Any]) -> None:
    assert nearest(asked(**change), [ROW]) is None


def test_within_reach() -> None:
    for change in ({"seqlen_q": 512}, {"seqlen_k": 32}, {"batch": 32}, {"head_dim": 96}, {"head_dim": 48}):
        assert nearest(asked(**change), [ROW]) is ROW


def test_more_heads_than_many_are_as_good_as_many() -> None:
    many = at(heads=lookup.MANY_HEADS)
    assert nearest(asked(batch=100_000), [ROW, many]) is many
    assert nearest(asked(batch=100_000), [at(heads=lookup.MANY_HEADS * 100)]) is not None


def test_a_length_that_fills_tiles_speaks_for_its_like() -> None:
    even, odd = at(seqlen_q=256, seqlen_k=256), at(seqlen_q=150, seqlen_k=150, block_n=64)
    assert nearest(asked(seqlen_q=197, seqlen_k=197), (even, odd)) == odd
    assert nearest(asked(seqlen_q=192, seqlen_k=192), (even, odd)) == even
    assert nearest(asked(seqlen_q=197, seqlen_k=197), (even,)) == even


def test_half_a_tile_of_128_is_like_other_halves() -> None:
    whole, half = at(seqlen_q=256, seqlen_k=256), at(seqlen_q=320, seqlen_k=320, block_n=64)
    for seqlen, speaks in ((384, whole), (448, half), (192, half)):
        assert nearest(asked(seqlen_q=seqlen, seqlen_k=seqlen), (whole, half)) == speaks


def test_rows_that_cost_tma_as_many_requests_speak_for_their_like() -> None:
    whole, half, across = at(head_dim=64), at(head_dim=56, block_n=128), at(head_dim=80, block_m=128)
    for head_dim, speaks in ((48, whole), (64, whole), (40, half), (72, half), (80, across), (96, across)):
        assert nearest(asked(head_dim=head_dim), (whole, half, across)) == speaks
    assert nearest(asked(head_dim=56), (whole,)) == whole
    near, far = at(head_dim=32, seqlen_q=512, seqlen_k=512), at(head_dim=40, seqlen_q=1024, seqlen_k=1024, block_m=128)
    assert nearest(asked(head_dim=40, seqlen_q=512, seqlen_k=512), (near, far)) == far
