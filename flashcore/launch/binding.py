"""A kernel bound to a problem: what to compile, and what to pass when it runs.

Each kernel has one module in this room that turns (Problem, Config) into a Binding; compiling it
for this GPU, compiling it for another one without a GPU, and running it in Triton's interpreter all
read the same Binding, so none of them can drift from what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.core.problem import Problem

LOG2E = 1.4426950408889634

# What an attention kernel may be given the address of, in the order in which the launcher keeps addresses.
TENSORS = ("q", "k", "v", "o", "lse", "mask", "seqused_k", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor passed by address."""

    tensor: str  # an attention kernel's is one of TENSORS
    type: str  # Triton's type: "*fp16", "*bf16", "*fp32", "*i32", "*u8" (bool)
    aligned: bool  # the address is a multiple of 16 bytes


@dataclass(frozen=True, slots=True)
class Tma:
    """A tensor passed as a TMA descriptor over `shape`/`strides` (elements), read in boxes of `box`."""

    tensor: str
    dtype: str  # "fp16", "bf16"
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # the last one is 1
    box: tuple[int, ...]
    layout: Any  # Gluon's NVMMASharedLayout of the box
    offset: int = 0  # bytes from the tensor's address to the descriptor's: below 0 for ragged rows


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number passed at run time.

    `divisible` promises the compiler a multiple of 16; it becomes part of what is compiled, the value does not.
    """

    type: str  # "i32", "i64", "fp32"
    value: int | float
    divisible: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """Everything that compiling and launching need to know of one kernel for one problem."""

    fn: Any  # the @triton.jit or @gluon.jit function
    gluon: bool
    grid: tuple[int, int, int]
    args: dict[str, Pointer | Tma | Scalar]  # by parameter name, in the kernel's order
    constexprs: dict[str, Any]  # by parameter name
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, maxnreg ...


def qk_scale(scale: float) -> float:
    """What kernels multiply q.k by before exp2: the magnitude of `scale`, whose sign goes to the scores.

    A hidden score is -inf, and -inf * 0 would be NaN. Scores are below 2^40 in magnitude for fp16 inputs, so that a
    scale of 2^-100 weighs every key alike, exactly as 0 does.
    """
    return max(abs(scale) * LOG2E, 2.0**-100)


def score_scalars(problem: Problem, scale: float) -> dict[str, Scalar]:
    """What kernels turn q.k into logits with, by parameter name.

    qk_scale is in units of log2, as exp2's argument is. A bias is in units of e, so that with one qk_scale is, too.
    cap * tanh(x) is computed from exp2(2 log2(e) x), x being the scaled score over cap.
    """
    unit, scalars = 1.0, {}
    if problem.softcap:
        unit, scalars["cap"] = 2 / problem.softcap, Scalar("fp32", problem.softcap)
    elif problem.mask is not None and problem.mask.dtype != torch.bool:
        unit = 1 / LOG2E
    scalars["qk_scale"] = Scalar("fp32", qk_scale(scale) * unit)
    if problem.window != (-1, -1):
        # As many keys as a sequence has are all there can be to the left of a row's diagonal, as many as it has rows
        # to the right.
        left, right = problem.bounds
        scalars["left"] = Scalar("i32", problem.seqlen_k if left is None else min(left, problem.seqlen_k))
        scalars["right"] = Scalar("i32", problem.seqlen_q if right is None else min(right, problem.seqlen_q))
    return scalars


def length_pointers(problem: Problem, block_m: int) -> dict[str, Pointer | Scalar]:
    """The lengths that live on the device, and what they are held against, by parameter name."""
    if problem.packed is not None:
        total_q, total_k = problem.packed
        found: dict[str, Pointer | Scalar] = {n: Pointer(n, "*i32", False) for n in ("cu_seqlens_q", "cu_seqlens_k")}
        found |= {"total_q": Scalar("i32", total_q), "total_k": Scalar("i32", total_k)}
        return found | ({"sequences": Scalar("i32", problem.batch)} if packed_tiles(problem, block_m) else {})
    return {"seqused_k": Pointer("seqused_k", "*i32", False)} if problem.seqused_k else {}


def tail_tile(problem: Problem, block_n: int) -> int:
    """Keys of the Hopper kernel's tiles at a sequence's end or, causal, on the diagonal, where these have a copy of the
    loop's body of their own and no other tile has a mask; 0 where any may have one. As many as a whole tile's where no
    narrower one holds the last keys, and on the diagonal: two tiles of 32 keys take longer than one of 64.
    """
    p, rest = problem, problem.seqlen_k % block_n
    dim = max(p.head_dim, p.head_dim_v)
    if p.seqlen_k <= block_n or p.mask is not None or p.window != (-1, -1):
        return 0
    if p.ragged:  # where they were measured to pay
        return block_n // 2 if dim <= 64 and not (p.is_causal and p.seqused_k) else 0
    if p.is_causal:
        return min(block_n, 64)
    if rest == 0:
        return 0
    width = max(16, 1 << (rest - 1).bit_length())
    if width == block_n and (block_n > 64 or 32 < dim <= 96):
        return 0  # where two copies of the loop's body cost more registers than the one's condition
    return width


def pack_gqa(problem: Problem, block_m: int) -> int:
    """Of how many query heads a tile of the Hopper kernel holds rows, where its blocks take one: of all that share a
    key head, where these fill tiles by more than 8% better than a head alone. Less is what boxes in parts and, causal,
    a diagonal as wide for fewer positions were seen to cost.
    """
    p, rows = problem, block_m // problem.group  # of a head
    if p.group == 1 or p.options or block_m % p.group:
        return 1
    apart, together = (-(-p.seqlen_q // tile) * tile for tile in (block_m, rows))
    return p.group if apart > 1.08 * together else 1


def packed_tiles(problem: Problem, block_m: int) -> int:
    """Numbers of tiles of packed rows, where blocks look up whose rows theirs are; 0 where a block's place says so.

    Sequence i has the numbers from first row // block_m + i on, enough whatever the lengths are, which only the device
    knows. The other grid has the longest sequence's tiles for each: better while fewer than half of them are empty,
    since looking up takes a load more, and another for every 32nd part of the sequences.
    """
    if problem.packed is None:
        return 0
    numbers = problem.packed[0] // block_m + problem.batch
    return numbers if -(-problem.seqlen_q // block_m) * problem.batch > 2 * numbers else 0
