"""The portable kernel's machine code, compiled without a GPU: what its configurations promise holds in SASS."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import A100, H100, L4, Target
from flashcore.launch import compiled, portable
from flashcore.launch.compile_check import resources
from flashcore.launch.select import candidates, portable_smem
from flashcore.security import unwritten
from flashcore.security.sass import disassemble, parse

TARGETS = pytest.mark.parametrize("target", [H100, A100, L4], ids=lambda t: f"sm_{t.arch}")


def problem(
    seqlen: int = 197, head_dim: int = 64, *, is_causal: bool = True, dtype: torch.dtype = torch.float16
) -> Problem:
    strides = (8 * seqlen * head_dim, seqlen * head_dim, head_dim)
    return Problem(
        dtype, 8, 8, 8, seqlen, seqlen, head_dim, head_dim, strides, strides, strides, strides, is_causal=is_causal,
        return_lse=True,
    )  # fmt: skip


def configs(asked: Problem, target: Target) -> list[Config]:
    return [c for c in candidates(asked, target) if c.kernel == "portable"]


@cache
def code(asked: Problem, config: Config, arch: int) -> compiled.Compiled:
    return compiled.compile_for(portable.bind(asked, config, 0.125), arch)


def sass(of: compiled.Compiled, folder: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(of.cubin)
    return subprocess.run([tool, "-sass", file], check=True, capture_output=True, text=True).stdout


@TARGETS
@pytest.mark.parametrize("head_dim", [64, 256])
def test_no_spills_and_no_more_shared_memory_than_counted(target: Target, head_dim: int) -> None:
    asked = problem(head_dim=head_dim)
    for config in configs(asked, target):
        compiled_ = code(asked, config, target.arch)
        registers, spills = resources(compiled_.cubin)
        assert registers > 0 and spills == 0, config
        counted = portable_smem(asked, config, target)
        assert compiled_.shared <= counted <= target.smem_per_block, config


@TARGETS
@pytest.mark.parametrize("head_dim", [64, 40])  # rows that start at multiples of 128 bytes, and of 16 only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instructions(target: Target, head_dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    asked = problem(256, head_dim, is_causal=False, dtype=dtype)
    config = next(c for c in configs(asked, target) if (c.block_m, c.block_n, c.num_stages) == (64, 64, 2))
    text = sass(code(asked, config, target.arch), tmp_path)
    products = re.findall(r"\b(H?G?MMA\.\S+)", text)
    kind = "HGMMA.64x" if target.arch == 90 else "HMMA.16816"
    assert products and all(p.startswith(kind) and ".F32" in p for p in products), "fp32 accumulation on tensor cores"
    assert ("BF16" in products[0]) == (dtype == torch.bfloat16)
    copies = re.findall(r"LDGSTS\.\S+", text)
    assert copies and all(".128" in c for c in copies), "K and V arrive by asynchronous copies of 16 bytes a thread"
    loads, stores = re.findall(r"\bLDG\.\S+", text), re.findall(r"\bSTG\.\S+", text)
    assert loads and all(".128" in load for load in loads)
    assert sum(".128" in s for s in stores) >= len(stores) - 4, "the output leaves in 16 bytes a thread, lse beside it"
    assert not re.search(r"\b(STL|LDL)\b", text)
    scores = config.block_m * config.block_n // (32 * config.num_warps)
    fused = len(re.findall(r"\bFFMA\b", text))
    assert scores <= fused, "scale and maximum are one FFMA a score"
    assert len(re.findall(r"MUFU\.EX2", text)) <= scores + 4, "one exponential a score, one a row"


@TARGETS
def test_lengths_and_addresses_are_no_part_of_the_code(target: Target) -> None:
    asked = problem(256)
    config = configs(asked, target)[0]
    base = compiled.identity(portable.bind(asked, config, 0.125))
    for change in (
        {"seqlen_q": 512, "seqlen_k": 1024},
        {"batch": 3},
        {"heads_q": 16, "heads_kv": 16},
        {"stride_q": (8, 16, 24), "stride_o": (2**40, 2**40, 64)},
    ):
        other = dataclasses.replace(asked, **change)  # type: ignore[arg-type]
        assert compiled.identity(portable.bind(other, config, 0.5)) == base, change


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen_q": 257}, {"seqlen_k": 257}, {"head_dim": 56}, {"heads_kv": 4}, {"is_causal": False},
        {"aligned": False}, {"return_lse": False}, {"dtype": torch.bfloat16}, {"stride_k": (1, 8, 16)},
        {"stride_k": (0, 0, 2**26)}, {"batch": 65_536},
    ],
)  # fmt: skip
def test_what_the_code_depends_on(change: dict[str, object]) -> None:
    asked = problem(256)
    config = configs(asked, H100)[0]
    other = dataclasses.replace(asked, **change)  # type: ignore[arg-type]
    identities = {compiled.identity(portable.bind(p, config, 0.125)) for p in (asked, other)}
    assert len(identities) == 2


def test_a_negative_scale_is_code_of_its_own_and_its_size_is_not() -> None:
    def identity(scale: float) -> object:
        return compiled.identity(portable.bind(problem(), configs(problem(), H100)[0], scale))

    assert identity(-0.125) != identity(0.125)
    assert identity(0.0) == identity(1e-9) == identity(1e4)


def test_grid() -> None:
    config = configs(problem(), H100)[0]
    assert config.block_m == 64

    def grid(**change: object) -> tuple[int, int, int]:
        asked = dataclasses.replace(problem(197, is_causal=False), **change)  # type: ignore[arg-type]
        return portable.bind(asked, config, 1.0).grid

    assert grid() == (4, 8, 8)
    assert grid(is_causal=True) == (8, 4, 8)
    assert grid(batch=65_535) == (4, 8, 65_535)
    assert grid(batch=70_000) == (280_000, 8, 1)
    assert grid(batch=70_000, is_causal=True) == (560_000, 4, 1)
    assert 0 in grid(batch=0) and 0 in grid(seqlen_q=0)


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (96, (64, 32)),
        (104, (128, 0)), (192, (128, 64)), (256, (256, 0)),
    ],
)  # fmt: skip
def test_columns(dim: int, parts: tuple[int, int]) -> None:
    assert portable.columns(dim, True) == parts
    assert portable.columns(dim, False) == (max(16, 1 << (dim - 1).bit_length()), 0)


def test_columns_as_counted_by_the_choice() -> None:
    from flashcore.launch.select import padded

    for dim, aligned_rows in product(range(8, 257, 8), (False, True)):
        assert sum(portable.columns(dim, aligned_rows)) == padded(dim, aligned_rows) >= dim


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "more"),
    [
        (64, 8, {"window": (5, 5)}), (64, 16, {}), (32, 8, {"softcap": 5.0}), (128, 16, {"window": (5, 0)}),
        (64, 24, {"seqused_k": True}), (16, 64, {}),
    ],
)  # fmt: skip
def test_no_register_is_read_that_nothing_wrote(head_dim: int, head_dim_v: int, more: dict[str, Any]) -> None:
    """Rows that are not aligned, k and v of different widths: of most of these ptxas 12.8 lost the address of v."""
    rows = (8 * 290 * head_dim_v, 290 * head_dim_v, head_dim_v)
    narrow = {"head_dim_v": head_dim_v, "stride_v": rows, "stride_o": rows}
    asked = dataclasses.replace(problem(290, head_dim), aligned=False, **narrow, **more)
    for config in configs(asked, H100):
        made = code(asked, config, 90)
        assert not unwritten.reads(parse(disassemble(made.cubin))), config
        assert made.shared <= portable_smem(asked, config, H100)
