"""The fuzzer's machinery, with the interpreter in a GPU's place: numbers, workers that die or hang, making smaller."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.security import fuzz
from flashcore.testing import problems


def test_a_number_is_one_problem() -> None:
    for seed in (fuzz.number(3, 7), fuzz.number(2**31, 400), fuzz.number(0, 0)):
        first, again = fuzz.draw(seed), fuzz.draw(seed)
        assert str(first) == str(again)
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(
            first.tensors.values(), again.tensors.values(), strict=True
        ))  # fmt: skip
    assert str(fuzz.draw(fuzz.number(3, 7))) != str(fuzz.draw(fuzz.number(3, 8)))


def test_no_two_shards_share_a_kind() -> None:
    seen = [kind for seed in range(3) for shard in range(15) for kind in list(fuzz.kinds(seed, shard))[:20]]
    assert len(set(seen)) == len(seen) and max(seen) < 1 << fuzz.KIND_BITS


@pytest.mark.parametrize("planted", [False, True])
def test_the_control_draws_from_many_kinds(planted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too, where others stay with one: a kind may have nothing in it of what is planted."""
    asked: list[int] = []
    monkeypatch.setattr(fuzz, "_plant", lambda name: None)
    monkeypatch.setattr(fuzz, "work", lambda *args, per_kind, **rest: asked.append(per_kind) or 0)
    command = ["--work", str(tmp_path / "journal"), "--device", "cuda"]
    assert fuzz.main([*command, *(["--plant", fuzz.CONTROL] if planted else [])]) == 0
    (per_kind,) = asked
    assert (fuzz.CONTROL_PROBLEMS // per_kind >= 10) == planted


def test_a_slice_of_problems_and_the_control(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    status = fuzz.main([
        "--device", "cpu", "--problems", "12", "--shards", "1", "--seconds", "100", "--longest", "20", "--seed", "0",
        "--json", str(path),
    ])  # fmt: skip
    record = json.loads(path.read_text())
    assert status == 0, record
    assert record["counts"]["problems"] == 12 and not record["failures"] and record["rows"][0]["passed"]


WORKER = """
import os, sys, time
from pathlib import Path
from flashcore.security import fuzz
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
said = fuzz._Journal(Path(arguments["--work"]))
index, detail = map(int, arguments["--from"].split(":"))
for step in range(detail, 6):
    said.at(fuzz.number(5, step), 0, "portable" if step % 2 else None)
    if step == 1: os.kill(os.getpid(), 9)
    if step == 3: time.sleep(60)
    if step == 4:
        said.note(failure=[fuzz.number(5, 4), None, "wrong"])
        said.flush()
        sys.exit(fuzz.LOST_GPU)
    said.count(problems=1)
    said.flush()
"""


def test_what_ends_a_worker_is_on_record_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(fuzz, "_worker", lambda device: [sys.executable, str(script)])
    monkeypatch.setattr(fuzz, "_environment", lambda device: {**os.environ, "PYTHONPATH": os.getcwd()})
    monkeypatch.setattr(fuzz, "PATIENCE_S", 20.0)
    shard = fuzz.Shard(0, 6)
    fuzz.Fuzz(tmp_path, 0, "cpu", 400, 20).run([shard])
    assert shard.counts["problems"] == 3 and shard.restarts == 3  # steps 0, 2 and 5
    killed, hung, lost = shard.failures
    assert killed["seed"] == fuzz.number(5, 1) and "status -9" in killed["wrong"] and killed["backend"] == "portable"
    assert hung["seed"] == fuzz.number(5, 3) and hung["wrong"] == "hung"
    assert lost == {"seed": fuzz.number(5, 4), "backend": None, "wrong": "wrong"}


def test_time_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "_worker", lambda device: [sys.executable, "-c", "import time; time.sleep(60)"])
    began = time.monotonic()
    fuzz.Fuzz(tmp_path, 0, "cpu", -19.5, 20).run([fuzz.Shard(0, 6)])
    assert time.monotonic() - began < 20


def test_a_failure_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    check = "import sys; sys.exit(int(sys.argv[sys.argv.index('--longest') + 1]) >= 16)"
    monkeypatch.setattr(fuzz, "_worker", lambda device: [sys.executable, "-c", check])
    failure: dict[str, Any] = {"seed": 77, "backend": "portable", "wrong": "wrong"}
    late = fuzz.shrink(failure, "cpu", problems.LONGEST, time.monotonic())
    assert late["longest"] == problems.LONGEST and "out of time" in late["note"]
    found = fuzz.shrink(failure, "cpu", problems.LONGEST, time.monotonic() + 60)
    assert found["longest"] == 16
    assert found["repro"] == "flashcore audit fuzz --only 77 --backend portable --longest 16"


def test_a_worker_keeps_its_memory_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fuzz.MALLOC:
        monkeypatch.delenv(name, raising=False)
    assert fuzz.MALLOC.items() <= fuzz._environment("cuda").items()
    monkeypatch.setenv(next(iter(fuzz.MALLOC)), "7")
    assert fuzz._environment("cuda")[next(iter(fuzz.MALLOC))] == "7"
