"""Which problems each kernel serves, as the reasons why it can't serve the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from flashcore.core.problem import Mask, Problem
from flashcore.core.target import Target

MAX_HEAD_DIM = 256
MAX_GRID_YZ = 65_535  # CUDA's limit for the second and third dimension of a grid
MAX_LENGTH = 2**31 - 2**16  # positions are counted in 32 bits, and a tile may reach past the end


def reasons(kernel: str, problem: Problem, target: Target) -> tuple[str, ...]:
    """Why `kernel` can't serve `problem` on `target`: every reason, none when it can.

    Raises:
        ValueError: there is no kernel of this name.
    """
    if kernel not in _REASONS:
        raise ValueError(f"kernel: expected one of {', '.join(map(repr, _REASONS))}, got {kernel!r}")
    return tuple(_REASONS[kernel](problem, target))


def _elements(p: Problem, max_head_dim: int, *dtypes: torch.dtype) -> list[str]:
    why: list[str] = []
    if p.dtype not in dtypes:
        served, asked = (", ".join(str(d).removeprefix("torch.") for d in some) for some in (dtypes, (p.dtype,)))
        why.append(f"it computes {served}, not {asked}")
    for name, dim in (("q and k", p.head_dim), ("v", p.head_dim_v)):
        if dim % 8 or not 8 <= dim <= max_head_dim:
            why.append(f"the head dimension of {name} is {dim}, not a multiple of 8 from 8 to {max_head_dim}")
    return why


def _options(p: Problem) -> list[str]:
    why: list[str] = []
    if p.mask is not None and p.mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        name = str(p.mask.dtype).removeprefix("torch.")
        why.append(f"it reads masks of bool, float16, bfloat16 and float32, not {name}")
    if p.window != (-1, -1) and max(p.seqlen_q, p.seqlen_k) > MAX_LENGTH // 2:
        why.append(f"it computes at most {MAX_LENGTH // 2:,} rows and keys a sequence with a window")
    return why


def _portable(p: Problem, target: Target) -> list[str]:
    why: list[str] = []
    if target.arch < 80:
        major, minor = target.capability
        why.append(f"it needs a GPU of compute capability 8.0 or newer, {target.name} has {major}.{minor}")
    why += _elements(p, MAX_HEAD_DIM, torch.float16, torch.bfloat16, torch.float32)
    if p.heads_q > MAX_GRID_YZ:
        why.append(f"it computes at most {MAX_GRID_YZ:,} heads, not {p.heads_q:,}")
    longest = MAX_GRID_YZ * 16 if p.is_causal else MAX_LENGTH  # causal tiles are counted in a grid's second dimension
    if p.seqlen_q > longest:
        why.append(f"it computes at most {longest:,} query rows a sequence here, not {p.seqlen_q:,}")
    if p.seqlen_k > MAX_LENGTH:
        why.append(f"it reads at most {MAX_LENGTH:,} keys a sequence, not {p.seqlen_k:,}")
    why += _options(p)
    return why


# Gluon is experimental: the releases that the tests compile the kernel under.
TRITON_RELEASES = ("3.6.", "3.7.", "3.8.", "3.9.")
MAX_HEAD_DIM_HOPPER = 128


def _hopper(p: Problem, target: Target) -> list[str]:
    why: list[str] = []
    if target.arch != 90:
        major, minor = target.capability
        why.append(f"it needs a GPU of compute capability 9.0, {target.name} has {major}.{minor}")
    if not _triton().startswith(TRITON_RELEASES):
        tested = ", ".join(f"{release}x" for release in TRITON_RELEASES)
        found = f"not {_triton()}" if _triton() else "and none is installed"
        why.append(f"it was tested with Triton {tested}, {found}")
    why += _elements(p, MAX_HEAD_DIM_HOPPER, torch.float16, torch.bfloat16)
    if not p.aligned:
        why.append("TMA wants every tensor to start at a multiple of 16 bytes")
    sequences = 1 if p.packed else p.batch
    for name, heads, rows, strides in (
        ("q", p.heads_q, p.seqlen_q, p.stride_q), ("k", p.heads_kv, p.seqlen_k, p.stride_k),
        ("v", p.heads_kv, p.seqlen_k, p.stride_v), ("out", p.heads_q, p.seqlen_q, p.stride_o),
    ):  # fmt: skip
        sizes = (sequences, heads, rows + p.ragged)  # a ragged row's stride is used even where a sequence has one
        used = [s for size, s in zip(sizes, strides, strict=True) if size > 1]
        if any(s <= 0 or s % 8 or s >= 2**39 for s in used):
            why.append(f"TMA wants positive strides that are multiples of 16 bytes, {name} has {strides}")
    why += _options(p)
    if p.mask is not None:
        why += _tma_mask(p, p.mask)
    if p.seqlen_k == 0:
        why.append("there are no keys to read")
    if max(p.seqlen_q, p.seqlen_k) > MAX_LENGTH:
        why.append(f"it computes at most {MAX_LENGTH:,} rows and keys a sequence")
    if max(p.heads_q, p.batch, -(-p.seqlen_q // 64)) > MAX_GRID_YZ:
        why.append(f"it computes at most {MAX_GRID_YZ:,} heads, sequences and tiles of 64 query rows")
    if p.is_causal and p.batch * p.heads_q**2 >= 2**32:
        why.append("it finds a causal block's head by a 32-bit reciprocal, which is exact below 2**32 / heads of them")
    return why


def _tma_mask(p: Problem, mask: Mask) -> list[str]:
    why: list[str] = []
    if not mask.aligned:
        why.append("TMA wants the mask to start at a multiple of 16 bytes")
    *outer, key = mask.strides
    if key != 1 and p.seqlen_k > 1:
        why.append(f"TMA wants a mask that is contiguous along the keys, attn_mask has strides {mask.strides}")
    sizes = (p.batch, p.heads_q, p.seqlen_q)
    used = [s for size, s in zip(sizes, outer, strict=True) if size > 1 and s]
    if any(s < 0 or s * mask.dtype.itemsize % 16 or s >= 2**38 for s in used):
        why.append(f"TMA wants positive strides that are multiples of 16 bytes, attn_mask has {mask.strides}")
    return why


@cache
def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def needs_more_registers() -> bool:
    """Whether Triton's assembler, ptxas, needs some more for the same kernel than with the releases before 3.8."""
    return _triton().startswith(("3.8.", "3.9."))


_REASONS: dict[str, Callable[[Problem, Target], list[str]]] = {
    "hopper": _hopper, "portable": _portable
}  # fmt: skip
