"""Attention forward on sm_90: one block computes tiles of 64 query rows a warpgroup against all their keys.

Four small blocks share an SM. Each runs QK, softmax, PV strictly in turn; another block's matrix products run under
this one's softmax. With nothing of its own in flight a block needs one buffer each for K and V and few enough
registers (126 at 64x128 and D=64) for four blocks to fit, which hides more than pipelining inside a block does:
docs/design/hopper-log.md has the measurements.

Loads run half a tile ahead: K's buffer is free once the scores are there and is refilled during softmax and PV, V's
during the next QK and softmax. A persistent block carries on over its items, so the next item's Q, K and V load
while this one finishes.

No branch and no address depends on a value of q, k or v: the accumulator is rescaled at every tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .compat import block_barrier, tma_load, tma_store

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _divide(x, reciprocal):
    """x // d for reciprocal = ceil(2**32 / d): one wide multiplication instead of some forty instructions."""
    return ((x.to(gl.uint64) * reciprocal.to(gl.uint64)) >> 32).to(gl.int32)


@gluon.jit
def _item(index, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs, CAUSAL: gl.constexpr):
    """(row tile, head, batch) of a work item. Causal: the rows that see the most keys first."""
    if CAUSAL:
        turn = _divide(index, per_pairs)
        pair = index - turn * pairs
        row_tile = row_tiles - 1 - turn
    else:
        pair = _divide(index, per_row_tiles)
        row_tile = index - pair * row_tiles
    batch = _divide(pair, per_heads)
    return row_tile, pair - batch * heads, batch


@gluon.jit
def _key_tiles(row, seqlen_k, shift, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Key tiles that the rows from `row` on read; at least one, so that every barrier completes once a tile."""
    seen = seqlen_k
    if CAUSAL:
        seen = gl.minimum(seen, row + BLOCK_M + shift)
    return gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _hide(s, row, key, seqlen_k, shift, CAUSAL: gl.constexpr):
    """-inf for keys past the end and, causal, to the right of the diagonal that ends in the bottom right corner."""
    layout: gl.constexpr = s.type.layout
    end = gl.full([s.shape[0]], seqlen_k - key, gl.int32, gl.SliceLayout(1, layout))  # first hidden column of a row
    if CAUSAL:
        end = gl.minimum(end, row + shift + 1 - key + gl.arange(0, s.shape[0], gl.SliceLayout(1, layout)))
    hidden = gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))[None, :] >= end[:, None]
    return gl.where(hidden, -float("inf"), s)


@gluon.jit
def _row_sums(p, layout: gl.constexpr):
    """[M, N] -> [M, 8], summed within each thread: the lanes meet once, after the last tile."""
    m: gl.constexpr = p.shape[0]
    n: gl.constexpr = p.shape[1]
    return gl.convert_layout(gl.sum(gl.reshape(p, [m, n // 8, 8]), 1), layout, assert_trivial=True)


@gluon.jit
def _softmax(s, m, l, acc, qk_scale, FIRST: gl.constexpr, EMPTY_ROWS: gl.constexpr):
    """Scores of one tile -> weights in fp32, with the running maximum m (in units of log2), sum l and output acc."""
    sums_layout: gl.constexpr = l.type.layout
    out_layout: gl.constexpr = acc.type.layout
    new_m = gl.max(s, 1) * qk_scale
    if not FIRST:
        new_m = gl.maximum(m, new_m)
    base = new_m
    if EMPTY_ROWS:  # a row that has seen nothing yet: -inf - -inf is no number
        base = gl.where(new_m == -float("inf"), 0.0, new_m)
    p = gl.exp2(s * qk_scale - base[:, None])
    sums = _row_sums(p, sums_layout)
    if FIRST:
        l = sums
    else:
        alpha = gl.exp2(m - base)
        l = l * gl.convert_layout(alpha, gl.SliceLayout(1, sums_layout), assert_trivial=True)[:, None] + sums
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, out_layout), assert_trivial=True)[:, None]
    return p, new_m, l, acc


@gluon.jit
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, lse, qk_scale, seqlen_q, seqlen_k, row_tiles, per_row_tiles, heads, per_heads,
    pairs, per_pairs, items, GROUP: gl.constexpr, CAUSAL: gl.constexpr, EVEN_N: gl.constexpr, SINGLE: gl.constexpr,
    EMPTY_ROWS: gl.constexpr, NEGATE: gl.constexpr, PERSISTENT: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, WARPS: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v over 4-D descriptors [batch, heads, rows, columns] whose boxes are one tile.

    SINGLE: all keys fit in one tile. EMPTY_ROWS: some rows see no key. NEGATE: the scale is negative, qk_scale its
    magnitude. LATE: let the next kernel start when this one ends, not at once. PERSISTENT: a one-dimensional grid of
    blocks that each take every gridDim-th item; else a grid of (row tiles, heads, batch), when causal (heads, row
    tiles, batch).
    """
    dtype: gl.constexpr = q_desc.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_DV, 16])  # noqa: E741
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)

    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_box = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    k_box = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_box = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_DV], v_desc.layout)
    q_tile = q_box.reshape([BLOCK_M, BLOCK_D])
    k_tile = k_box.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    v_tile = v_box.reshape([BLOCK_N, BLOCK_DV])
    if PERSISTENT or BLOCK_DV != BLOCK_D:  # a persistent block's q already is the next item's
        o_box = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_M, BLOCK_DV], o_desc.layout)
    else:
        o_box = q_box
    o_tile = o_box.reshape([BLOCK_M, BLOCK_DV])
    Q_BYTES: gl.constexpr = BLOCK_M * BLOCK_D * 2
    K_BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    V_BYTES: gl.constexpr = BLOCK_N * BLOCK_DV * 2

    mbarrier.init(q_full, count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    fence_async_shared()
    mbarrier.expect(q_full, Q_BYTES)
    mbarrier.expect(k_full, K_BYTES)
    mbarrier.expect(v_full, V_BYTES)
    if PERSISTENT:
        first = gl.program_id(0)
        step = gl.num_programs(0)
        row_tile, head, batch = _item(first, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs, CAUSAL)
    else:
        first = 0
        step = 1
        if CAUSAL:
            row_tile = row_tiles - 1 - gl.program_id(1)
            head = gl.program_id(0)
        else:
            row_tile = gl.program_id(0)
            head = gl.program_id(1)
        batch = gl.program_id(2)
    gdc_wait()  # the set-up above overlaps with whatever ran before in the stream; it has now written its results
    tma_load(q_desc, [batch, head, row_tile * BLOCK_M, 0], q_full, q_box)
    tma_load(k_desc, [batch, head // GROUP, 0, 0], k_full, k_box)
    tma_load(v_desc, [batch, head // GROUP, 0, 0], v_full, v_box)
    # The next kernel's set-up may overlap in turn. Started now, its blocks would sit where ours still want to go
    # unless ours all fit with room to spare.
    if not LATE:
        gdc_launch_dependents()

    shift = seqlen_k - seqlen_q
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S)
    loads = 0  # of K, and of V; their parity is the phase of the barriers
    turn = 0
    for index in range(first, items, step):
        row = row_tile * BLOCK_M
        tiles = _key_tiles(row, seqlen_k, shift, BLOCK_M, BLOCK_N, CAUSAL)
        visible = seqlen_k  # keys that every row of this tile sees
        if CAUSAL:
            visible = gl.minimum(visible, row + shift + 1)
        more = False
        next_row_tile, next_head, next_batch = row_tile, head, batch
        if PERSISTENT:
            more = index + step < items
            next_row_tile, next_head, next_batch = _item(
                index + step, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs, CAUSAL
            )
        acc = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, O)
        m = gl.full([BLOCK_M], -float("inf"), gl.float32, gl.SliceLayout(1, S))
        l = gl.zeros([BLOCK_M, 8], gl.float32, L)  # noqa: E741
        mbarrier.wait(q_full, turn & 1)
        for tile in range(0, 1 if SINGLE else tiles):
            last = tile + 1 == tiles
            refill = more | (tile + 1 < tiles)
            load_batch = gl.where(last, next_batch, batch)
            load_head = gl.where(last, next_head, head) // GROUP
            load_key = gl.where(last, 0, (tile + 1) * BLOCK_N)
            mbarrier.wait(k_full, loads & 1)
            scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(scores,))
            if PERSISTENT or not SINGLE:
                mbarrier.expect(k_full, K_BYTES, pred=refill)
                if PERSISTENT:
                    mbarrier.expect(q_full, Q_BYTES, pred=last & more)
                block_barrier()  # every warp's product has read k, and q
                tma_load(k_desc, [load_batch, load_head, load_key, 0], k_full, k_box, pred=refill)
                if PERSISTENT:
                    row_next = next_row_tile * BLOCK_M
                    tma_load(q_desc, [next_batch, next_head, row_next, 0], q_full, q_box, pred=last & more)
            if NEGATE:
                s = -s
            if SINGLE and (CAUSAL or not EVEN_N):
                s = _hide(s, row, 0, seqlen_k, shift, CAUSAL)
            elif CAUSAL or not EVEN_N:
                if (tile + 1) * BLOCK_N > visible:
                    s = _hide(s, row, tile * BLOCK_N, seqlen_k, shift, CAUSAL)
            p, m, l, acc = _softmax(s, m, l, acc, qk_scale, SINGLE, EMPTY_ROWS)
            p = gl.convert_layout(p.to(dtype), P, assert_trivial=True)
            mbarrier.wait(v_full, loads & 1)
            sums = warpgroup_mma(p, v_tile, acc, use_acc=not SINGLE, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=(sums, p))
            if PERSISTENT or not SINGLE:
                mbarrier.expect(v_full, V_BYTES, pred=refill)
                block_barrier()  # every warp's product has read v
                tma_load(v_desc, [load_batch, load_head, load_key, 0], v_full, v_box, pred=refill)
            loads += 1

        if LATE:
            if not more:
                gdc_launch_dependents()
        total = gl.sum(l, 1)
        inverse = 1.0 / total
        if EMPTY_ROWS:
            inverse = gl.where(total == 0.0, 0.0, inverse)
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
        if PERSISTENT:
            tma.store_wait(0)  # the item before this one has left the buffer
        o_tile.store(out.to(dtype))
        fence_async_shared()
        tma_store(o_desc, [batch, head, row, 0], o_box)
        if lse is not None:
            rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, S))
            total = gl.convert_layout(total, gl.SliceLayout(1, S), assert_trivial=True)
            base = (batch.to(gl.int64) * heads + head) * seqlen_q
            gl.store(lse + base + rows, m * LN2 + gl.log(total), mask=rows < seqlen_q)
        row_tile, head, batch = next_row_tile, next_head, next_batch
        turn += 1
    tma.store_wait(0)
