"""The record of what kernels cost: of checks that never were, and of one real compilation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import resources, results
from flashcore.core.target import A100
from flashcore.launch import compile_check, select


def test_the_record_and_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = list(select.shipped(A100))
    (problem, config) = shipped[0]
    real = compile_check.check(problem, config, A100)
    assert real.ok, real.error

    def compile_shipped(archs: Any, jobs: Any) -> Iterator[compile_check.Check]:
        assert (list(archs), jobs) == ([80], 3)
        yield real
        yield compile_check.Check(config.kernel, config, problem, 80, "9", 999, 8, 7, "does not fit")

    monkeypatch.setattr(compile_check, "compile_shipped", compile_shipped)
    path = tmp_path / "r.json"
    assert resources.main(["--arch", "80", "--jobs", "3", "--json", str(path)]) == 1
    record = results.read(path)
    assert record["kind"] == "resources"
    assert record["targets"] == {"80": {"gpu": A100.name, "shared": A100.smem_per_block}}
    (group,) = resources.summary(record["cases"])
    assert (group["variants"], group["compiled"], group["spilling"]) == (2, 1, 1 + (real.spills > 0))
    assert group["registers"] == 999 and group["shared"] == real.shared > 7
    assert "1 of 2 compile, 1 spill; at most 999 registers" in capsys.readouterr().out
    found = results.newest_without_gpu(tmp_path, "resources")
    assert found and found["file"] == "r.json" and results.newest_without_gpu(tmp_path, "audit-sass") is None
