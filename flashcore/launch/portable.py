"""The portable kernel bound to a problem."""

from __future__ import annotations

from typing import Any

import torch
from triton import JITFunction

from flashcore.core.config import Config
from flashcore.core.problem import Mask, Problem
from flashcore.kernels.portable.attention import attention_forward
from flashcore.launch.binding import Binding, Pointer, Scalar, length_pointers, packed_tiles, score_scalars

_MAX_GRID_Z = 65_535
_FAR = 2**31 - 256  # elements from a tile's first row on, where the columns' part no longer fits 32 bits
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_MASK_TYPES = {torch.bool: "*u8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_OPTIONAL = (  # parameters that are None where the problem does not use them
    "lse", "mask", "stride_mb", "stride_mh", "stride_mm", "stride_mn", "seqused_k", "cu_seqlens_q", "cu_seqlens_k",
    "total_q", "total_k", "sequences", "cap", "left", "right",
)  # fmt: skip


def bind(problem: Problem, config: Config, scale: float) -> Binding:
    """What to compile and pass to compute `problem` with `config`; `scale` multiplies q.k before the softmax.

    A grid with a 0 in it means that there is nothing to compute and nothing must be launched; seqlen_k = 0 is
    computed by the kernel (zeros, and lse -inf).
    """
    p = problem
    kind = "*" + _TYPES[p.dtype]
    unit, mask_unit = stride_unit(p), 1
    strides = {"q": p.stride_q, "k": p.stride_k, "v": p.stride_v, "o": p.stride_o}
    args: dict[str, Any] = {name: Pointer(name, kind, p.aligned) for name in strides}
    if p.return_lse:
        args["lse"] = Pointer("lse", "*fp32", True)
    if p.mask is not None:
        args["mask"] = Pointer("mask", _MASK_TYPES[p.mask.dtype], p.mask.aligned)
        mask_unit = _mask_unit(p.mask)
        *outer, key = p.mask.strides
        args |= {f"stride_m{axis}": Scalar("i64", s // mask_unit) for axis, s in zip("bhm", outer, strict=True)}
        args["stride_mn"] = Scalar("i64", key)
    args |= length_pointers(p, config.block_m)
    args |= score_scalars(p, scale)
    for name, (batch, head, row) in strides.items():
        args[f"stride_{name}b"] = Scalar("i64", batch // unit)
        args[f"stride_{name}h"] = Scalar("i64", head // unit)
        args[f"stride_{name}{'n' if name in 'kv' else 'm'}"] = Scalar("i64", row // unit)
    args["heads"] = Scalar("i32", p.heads_q)
    args["seqlen_q"] = Scalar("i32", p.seqlen_q)
    args["seqlen_k"] = Scalar("i32", p.seqlen_k)

    d, dv = columns(p.head_dim, p.aligned_rows), columns(p.head_dim_v, p.aligned_rows)
    if not p.aligned_rows:
        # k and v pass through registers to one place in shared memory. Where their tiles differ in width, and so in
        # layout, ptxas 12.8 loses a copy of that place's address (security/unwritten.py): products read v elsewhere.
        d = dv = max(d, dv)
    tile = max(config.block_m, config.block_n)
    numbers = packed_tiles(p, config.block_m)
    fold = p.batch > _MAX_GRID_Z and not numbers
    constexprs: dict[str, Any] = dict.fromkeys(name for name in _OPTIONAL if name not in args)
    constexprs |= {
        "HEAD_DIM": p.head_dim, "HEAD_DIM_V": p.head_dim_v, "GROUP": p.group, "CAUSAL": p.is_causal,
        "EVEN_M": p.seqlen_q % config.block_m == 0 and not p.packed,
        "EVEN_N": p.seqlen_k % config.block_n == 0 and not p.ragged,
        "STRIDE_UNIT": unit, "WIDE": max(row for *_, row in strides.values()) * tile >= _FAR,
        "FOLD_BATCH": fold, "SPLIT": config.schedule == "split", "NEGATE_Q": scale < 0,
        "EMULATED": p.dtype == torch.bfloat16 and not isinstance(attention_forward, JITFunction),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_D": d[0], "REST_D": d[1], "BLOCK_DV": dv[0], "REST_DV": dv[1],
    }  # fmt: skip
    constexprs |= {"MASK_M": 0, "MASK_N": 0, "MASK_UNIT": 1, "MASK_WIDE": False}
    if p.mask is not None:
        *_, row, key = p.mask.strides
        constexprs |= {
            "MASK_M": int(row != 0), "MASK_N": min(key, 2), "MASK_UNIT": mask_unit,
            "MASK_WIDE": row * config.block_m + key * config.block_n >= _FAR,
        }  # fmt: skip
    tiles = -(-p.seqlen_q // config.block_m)
    fast, slow = (p.heads_q, tiles) if p.is_causal else (tiles, p.heads_q)
    grid = (numbers, p.heads_q, 1) if numbers else (fast * p.batch, slow, 1) if fold else (fast, slow, p.batch)
    # enable_fp_fusion: one FFMA for scale and maximum per score; its default is off from Triton 3.10 on.
    options: dict[str, Any] = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True
    }  # fmt: skip
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return Binding(attention_forward, False, grid, args, constexprs, options)


def _mask_unit(mask: Mask) -> int:
    """`stride_unit` of a mask, whose keys are read one by one unless they lie side by side."""
    unit = 16 // mask.dtype.itemsize
    return unit if all(s % unit == 0 for s in mask.strides[:3]) else 1


def columns(dim: int, aligned_rows: bool) -> tuple[int, int]:
    """A row of `dim` elements as one or two powers of two, of at least the 16 that an MMA takes.

    Only rows that are read by 16 bytes come in two: others pass through registers on their way to shared memory, where
    ptxas 12.8 loses the address of the second part (security/unwritten.py).
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    if not aligned_rows:
        return whole, 0
    first = whole // 2
    rest = max(16, 1 << max(dim - first - 1, 0).bit_length())
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def stride_unit(problem: Problem) -> int:
    """How many elements one unit of a stride stands for: 16 bytes of them when every stride is a multiple of it."""
    p = problem
    unit = 16 // p.dtype.itemsize
    return unit if all(s % unit == 0 for s in (*p.stride_q, *p.stride_k, *p.stride_v, *p.stride_o)) else 1
