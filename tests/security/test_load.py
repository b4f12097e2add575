"""`flashcore audit bitwise` and `audit load` tried out on the CPU: what they count, and that their controls show."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.security import bitwise, load
from flashcore.testing import problems


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bits_are_compared_as_bits() -> None:
    nan = torch.tensor([float("nan"), 0.0]).half()
    assert not bitwise.differ(bitwise.bits(nan), bitwise.bits(nan.clone()))
    assert bitwise.differ(bitwise.bits(nan), bitwise.bits(torch.tensor([float("nan"), -0.0]).half()))


def test_bitwise_by_processes(tmp_path: Path) -> None:
    path = tmp_path / "bitwise.json"
    arguments = ["--device", "cpu", "--problems", "4", "--repeats", "2", "--seconds", "60", "--longest", "16"]
    assert bitwise.main([*arguments, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert sum(each["repeats"]["repeats"] for each in record["processes"]) == 8
    assert record["processes"][0]["control"]["one_bit"] == 1
    assert record["environment"]["gpu"] is None and all(row["passed"] for row in record["rows"])


def test_a_repeat_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1_000))

    def unsteady(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return q + (next(calls) % 3 == 2)

    monkeypatch.setattr(bitwise, "attention", unsteady)
    monkeypatch.setattr(bitwise, "attention_varlen", unsteady)
    found, wrong = bitwise.repeats(bitwise.seeds_of(0, 0), 2, 6, 60.0, "cpu", 16)
    assert found["problems"] == 2 and found["differing"] > 0 and wrong


def test_rows_of_no_sequence_are_anybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel writes them: what they hold is not compared, and what others hold is."""
    drawn = ((n, bitwise.fuzz.draw(n, 16)) for n in bitwise.seeds_of(0, 0))
    packed = ((n, problems.rows_of_none(call)) for n, call in drawn if call.packed)
    number, rows = next((n, rows) for n, rows in packed if rows.any() and not rows.all())
    garbage = iter(range(100))

    def unwritten(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return q.masked_fill(rows[:, None, None], next(garbage)) + (0 if steady else next(garbage))

    monkeypatch.setattr(bitwise, "attention_varlen", unwritten)
    steady = True
    assert not bitwise.Repeated.of(number, "cpu", 16).differs()
    steady = False
    assert bitwise.Repeated.of(number, "cpu", 16).differs()


def test_threads_and_their_controls() -> None:
    work = load.Load("cpu", threads=3, lanes=2)
    said = work.run(60.0, 3 * load.BLOCK * 2)
    assert said.calls == 3 * load.BLOCK * 2 and not said.mismatches and not said.errors
    work.problems[0].want.view(-1)[0] ^= 1
    assert work.run(60.0, 3 * load.BLOCK * 4).mismatches >= load.BLOCK


def test_an_error_in_a_thread_is_reported() -> None:
    work = load.Load("cpu", threads=2, lanes=1)
    work.problems[1].inputs = work.problems[1].inputs[:2]  # type: ignore[assignment]
    assert work.run(60.0, 4 * load.BLOCK * 4).errors


def test_what_memory_gained() -> None:
    flat = [{"host": n} for n in (1, 5, 9, 8, 9, 8, 9, 8)]
    rising = [{"host": n} for n in (1, 5, 9, 10, 11, 12, 13, 14)]
    assert load.gained(flat, "host") <= 0 < load.gained(rising, "host")
    assert load.host_bytes() > 1 << 20


def test_several_processes_make_one_record(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    few = ["--device", "cpu", "--threads", "2", "--streams", "1", "--calls", "512", "--slices", "4", "--seconds", "20"]
    load.main([*few, "--processes", "2", "--json", str(path)])
    record = json.loads(path.read_text())
    assert [each["calls"] for each in record["processes"]] == [1024, 1024] and record["rows"][0]["passed"]
    bits, memory = (row["figure"] for row in record["rows"])
    assert "2,048 calls, 1,024 by the Python path" in bits and "2 processes" in memory


def test_a_process_that_ends_early_counts_as_an_error() -> None:
    fine: Any = {"calls": 9, "python_calls": 1, "mismatches": 0, "errors": [], "planted": {"calls": 9, "noticed": 3},
                 "memory_leaking": [], "memory": []}  # fmt: skip
    options = argparse.Namespace(threads=8, streams=16, slices=12, seconds=60.0, device="cpu")
    assert load.rows([fine], options)[0].passed
    assert not load.rows([fine, {**fine, "errors": ["a process ended with -9"]}], options)[0].passed
