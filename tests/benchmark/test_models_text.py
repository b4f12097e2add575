"""docs/integrations.md follows the records of whole models and of gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashcore.benchmark import models_text, results
from flashcore.benchmark.models import MODES

ENVIRONMENT = {
    "recorded": "2026-11-28T10:00:00+00:00", "gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "transformers": "5.17.0"
}  # fmt: skip


def record(folder: Path, kind: str, cases: list[dict[str, Any]], **more: Any) -> None:
    entry = {"kind": kind, "environment": ENVIRONMENT, "complete": True, "cases": cases, **more}
    results.write(folder / f"{kind}-h100.json", entry)


def served(batch: int, sdpa: float, graph: float | None) -> dict[str, Any]:
    def over(value: float | None) -> dict[str, Any]:
        return {} if value is None else {"over_fcore": {"value": value, "low": value, "high": value}}

    peer = {MODES[0]: over(sdpa), MODES[1]: over(graph)}
    return {
        "case": f"minilm B{batch} S32", "model": "minilm", "batch": batch, "length": 32, "weights": "real",
        "contestants": {"fcore": {}, "sdpa": peer, "eager": {MODES[0]: over(2.0)}},
    }  # fmt: skip


def test_a_row_for_each_model_and_mode(tmp_path: Path) -> None:
    record(tmp_path, "models", [served(1, 0.9, 1.5), served(8, 1.6, None)])
    text = "\n".join(models_text.models(tmp_path))
    assert "NVIDIA H100 80GB HBM3, 2026-11-28, PyTorch 2.11.0, transformers 5.17.0, fp16" in text
    assert "real weights | eager mode | 2 | 1.20x (0.90 to 1.60) | 2.00x (2.00 to 2.00) |" in text
    assert "real weights | CUDA graph | 2 | 1.50x (1.50 to 1.50) | - |" in text
    assert 'Behind "sdpa" in 1 of 3, most in minilm B1 S32, eager mode, at 0.90x.' in text


def test_both_passes_on_both_clocks(tmp_path: Path) -> None:
    ours, theirs = ({"call": {"p50": p50}, "gpu_warm": {"us": us}} for p50, us in ((200.0, 50.0), (100.0, 75.0)))
    cases = [
        {"case": "encoder", "contestants": {"flashcore": ours, "sdpa": theirs}},
        {"case": "padded", "contestants": {"flashcore": ours, "sdpa": {"status": "refused"}}},
    ]
    record(tmp_path, "gradients", cases)
    text = "\n".join(models_text.gradients(tmp_path))
    assert "| encoder | 200.0 | 100.0 | 0.50x | 50.0 | 75.0 | 1.50x |" in text
    assert "| padded | 200.0 | - | - | 50.0 | - | - |" in text


def test_what_is_missing_or_cut_short_is_not_stated(tmp_path: Path) -> None:
    record(tmp_path, "models", [served(1, 1.2, 1.5)], complete=False)
    assert list(models_text.models(tmp_path)) == list(models_text.gradients(tmp_path)) == []
