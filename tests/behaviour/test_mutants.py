"""Every fault planted in the portable kernel is caught by the gates, on problems that the shipped kernel passes.

Only a verdict counts: a mutant that the interpreter can't run is an error of the mutant and fails its test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.testing import Guarded, Shape, check, lay_out, make, poison_padding
from flashcore.testing.mutants import MUTANTS
from flashcore.testing.problems import Call


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


def call(shape: Shape, family: str = "independent", layout: str = "sliced", **given: Any) -> Call:
    """A call with options; k and v hold NaN where seqused_k says that nothing is."""
    inputs = make(family, shape, seed=3)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in given.items() if name not in tensors}
    if "seqused_k" in tensors:
        inputs = poison_padding(inputs, tensors["seqused_k"])
    laid_out = {name: lay_out(t, layout) for name, t in zip("qkv", inputs, strict=True)}
    if "cu_seqlens_q" in tensors:
        laid_out = {name: t[0].transpose(0, 1) for name, t in laid_out.items()}
    else:
        options["layout"] = "bhsd"
    plain = {"is_causal": False, "return_lse": True, "out": "padded", "block_m": 64, "block_n": 32}
    return Call(laid_out | tensors, plain | options)


def bias(*shape: int, dtype: torch.dtype = torch.float16, hidden: float | None = None) -> Tensor:
    """A mask to add; a third of its rows, and a third of the others' keys, are `hidden`."""
    generator = torch.Generator().manual_seed(5)
    mask = 2.0 * torch.randn(shape, generator=generator)
    if hidden is not None:
        mask[..., ::3, :] = hidden
        mask[..., 1::3] = hidden
    return mask.to(dtype)


def hides_nan_keys() -> Call:
    nan = call(Shape(1, 1, 20, 32, seqlen_k=40), "nan_k")
    hides = torch.zeros(40).masked_fill(nan.tensors["k"][0, 0].isnan().any(-1), -torch.inf)
    return Call(nan.tensors | {"attn_mask": hides}, nan.options)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Where lengths are wrong no lse is asked for: nothing guards the memory beside it from a mutant that believes them.
PACKED = Shape(1, 2, 100, 32, heads_kv=1, seqlen_k=110)
CALLS = [
    call(Shape(1, 2, 70, 32, heads_kv=1, seqlen_k=75), window=(20, 10)),
    call(Shape(1, 1, 130, 32, seqlen_k=200), window=(5, -1)),
    call(Shape(1, 1, 70, 32, seqlen_k=75), window=(-1, 3), softcap=2.0, scale=1.0),
    call(Shape(2, 4, 70, 32, heads_kv=2, seqlen_k=40), attn_mask=(bias(2, 4, 40, 70, hidden=-9.0) > -1).mT),
    call(Shape(2, 4, 20, 32, heads_kv=2, seqlen_k=40), attn_mask=bias(1, 4, 1, 40), scale=-0.4),
    call(Shape(2, 4, 70, 32, seqlen_k=40), attn_mask=bias(2, 1, 70, 1, dtype=torch.bfloat16), softcap=3.0, scale=1.0),
    call(
        Shape(2, 2, 33, 32, seqlen_k=70), softcap=3.0, scale=1.0,
        attn_mask=bias(2, 2, 33, 70, dtype=torch.float32, hidden=torch.finfo(torch.float32).min),
    ),
    call(Shape(1, 2, 20, 32, seqlen_k=64), attn_mask=bias(2, 20, 64)),  # rows whole 16 bytes apart
    hides_nan_keys(),
    call(Shape(4, 1, 20, 32, seqlen_k=64), seqused_k=lengths(40, 3, -3, 99)),
    call(Shape(3, 2, 70, 32, heads_kv=1, seqlen_k=40), seqused_k=lengths(33, 0, 50), is_causal=True),
    call(
        PACKED, cu_seqlens_q=lengths(3, 50, 50, 90), cu_seqlens_k=lengths(0, 30, 60, 105), max_seqlen_q=64,
        max_seqlen_k=64, is_causal=True,
    ),
    call(
        PACKED, cu_seqlens_q=lengths(-4, 30, 70, 109), cu_seqlens_k=lengths(10, 60, 40, 119), max_seqlen_q=64,
        max_seqlen_k=40, window=(30, 5), return_lse=False,
    ),
    call(
        PACKED, cu_seqlens_q=lengths(-4, 30, 109), cu_seqlens_k=lengths(-2, 60, 119), max_seqlen_q=100,
        max_seqlen_k=100, return_lse=False,
    ),
    call(
        Shape(1, 2, 240, 32, heads_kv=1, seqlen_k=260), cu_seqlens_q=lengths(0, 5, 205, 206, 210, 216, 222, 230, 239),
        cu_seqlens_k=lengths(0, 9, 220, 220, 230, 233, 240, 250, 260), max_seqlen_q=200, max_seqlen_k=211,
        is_causal=True,
    ),
]  # fmt: skip


def verdict(interpreter: Any, trial: Trial | Call) -> str:
    """What the gates say of the kernel in the interpreter's process, "" when it passes."""
    if isinstance(trial, Call):
        return str(interpreter.ask("problem", trial))
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
    assert [verdict(interpreter, trial) for trial in [*TRIALS, *CALLS]] == [""] * len(TRIALS + CALLS)


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_a_planted_fault_is_caught(planted: Any) -> None:
    assert any(verdict(planted, trial) for trial in [*CALLS, *TRIALS])


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 100
    assert len({(m.file, m.old, m.new) for m in MUTANTS.values()}) == len(MUTANTS)


def test_a_mutant_whose_source_moved_on_is_noticed() -> None:
    for mutant in MUTANTS.values():
        assert mutant.new in mutant.source()
    with pytest.raises(ValueError, match="0 times in"):
        replace(mutant, old="no such line").source()
