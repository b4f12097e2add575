"""A plain Triton kernel with online softmax and the tiles of FlashCore's first version: what Triton gives for little.

It is written and launched as well as plain Triton allows, being the peer to beat at S=128: sizes and the mask are
compile-time constants, the scale is folded into exp2's argument, one division a row, the launch skips Triton's argument
binding, and of three pipeline depths the one that is fastest for the shape is used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcore.benchmark.peers.peer import NotServedError, Peer, Prepared
from flashcore.benchmark.shapes import Shape
from flashcore.measure.clocks import Contestant, gpu_times
from flashcore.measure.statistics import median

STAGES = (1, 2, 3)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # fusion named, because its default differs between releases


def forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, qk_scale,  # qk_scale = scale * log2(e)
    S: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head of contiguous [B, H, S, D] tensors."""
    EVEN: tl.constexpr = S % BLOCK_M == 0 and S % BLOCK_N == 0 and D == BLOCK_D
    row_0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    rows = (row_0 + tl.arange(0, BLOCK_M))[:, None]
    keys_0 = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + head * S * D + rows * D + depth[None, :]
    k_ptrs = k_ptr + head // GROUP * S * D + keys_0[None, :] * D + depth[:, None]
    v_ptrs = v_ptr + head // GROUP * S * D + keys_0[:, None] * D + depth[None, :]
    out_ptrs = out_ptr + head * S * D + rows * D + depth[None, :]
    inside_q = (rows < S) & (depth[None, :] < D)
    q = tl.load(q_ptrs) if EVEN else tl.load(q_ptrs, mask=inside_q, other=0.0)
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(row_0 + BLOCK_M, S) if CAUSAL else S
    for start in range(0, end, BLOCK_N):
        keys = start + keys_0
        if EVEN:
            k = tl.load(k_ptrs + start * D)
        else:
            k = tl.load(k_ptrs + start * D, mask=(keys[None, :] < S) & (depth[:, None] < D), other=0.0)
        scores = tl.dot(q, k)
        if CAUSAL:
            scores = tl.where(rows >= keys[None, :], scores, -float("inf"))
        if S % BLOCK_N != 0:
            scores = tl.where(keys[None, :] < S, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * qk_scale)
        p = tl.math.exp2(scores * qk_scale - new_maximum[:, None])
        rescale = tl.math.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(p, 1)
        if EVEN:
            v = tl.load(v_ptrs + start * D)
        else:
            v = tl.load(v_ptrs + start * D, mask=(keys[:, None] < S) & (depth[None, :] < D), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        maximum = new_maximum
    result = (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty)
    if EVEN:
        tl.store(out_ptrs, result)
    else:
        tl.store(out_ptrs, result, mask=inside_q)


_kernel = triton.jit(forward)


def tile(shape: Shape) -> tuple[int, int]:
    """Query rows and keys of a tile, as FlashCore's first version chose them on an H100 (H=8, D=64)."""
    if shape.seqlen <= 128:
        return (64, 32) if shape.batch <= 8 else (64, 128)
    return (64, 128) if shape.seqlen == 512 and shape.batch <= 8 else (64, 64)


def arguments(shape: Shape) -> dict[str, Any]:
    """What the kernel gets besides tensors, by name and in the kernel's order."""
    block_m, block_n = tile(shape)
    return {
        "qk_scale": shape.head_dim**-0.5 * 1.4426950408889634,
        "S": shape.seqlen,
        "D": shape.head_dim,
        "GROUP": shape.heads // shape.kv_heads,
        "CAUSAL": shape.is_causal,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(shape.head_dim)),
    }


def grid(shape: Shape) -> tuple[int, int, int]:
    """Blocks: tiles of rows, heads of all sequences, 1."""
    return triton.cdiv(shape.seqlen, tile(shape)[0]), shape.batch * shape.heads, 1


def _launcher(shape: Shape, stages: int, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    options = arguments(shape)
    compiled = _kernel[grid(shape)](q, k, v, torch.empty_like(q), **options, **OPTIONS, num_stages=stages)
    launch, rest = compiled[grid(shape)], tuple(options.values())

    def call() -> Tensor:
        out = torch.empty_like(q)
        launch(q, k, v, out, *rest)
        return out

    return Prepared(call)


@lru_cache(maxsize=1)
def _best_stages(shape: Shape) -> int:
    """The pipeline depth that is fastest for this shape, on the gpu clock."""
    q, k, v = shape.inputs()
    contestants = {str(n): Contestant([_launcher(shape, n, q, k, v).call]) for n in STAGES}
    times, _ = gpu_times(contestants, replays=9)
    return int(min(times, key=lambda name: median(times[name])))


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    if shape.batch * shape.heads > 65535:
        raise NotServedError("the heads of all sequences are one dimension of the grid, which ends at 65535")
    return _launcher(shape, _best_stages(shape), q, k, v)


_REFUSES = dict.fromkeys(("bias", "padded", "packed", "softcap", "window"), "a plain kernel knows a causal mask alone")
TRITON_PLAIN = Peer("triton-plain", "plain Triton", _prepare, "triton", refuses=_REFUSES)
