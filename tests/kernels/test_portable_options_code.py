"""The portable kernel's machine code with options, compiled without a GPU: nothing spilled, everything counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcore.core.problem import Mask, Problem
from flashcore.core.target import A100, H100, L4, Target
from flashcore.launch import compiled, portable
from flashcore.launch.compile_check import resources
from flashcore.launch.select import portable_smem, select

STRIDES = (8 * 197 * 64, 197 * 64, 64)
PLAIN = Problem(
    torch.float16, 8, 8, 8, 197, 197, 64, 64, STRIDES, STRIDES, STRIDES, STRIDES, return_lse=True
)  # fmt: skip
WHOLE = (8 * 197 * 200, 197 * 200, 200, 1)
OPTIONS: dict[str, dict[str, object]] = {
    "window": {"window": (20, 10)},
    "softcap": {"softcap": 30.0},
    "bool mask": {"mask": Mask(torch.bool, WHOLE)},
    "bias": {"mask": Mask(torch.float16, WHOLE)},
    "bias of keys": {"mask": Mask(torch.float32, (200, 0, 0, 1))},
    "seqused_k": {"seqused_k": True},
    "packed": {"packed": (1000, 1000), "stride_q": (0, 64, 512), "stride_k": (0, 64, 512), "stride_v": (0, 64, 512)},
    "all": {
        "is_causal": True, "window": (20, -1), "softcap": 30.0, "seqused_k": True, "mask": Mask(torch.float32, WHOLE)
    },
}  # fmt: skip


def code(problem: Problem, target: Target) -> compiled.Compiled:
    config = select(problem, target, backend="portable")
    made = compiled.compile_for(portable.bind(problem, config, 0.125), target.arch)
    registers, spills = resources(made.cubin)
    assert registers > 0 and spills == 0, config
    assert made.shared <= portable_smem(problem, config, target) <= target.smem_per_block, config
    return made


@pytest.mark.parametrize("target", [H100, A100], ids=lambda t: f"sm_{t.arch}")
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_chosen_for_an_option_spills_nothing(target: Target, name: str) -> None:
    code(replace(PLAIN, **OPTIONS[name]), target)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [H100, A100, L4], ids=lambda t: f"sm_{t.arch}")
def test_fp32_multiplies_in_fp32(target: Target) -> None:
    text = code(replace(PLAIN, dtype=torch.float32, is_causal=True), target).ptx
    assert "fma.rn.f32" in text and "mma" not in text


def test_a_call_without_options_passes_none() -> None:
    """What an option needs is a constant None where it is not in use: no parameter, no load, no instruction."""
    plain = portable.bind(PLAIN, select(PLAIN, H100, backend="portable"), 0.125)
    absent = {name for name, value in plain.constexprs.items() if value is None}
    for name, change in OPTIONS.items():
        problem = replace(PLAIN, **change)  # type: ignore[arg-type]
        used = set(portable.bind(problem, select(problem, H100, backend="portable"), 0.125).args)
        assert used - set(plain.args) <= absent and used > set(plain.args), name
    assert not {"mask", "cap", "left", "seqused_k", "cu_seqlens_q"} & set(plain.args)
