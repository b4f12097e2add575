"""Attention of the same rows over two sets of keys, joined: one pass over memory, in plain Triton.

The rows' results are averaged with weights exp(lse of a set - lse of both), as FlashAttention (Dao et al., 2022) does
from tile to tile. Nothing but bytes counts here: every number is read once and written once. No branch and no address
depends on a value that is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import NEGATIVE_INFINITY, narrow


@triton.jit
def merge(
    out, lse, part, part_lse, into, stride_ob, stride_oh, stride_om, stride_lb, stride_lh, stride_pb, stride_ph,
    stride_pm, stride_plb, stride_plh, stride_ib, stride_ih, stride_im, heads, rows,
    HEAD_DIM: tl.constexpr, STRIDE_UNIT: tl.constexpr, EMULATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and part [B, H, rows, HEAD_DIM] joined into `into`, which may be `out`; lse [B, H, rows], in place, with it.

    Strides of out, part and into are in units of STRIDE_UNIT elements, so that the compiler knows which are aligned.
    A one-dimensional grid: B * H times the tiles of BLOCK_M rows.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = (pair // heads).to(tl.int64)
    head = pair % heads
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    exists = row < rows
    inside = exists[:, None]
    if BLOCK_D > HEAD_DIM:
        inside &= (column < HEAD_DIM)[None, :]
    far = row.to(tl.int64)[:, None]
    out += (batch * stride_ob + head * stride_oh + far * stride_om) * STRIDE_UNIT + column[None, :]
    part += (batch * stride_pb + head * stride_ph + far * stride_pm) * STRIDE_UNIT + column[None, :]
    into += (batch * stride_ib + head * stride_ih + far * stride_im) * STRIDE_UNIT + column[None, :]
    lse += batch * stride_lb + head * stride_lh + row
    part_lse += batch * stride_plb + head * stride_plh + row

    a = tl.load(lse, mask=exists, other=0.0)
    b = tl.load(part_lse, mask=exists, other=0.0)
    x = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(part, mask=inside, other=0.0).to(tl.float32)
    behind = tl.where(b == NEGATIVE_INFINITY, NEGATIVE_INFINITY, b - a)  # -inf - -inf: nothing to join
    small = tl.exp(-tl.abs(behind))  # the smaller of the two weights, the other one being 1
    weight = tl.where(behind > 0.0, 1.0, small) / (1.0 + small)
    keep = tl.where(behind > 0.0, small, 1.0) / (1.0 + small)
    total = tl.where(b > a, b, a) + tl.log(1.0 + small)  # NaN in either is in `small`, or the -inf of b leaves it in a
    z = x * keep[:, None] + y * weight[:, None]
    # In place: other threads of the block read a row's lse too.
    tl.debug_barrier()
    tl.store(lse, total, mask=exists)
    tl.store(into, narrow(z, into.dtype.element_ty, EMULATED), mask=inside)
