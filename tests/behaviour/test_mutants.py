"""Every fault planted in the portable kernel is caught by the gates, on problems that the shipped kernel passes.

Only a verdict counts: a mutant that the interpreter can't run is an error of the mutant and fails its test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from flashcore.testing import Guarded, Shape, check, lay_out, make
from flashcore.testing.mutants import MUTANTS


@dataclass(frozen=True)
class Trial:
    """One problem; together they touch every line of the kernel that a fault is planted in."""

    shape: Shape
    family: str = "independent"
    dtype: torch.dtype = torch.float16
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    out: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)


TRIALS = [
    Trial(Shape(1, 2, 70, 32, heads_kv=1, seqlen_k=75), options={"is_causal": True}),
    Trial(Shape(1, 2, 33, 24, heads_kv=1, seqlen_k=70), layouts=("sliced",) * 3, options={"scale": -0.4}),
    Trial(Shape(2, 4, 20, 48, heads_kv=2, seqlen_k=40), layouts=("contiguous", "bshd", "contiguous"), out="bshd"),
    Trial(Shape(1, 2, 70, 32), "large_logits", options={"is_causal": True}),
    Trial(Shape(1, 1, 20, 32, seqlen_k=100), "rising"),
    Trial(Shape(1, 1, 40, 32, seqlen_k=20), "nan_v", options={"is_causal": True}),  # rows 0 .. 19 read nothing
    Trial(Shape(1, 1, 64, 24, seqlen_k=64), layouts=("sliced",) * 3),
    Trial(Shape(1, 1, 40, 32, seqlen_k=70), dtype=torch.bfloat16),
    Trial(Shape(1, 1, 5, 32, seqlen_k=40), options={"scale": 0.0}),
    Trial(Shape(1, 1, 5, 32, seqlen_k=0)),
    Trial(Shape(1, 1, 64, 32, seqlen_k=512)),  # many tiles, in which what is lost in each adds up
]


def verdict(interpreter: Any, trial: Trial) -> str:
    """What the gates say of the kernel in the interpreter's process, "" when it passes."""
    inputs = make(trial.family, trial.shape, trial.dtype, seed=1)
    q, k, v = (lay_out(t, layout) for t, layout in zip(inputs, trial.layouts, strict=True))
    guarded = Guarded(trial.shape.q, trial.dtype, layout=trial.out)
    tile = {"block_m": 64, "block_n": 32, "backend": "portable"}
    out, lse = interpreter.attention(q, k, v, out=guarded.out, return_lse=True, **tile, **trial.options)
    result = check(out, q, k, v, lse=lse, **trial.options)
    return result.failures + ("" if guarded.intact() else "; written beside the output")


@pytest.fixture
def planted(request: pytest.FixtureRequest, interpreter: Any) -> Iterator[Any]:
    interpreter.ask("plant", request.param)
    yield interpreter
    interpreter.ask("plant", None)


def test_the_shipped_kernel_passes(interpreter: Any) -> None:
    assert [verdict(interpreter, trial) for trial in TRIALS] == [""] * len(TRIALS)


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_a_planted_fault_is_caught(planted: Any) -> None:
    assert any(verdict(planted, trial) for trial in TRIALS)


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 30
    assert len({(m.file, m.old, m.new) for m in MUTANTS.values()}) == len(MUTANTS)


def test_a_mutant_whose_source_moved_on_is_noticed() -> None:
    for mutant in MUTANTS.values():
        assert mutant.new in mutant.source()
    with pytest.raises(ValueError, match="0 times in"):
        replace(mutant, old="no such line").source()
