"""The sanitizer's matrix on the CPU, and how its outcomes are read, with a program in the tool's place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from flashcore.security import sanitize
from flashcore.security.sanitize import FOUND, Outcome


def test_every_call_of_the_matrix_is_one() -> None:
    torch.set_num_threads(1)
    seen = set()
    for name, options in sanitize.matrix():
        sanitize.call({**options, "backend": "reference"}, "cpu")
        assert name not in seen
        seen.add(name)
    kernels = {options["backend"] for _, options in sanitize.matrix()}
    assert kernels == {"portable", "hopper"} and len(seen) > 25


def test_the_parts_are_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for part in range(sanitize.PARTS):
        assert sanitize.work(part, "cpu") == 0  # every kernel refuses CPU tensors, and says so
    assert capsys.readouterr().out.count("refused") == len(list(sanitize.matrix()))


TOOL = """#!{python}
import os, sys
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= COMPUTE-SANITIZER")
if "--control" in sys.argv:
    print("========= Invalid __global__ write of size 4 bytes")
    print("========= ERROR SUMMARY: 1 error")
    sys.exit({status})
print("part", sys.argv[-1] + ": 7 calls")
print("========= ERROR SUMMARY: 0 errors")
"""


@pytest.mark.parametrize(("status", "passed"), [(FOUND, True), (0, False)])
def test_a_tool_that_misses_its_control_fails(status: int, passed: bool, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(TOOL.format(python=sys.executable, status=status))
    os.chmod(tool, 0o755)
    outcomes = [sanitize.run(str(tool), "memcheck", part, 30.0) for part in (-1, 0, 1)]
    assert [o.status for o in outcomes] == [status, 0, 0]
    assert [o.calls for o in outcomes] == [0, 7, 7]
    assert outcomes[0].summary.startswith("Invalid __global__ write")
    assert sanitize._row("memcheck", outcomes).passed is passed


def test_a_finding_or_no_end_is_no_pass() -> None:
    planted = Outcome("racecheck", -1, FOUND, 0, "", 1.0)
    for status in (FOUND, 124, 1):
        assert not sanitize._row("racecheck", [planted, Outcome("racecheck", 0, status, 7, "", 1.0)]).passed


def test_without_the_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert sanitize.main([]) == 2 and "not installed" in capsys.readouterr().err
