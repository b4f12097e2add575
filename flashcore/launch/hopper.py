"""The Hopper kernel bound to a problem."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl

from flashcore.core.config import Config
from flashcore.core.problem import Problem, Strides
from flashcore.core.target import Target
from flashcore.kernels.hopper.attention import attention_forward
from flashcore.launch.binding import Binding, Pointer, Scalar, Tma, qk_scale

_REGISTERS = 65_536  # of an SM
_RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself in every block
_BARRIERS = 64  # bytes, rounded up
_TYPES = {torch.float16: ("fp16", gl.float16), torch.bfloat16: ("bf16", gl.bfloat16)}


def bind(problem: Problem, config: Config, scale: float, target: Target) -> Binding:
    """What to compile and pass to compute `problem` with `config`; `scale` multiplies q.k before the softmax.

    A grid with a 0 in it means that there is nothing to compute and nothing must be launched.
    """
    p = problem
    block_d, block_dv = block_of(p.head_dim), block_of(p.head_dim_v)
    row_tiles = -(-p.seqlen_q // config.block_m)
    pairs = p.heads_q * p.batch
    items = row_tiles * pairs
    persistent = config.schedule == "persistent"

    def descriptor(name: str, heads: int, rows: int, columns: int, strides: Strides, box: tuple[int, int]) -> Tma:
        shape = (p.batch, heads, rows, columns)
        kind, dtype = _TYPES[p.dtype]
        tile = [1, 1, *box]
        layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
        return Tma(name, kind, shape, (*_steps(shape, strides), 1), tuple(tile), layout)

    args: dict[str, Any] = {
        "q_desc": descriptor("q", p.heads_q, p.seqlen_q, p.head_dim, p.stride_q, (config.block_m, block_d)),
        "k_desc": descriptor("k", p.heads_kv, p.seqlen_k, p.head_dim, p.stride_k, (config.block_n, block_d)),
        "v_desc": descriptor("v", p.heads_kv, p.seqlen_k, p.head_dim_v, p.stride_v, (config.block_n, block_dv)),
        "o_desc": descriptor("o", p.heads_q, p.seqlen_q, p.head_dim_v, p.stride_o, (config.block_m, block_dv)),
    }
    if p.return_lse:
        args["lse"] = Pointer("lse", "*fp32", True)
    args |= {
        "qk_scale": Scalar("fp32", qk_scale(scale)),
        "seqlen_q": Scalar("i32", p.seqlen_q),
        "seqlen_k": Scalar("i32", p.seqlen_k),
    }
    for name, size in (("row_tiles", row_tiles), ("heads", p.heads_q), ("pairs", pairs)):
        args[name] = Scalar("i32", size)
        args[f"per_{name}"] = Scalar("i64", -(-(2**32) // max(size, 1)))
    args["items"] = Scalar("i32", items if persistent else 1)

    constexprs: dict[str, Any] = {} if p.return_lse else {"lse": None}
    constexprs |= {
        "GROUP": p.group, "CAUSAL": p.is_causal, "EVEN_N": p.seqlen_k % config.block_n == 0,
        "SINGLE": p.seqlen_k <= config.block_n, "EMPTY_ROWS": p.is_causal and p.seqlen_q > p.seqlen_k,
        "NEGATE": scale < 0, "PERSISTENT": persistent, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_D": block_d, "BLOCK_DV": block_dv, "WARPS": config.num_warps,
        "LATE": items > 2 * target.sms,
    }  # fmt: skip
    if persistent:
        grid = (min(items, target.sms * blocks_per_sm(p, config, target)), 1, 1)
    elif p.is_causal:
        grid = (p.heads_q, row_tiles, p.batch)
    else:
        grid = (row_tiles, p.heads_q, p.batch)
    # enable_fp_fusion: one FFMA for scale and maximum per score; its default is off from Triton 3.10 on.
    options = {
        "num_warps": config.num_warps, "maxnreg": config.maxnreg, "enable_fp_fusion": True, "launch_pdl": True
    }  # fmt: skip
    return Binding(attention_forward, True, grid, args, constexprs, options)


def block_of(dim: int) -> int:
    """Columns of a tile that holds `dim` elements of a row: tiles are powers of two, wgmma takes 16 at a time."""
    return max(16, 1 << (dim - 1).bit_length())


def smem(problem: Problem, config: Config) -> int:
    """Bytes of shared memory of one block."""
    d, dv = block_of(problem.head_dim), block_of(problem.head_dim_v)
    rows = config.block_m * (d if config.schedule != "persistent" and d == dv else d + dv)
    return 2 * (rows + config.block_n * (d + dv)) + _BARRIERS


def blocks_per_sm(problem: Problem, config: Config, target: Target) -> int:
    """Blocks that are on an SM at once, by registers and by shared memory."""
    assert config.maxnreg is not None, "the Hopper kernel's configurations state their registers"
    by_registers = _REGISTERS // (config.maxnreg * config.num_warps * 32)
    return min(by_registers, target.smem_per_sm // (smem(problem, config) + _RESERVED))


def _steps(shape: tuple[int, ...], strides: Strides) -> Strides:
    """Strides that TMA accepts: those of a dimension of size 1 are never used, whatever the caller's tensor says."""
    used = [s if size > 1 else 0 for size, s in zip(shape, strides, strict=False)]
    widest = max(*used, shape[-1], 8)
    batch, head, row = (s or -(-widest // 8) * 8 for s in used)
    return batch, head, row
