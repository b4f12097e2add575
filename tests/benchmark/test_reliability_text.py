"""The reliability report, made of records that never happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import reliability_text, report, results
from tests.benchmark import records


def audit(kind: str, *, gpu: str | None = "NVIDIA H100 80GB HBM3", passed: bool = True, **more: Any) -> dict[str, Any]:
    row = {"claim": f"{kind} holds", "figure": "7 problems", "control": "found", "passed": passed}
    return {
        "kind": kind, "environment": records.environment(gpu=gpu), "command": f"flashcore {kind.replace('-', ' ')}",
        "complete": True, "rows": [row], **more,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results.write(tmp_path / "results" / "a.json", audit("audit-fuzz"))
    return tmp_path / "results"


def text(folder: Path) -> list[str]:
    return [" | ".join(row) for row in reliability_text.rows(folder)]


def test_a_row_names_claim_figure_control_command_and_machine(folder: Path) -> None:
    row = text(folder)[1]
    for part in ("audit-fuzz holds", "7 problems", "found", "`flashcore audit fuzz`", "H100", "a.json", "| yes"):
        assert part in row


def test_what_did_not_run_says_so(folder: Path) -> None:
    assert sum("not run yet" in row for row in text(folder)) == len(reliability_text.KINDS) - 1 + 2
    summary = {"arch": 80, "clean": 3, "variants": 3, "tainted_branches": 0, "tainted_addresses": 0, "tainted_other": 0,
               "controls": 1, "controls_caught": 1, "written": 3, "gaps_noticed": 3}  # fmt: skip
    sass = {"kind": "audit-sass", "environment": records.environment(gpu=None), "summary": [summary]}
    results.write(folder / "sass.json", sass)
    assert any("A100" in row and "compiled and audited, not run" in row for row in text(folder))
    (row,) = (row for row in text(folder) if "nothing wrote" in row)
    assert "3 of 3 variants | 3 of them" in row and row.endswith("| yes")
    results.write(folder / "a100.json", audit("audit-load", gpu="NVIDIA A100-SXM4-80GB"))
    assert not any("on A100" in row for row in text(folder))


def test_a_claim_that_failed_is_shown_and_a_small_run_is_not(folder: Path) -> None:
    results.write(folder / "b.json", audit("audit-load", passed=False))
    results.write(folder / "c.json", audit("audit-bitwise", complete=False))
    assert any("audit-load holds" in row and row.endswith("**no**") for row in text(folder))
    assert not any("audit-bitwise holds" in row for row in text(folder))


def test_random_problems_of_different_seeds_add_up(tmp_path: Path) -> None:
    def run(seed: int, problems: int, day: int, passed: bool = True) -> None:
        made = audit("audit-fuzz", passed=passed, seed=seed, counts={"problems": problems}, failures=[])
        made["environment"]["recorded"] = f"2026-12-0{day}T10:00:00+00:00"
        results.write(tmp_path / f"f{day}.json", made)

    run(0, 20_000, 1)
    assert "7 problems" in text(tmp_path)[1], "what a single run says itself"
    run(1, 30_000, 3)
    run(0, 999, 2)  # the same problems again: the newer run of them counts
    row = text(tmp_path)[1]
    assert "30,999 problems in 2 runs of different seeds: 0 failed" in row and row.endswith("| yes")
    run(2, 1, 4, passed=False)
    assert text(tmp_path)[1].endswith("**no**")
    run(3, 5, 5)
    row = text(tmp_path)[1]
    assert "31,005 problems in 4 runs" in row and row.endswith("**no**"), "a run that failed is not forgotten"


def test_tests_and_timing_are_counted(folder: Path) -> None:
    tests = {"kind": "gpu-tests", "environment": records.environment(), "passed": 5, "failed": 1, "skipped": 0,
             "unfinished": 0, "complete": True, "runs": [{"selected": 6}]}  # fmt: skip
    results.write(folder / "t.json", tests)
    timing = {"kind": "audit-timing", "environment": records.environment(), "complete": True,
              "cases": [{"gated": True, "ok": True}, {"gated": False, "ok": False}], "controls": [{"ok": True}]}
    results.write(folder / "u.json", timing)
    assert any("5 passed, 1 failed" in row and row.endswith("**no**") for row in text(folder))
    results.write(folder / "t.json", {**tests, "failed": 0, "complete": False})
    assert any("5 passed, 0 failed, 0 skipped, 1 cut off" in r and r.endswith("**no**") for r in text(folder))
    assert any("1 of 1 comparisons" in row and row.endswith("| yes") for row in text(folder))


def test_without_any_record_there_is_no_report(tmp_path: Path) -> None:
    assert not list(report.reliability_report(tmp_path))
