"""docs/support-matrix.md: what it says is what the kernels' checks say."""

from __future__ import annotations

import pytest
import torch

from flashcore.benchmark import support_text
from flashcore.core.problem import Problem
from flashcore.launch import capability


def cells(name: str) -> list[str]:
    line = next(line for line in support_text.matrix() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_what_kernels_serve() -> None:
    assert cells("is_causal") == ["yes"] * len(support_text.COLUMNS)
    assert [cell[:3] for cell in cells("float32")] == ["yes", "yes", "yes", "no "]
    assert all(cell.startswith("no [") for cell in cells("float64"))


def test_a_change_of_the_checks_changes_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(support_text.matrix())
    real = capability._REASONS["portable"]

    def refuses_causal_windows(problem: Problem, target: object) -> list[str]:
        both = problem.is_causal and problem.window != (-1, -1)
        return [*real(problem, target), *["causal windows are too much"] * both]  # type: ignore[arg-type]

    monkeypatch.setitem(capability._REASONS, "portable", refuses_causal_windows)
    after = list(support_text.matrix())
    assert any("is_causal, window" in line and "portable, sm_80" in line for line in set(after) - set(before))
    assert any(line.endswith(". causal windows are too much") for line in after)


def test_every_case_differs_from_the_plain_one() -> None:
    plain = support_text.plain()
    for cases in support_text.CASES.values():
        for name, change in cases.items():
            assert change(plain) != plain or name == "float16"
    assert plain.dtype == torch.float16
