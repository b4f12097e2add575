"""A worker made to hang, crash and fail; the rest of its work must survive."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark.isolation import Journal, Writer, supervise

WORKER = """
import os, sys, time
from pathlib import Path
from flashcore.benchmark.isolation import Journal, Writer

path, trouble = Path(sys.argv[1]), sys.argv[2]
before = Journal.read(path)
write = Writer(path)
for case in ("one", "two", "three"):
    if case in before.cases:
        continue
    done = []
    for who in ("good", "bad"):
        if before.blamed(case, who):
            continue
        write.at(case, who)
        if who == "bad" and case != "one":
            if trouble == "hang":
                time.sleep(60)
            if trouble == "crash":
                path.open("a").write('{"half a line')
                os.kill(os.getpid(), 9)
            if trouble == "raise":
                raise RuntimeError("the GPU fell off")
        done.append(who)
    write(case=case, who=done)
"""


def run(tmp_path: Path, trouble: str, **options: Any) -> tuple[bool, Journal, list[dict[str, Any]]]:
    path = tmp_path / "journal"
    heard: list[dict[str, Any]] = []
    finished = supervise(
        [sys.executable, "-c", WORKER, str(path), trouble], path, heard=heard.append, **{"patience_s": 20, **options}
    )  # fmt: skip
    return finished, Journal.read(path), heard


def test_a_good_worker_finishes(tmp_path: Path) -> None:
    finished, journal, heard = run(tmp_path, "none")
    assert finished and not journal.faults
    assert [entry["case"] for entry in heard] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("trouble", "why", "patience"),
    [("crash", "status -9", 20), ("raise", "RuntimeError: the GPU fell off", 20), ("hang", "no progress for 2 s", 2)],
)
def test_trouble_costs_only_who_made_it(tmp_path: Path, trouble: str, why: str, patience: float) -> None:
    finished, journal, _ = run(tmp_path, trouble, patience_s=patience)
    assert finished
    assert {case: entry["who"] for case, entry in journal.cases.items()} == {
        "one": ["good", "bad"], "two": ["good"], "three": ["good"],
    }  # fmt: skip
    assert set(journal.faults) == {("two", "bad"), ("three", "bad")}
    assert all(why in reason for reason in journal.faults.values())


def test_the_budget_ends_it(tmp_path: Path) -> None:
    finished, journal, _ = run(tmp_path, "hang", budget_s=3)
    assert not finished
    assert list(journal.cases) == ["one"] and not journal.faults


def test_a_worker_that_never_starts(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    path = tmp_path / "journal"
    assert not supervise([sys.executable, "-c", "import nothing_like_this"], path, patience_s=20, heard=heard.append)
    assert "ModuleNotFoundError" in heard[0]["fault"][2]


def test_a_line_cut_off_is_as_if_never_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write = Writer(path)
    write(header={"suite": "nine"})
    write.at("one", "a")
    with path.open("a") as file:
        file.write('{"case": "one", "us"')
    journal = Journal.read(path)
    assert journal.header == {"suite": "nine"} and journal.at == ("one", "a") and not journal.cases


def test_two_faults_leave_somebody_out() -> None:
    journal = Journal()
    journal.add({"fault": ["one", "a", "hung"]})
    assert journal.blamed("one", "a") == "hung" and journal.blamed("two", "a") is None
    journal.add(json.loads('{"fault": ["two", "a", "crashed"]}'))
    assert "2 faults: crashed" in str(journal.blamed("three", "a"))
    assert journal.blamed("three", "b") is None
