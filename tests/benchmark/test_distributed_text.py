"""docs/distributed.md follows the records of one sequence on several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashcore.benchmark import distributed_text, results


def case(heads: int, is_causal: bool, **found: Any) -> dict[str, Any]:
    shape = {"batch": 1, "heads": heads, "seqlen": 65536, "head_dim": 64, "is_causal": is_causal}
    return {"shape": shape, "wrong": {}, **found}


def test_a_row_a_problem(tmp_path: Path) -> None:
    timed = {
        "contestants": {"one": {"us": 19_000.0}, "ring": {"us": 10_000.0}}, "speedup_ring": {"value": 1.9},
        "hidden": 0.81,
    }  # fmt: skip
    record = {
        "kind": "context-parallel", "protocol": {"ranks": 2}, "cases": [case(8, False, **timed), case(7, True)],
        "environment": {"gpu": "NVIDIA H200", "recorded": "2026-11-28T10:00:00+00:00", "torch": "2.11.0",
                        "commit": "0123456789abcdef"},
    }  # fmt: skip
    results.write(tmp_path / "context-parallel-h200-2026-11-28.json", record)
    text = "\n".join(distributed_text.context_parallel(tmp_path))
    assert "2 x NVIDIA H200, 2026-11-28, commit `0123456789ab`, PyTorch 2.11.0, 65,536 rows" in text
    assert "| H=8 D=64 full | 19.00 | 10.00 | - | 1.90x | - | 81% |" in text
    assert "| H=7 D=64 causal | - | - | - | - | - | wrong |" in text


def test_without_a_record_nothing_is_said(tmp_path: Path) -> None:
    assert list(distributed_text.context_parallel(tmp_path)) == []
