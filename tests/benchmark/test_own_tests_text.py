"""docs/integrations.md follows the records of transformers' own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashcore.benchmark import own_tests_text, results


def record(passed: int, gpu: str | None = None, **more: Any) -> dict[str, Any]:
    run = {"passed": passed, "failed": 1, "passed_calling": 7, "calls": {"fcore": 30}}
    excepted = {"BertModelTest::test_names": {"error": "AssertionError", "reason": "expects a name"}}
    model = {"runs": {"sdpa": {**run, "passed": 40}, "fcore": run}, "excepted": excepted, "regressions": {}}
    return {
        "kind": own_tests_text.KIND, "environment": {"recorded": "2026-11-28T10:00:00+00:00", "gpu": gpu},
        "transformers": {"version": "5.17.0", "tests_commit": "0123456789abcdef", "tests_changed": ["tests/test_a.py"]},
        "complete": True, "models": {"bert": model}, **more,
    }  # fmt: skip


def test_a_record_is_a_table_and_its_exceptions(tmp_path: Path) -> None:
    results.write(tmp_path / f"{own_tests_text.KIND}-2026-11-28.json", record(39))
    text = "\n".join(own_tests_text.own_tests(tmp_path))
    assert "CPU, 2026-11-28, transformers 5.17.0, its tests of commit `0123456789ab` (files changed: 1); " in text
    assert "| BERT | 40 | 39 | 7 | 1 | 0 |" in text
    assert "- `test_names`: expects a name." in text


def test_each_device_has_its_newest_complete_record(tmp_path: Path) -> None:
    later = {"recorded": "2026-12-01T10:00:00+00:00", "gpu": None}
    for name, entry in {
        "a": record(39), "b": record(38, environment=later), "c": record(37, environment=later, complete=False),
        "d": record(36, "NVIDIA H100"),
    }.items():  # fmt: skip
        results.write(tmp_path / f"{own_tests_text.KIND}-{name}.json", entry)
    rows = [line for line in own_tests_text.own_tests(tmp_path) if line.startswith("| BERT")]
    assert [row.split("|")[3].strip() for row in rows] == ["38", "36"]


def test_without_a_record_nothing_is_said(tmp_path: Path) -> None:
    assert list(own_tests_text.own_tests(tmp_path)) == []
