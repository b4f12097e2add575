"""Hostile tuning tables and processes that start at once: a slice of `flashcore audit tables`, and its controls."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from flashcore.security import tables
from flashcore.tuning import lookup


def test_hostile_tables_crash_nothing_and_choose_nothing_else() -> None:
    found = tables.hostile(2_000, seed=1)
    assert sum(found["files"].values()) == 2_000 and set(found["files"]) == set(tables.kinds())
    assert not found["crashes"] and not found["off_the_list"] and not found["taken"]


def test_a_reader_without_care_is_caught() -> None:
    found = tables.hostile(10 * len(tables.kinds()), seed=0, read=tables.careless, patience_s=0.05)
    assert found["crashes"] and found["off_the_list"]
    assert "a pipe: _Waited" in found["crashes"]


def test_a_good_table_is_taken(tmp_path: Path) -> None:
    """Or else the files above would prove nothing."""
    row = lookup.Row(**tables.good_row())
    lookup.write(tmp_path / tables.NAME, tables.ARCH, [row])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (tables.PROBLEMS[0], row.config) in tables.choices(tmp_path)


@pytest.mark.parametrize("kind", tables.kinds())
def test_each_kind_warns_or_is_a_table(kind: str, tmp_path: Path) -> None:
    import random

    tables.KINDS[kind](random.Random(3), tmp_path / tables.NAME)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        tables.choices(tmp_path)
    if kind in tables.NEVER_TAKEN:
        assert any("tuning table" in str(w.message) for w in heard)
        assert all(len(str(w.message)) < 2 * lookup.MAX_TEXT for w in heard if "is not used:" in str(w.message))


def test_processes_that_start_at_once() -> None:
    found = tables.cold_starts(8, 2)
    assert found == {"starts": 16, "torn": 0, "lost": 0, "wrong_code": 0, "failures": {}}


def test_writing_in_place_is_caught() -> None:
    assert tables.cold_starts(8, 3, compiling=False, in_place=True)["torn"]
