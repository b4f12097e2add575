"""A kernel bound to a problem: what to compile, and what to pass when it runs.

Each kernel has one module in this room that turns (Problem, Config) into a Binding; compiling it
for this GPU, compiling it for another one without a GPU, and running it in Triton's interpreter all
read the same Binding, so none of them can drift from what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOG2E = 1.4426950408889634

# What a kernel may be given the address of, in the order in which the launcher keeps addresses.
TENSORS = ("q", "k", "v", "o", "lse", "mask", "seqused_k", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor passed by address: of TENSORS"""

    tensor: str  # one of TENSORS
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
