"""Attention forward: one pass over K and V with the online softmax, in plain Triton.

Method: FlashAttention-2 (Dao, 2023), with the row maximum of Milakov & Gimelshein (2018) kept in units of
log2 so that the exponential is the hardware's ex2.

Memory is read through pointers, not TMA descriptors: on sm_80 and sm_89 that is what becomes cp.async, and on
every architecture it serves any stride. No branch and no address depends on a value of q, k or v.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The running maximum starts at the lowest finite number instead of -inf. Every finite score is at least that, so
# no row's result changes, and a row that has seen nothing computes exp2(-inf - LOWEST) = 0, never inf - inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)

NONE, FROM_WHOLE, EVERY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(
    base, first, rows, stride, n_rows,
    START: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Columns START .. START + BLOCK of rows `first + rows`; what lies outside of n_rows x DIM reads as 0.

    The tile's first address is computed in 64 bits, offsets inside of it in the type of `stride`.
    """
    cols = START + tl.arange(0, BLOCK)
    tile = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if MASK_ROWS and START + BLOCK > DIM:
        return tl.load(tile, mask=(first + rows < n_rows)[:, None] & (cols < DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(tile, mask=(first + rows < n_rows)[:, None], other=0.0)
    elif START + BLOCK > DIM:
        return tl.load(tile, mask=(cols < DIM)[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def store_rows(
    base, first, rows, stride, n_rows, acc, row_sum, saw_nothing,
    START: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """acc / row_sum into columns START .. START + BLOCK of rows `first + rows`, nothing outside of n_rows x DIM."""
    result = acc * (1.0 / row_sum)[:, None]
    if CAUSAL:  # a row above the first key shares its tile with rows that do attend: 0 * NaN of their v is not 0
        result = tl.where(saw_nothing[:, None], 0.0, result)
    result = narrow(result, base.dtype.element_ty, EMULATED)
    cols = START + tl.arange(0, BLOCK)
    tile = base + first.to(tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if START + BLOCK > DIM:
        tl.store(tile, result, mask=(first + rows < n_rows)[:, None] & (cols < DIM)[None, :])
    elif MASK_ROWS:
        tl.store(tile, result, mask=(first + rows < n_rows)[:, None])
    else:
        tl.store(tile, result)


@triton.jit
def narrow(x, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """fp32 to `dtype`, rounded to nearest even; Triton's interpreter would truncate to bf16."""
    if EMULATED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def multiply(a, b, acc, EMULATED: tl.constexpr):
    """a @ b + acc in fp32; Triton's interpreter would multiply the bit patterns of bf16."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def hide(scores, rows, keys, seqlen_k, last_key, CAUSAL: tl.constexpr):
    """Scores of keys that a row must not see, set to -inf; row i of the problem sees keys 0 .. i + last_key."""
    if CAUSAL:  # implies the bound: rows of the problem end at key seqlen_k - 1
        visible = keys[None, :] <= rows[:, None] + last_key
    else:
        visible = (keys < seqlen_k)[None, :]
    return tl.where(visible, scores, NEGATIVE_INFINITY)


@triton.jit
def softmax_tile(scores, qk_scale, row_max, row_sum):
    """One step of the online softmax. Returns (weights, factor for what was accumulated before, maximum, sum)."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
    rescale = tl.math.exp2(row_max - new_max)
    weights = tl.math.exp2(scores * qk_scale - new_max[:, None])  # one FFMA and one MUFU per score
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def attend(
    acc, acc_rest, row_max, row_sum, begin, end, whole,
    q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, rows, seqlen_k, last_key,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, CAUSAL: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, EMULATED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds keys begin .. end to the rows' state (acc, acc_rest, row_max, row_sum), BLOCK_N at a time.

    EDGE: which of these tiles hold a key that some row must not see: NONE, EVERY, or those FROM_WHOLE on.
    """
    keys = tl.arange(0, BLOCK_N)
    BOUND: tl.constexpr = EDGE != NONE and not EVEN_N
    for start_n in tl.range(begin, end, BLOCK_N):
        k_tile = load_rows(k, start_n, keys, stride_kn, seqlen_k, 0, BLOCK_D, HEAD_DIM, BOUND)
        scores = multiply(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EMULATED)
        if REST_D:
            k_rest = load_rows(k, start_n, keys, stride_kn, seqlen_k, BLOCK_D, REST_D, HEAD_DIM, BOUND)
            scores = multiply(q_rest, k_rest.T, scores, EMULATED)
        if EDGE == EVERY:
            scores = hide(scores, rows, start_n + keys, seqlen_k, last_key, CAUSAL)
        elif EDGE == FROM_WHOLE:
            if start_n >= whole:
                scores = hide(scores, rows, start_n + keys, seqlen_k, last_key, CAUSAL)
        weights, rescale, row_max, row_sum = softmax_tile(scores, qk_scale, row_max, row_sum)
        v_tile = load_rows(v, start_n, keys, stride_vn, seqlen_k, 0, BLOCK_DV, HEAD_DIM_V, BOUND)
        weights = narrow(weights, v_tile.dtype, EMULATED)
        acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED)
        if REST_DV:
            v_rest = load_rows(v, start_n, keys, stride_vn, seqlen_k, BLOCK_DV, REST_DV, HEAD_DIM_V, BOUND)
            acc_rest = multiply(weights, v_rest, acc_rest * rescale[:, None], EMULATED)
    return acc, acc_rest, row_max, row_sum


@triton.jit
def attention_forward(
    q, k, v, o, lse, qk_scale,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    heads, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, STRIDE_UNIT: tl.constexpr, WIDE: tl.constexpr,
    FOLD_BATCH: tl.constexpr, SPLIT: tl.constexpr, NEGATE_Q: tl.constexpr, EMULATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M query rows of one head.

    q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], o [B, Hq, Sq, Dv], fp16 or bf16, last dimension
    contiguous; lse fp32 [B, Hq, Sq] contiguous, or None. Sk may be 0.

    qk_scale: softmax scale times log2(e), above 0: the row maximum is taken before scaling, and a hidden score,
        -inf, times 0 would be NaN. NEGATE_Q serves a negative scale; negation is exact.
    STRIDE_UNIT: strides are counted in this many elements. 8 (16 bytes) makes every row's address a multiple of
        16 bytes in the compiler's eyes, which one 16-byte load per thread needs, whatever the head size.
    WIDE: offsets inside of a tile need 64 bits.
    EVEN_M, EVEN_N: the tiles divide Sq, Sk.
    GROUP: query heads per key/value head.
    FOLD_BATCH: the batch, too large for the grid's third dimension, is folded into the first.
    SPLIT: tiles that need a mask have a loop of their own. One loop with a uniform branch around the mask is half
        the code and keeps loads in flight up to the last tile, but Triton sees a chain of two mma.sync products
        (sm_80, sm_89) only without that branch, and would carry the weights through shared memory.
    BLOCK_D, REST_D, BLOCK_DV, REST_DV: a row's columns as one or two powers of two (REST 0), the sizes of Triton's
        tiles: 96 columns as 64 + 32 rather than 128.
    EMULATED: bf16 in Triton's interpreter.
    """
    # Neighbouring blocks share K and V: tiles of one head first. Causal, the longest rows of all heads start first,
    # so that the last wave is made of the shortest.
    fast, slow = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2)
    if FOLD_BATCH:
        extent = heads if CAUSAL else tl.cdiv(seqlen_q, BLOCK_M)
        fast, batch = fast % extent, fast // extent
    if CAUSAL:
        head, start_m = fast, (tl.num_programs(1) - 1 - slow) * BLOCK_M
    else:
        head, start_m = slow, fast * BLOCK_M
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    stride_qm = stride_qm.to(OFFSET) * STRIDE_UNIT
    stride_kn = stride_kn.to(OFFSET) * STRIDE_UNIT
    stride_vn = stride_vn.to(OFFSET) * STRIDE_UNIT
    stride_om = stride_om.to(OFFSET) * STRIDE_UNIT
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    q += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    k += (batch * stride_kb + head // GROUP * stride_kh) * STRIDE_UNIT
    v += (batch * stride_vb + head // GROUP * stride_vh) * STRIDE_UNIT
    o += (batch * stride_ob + head * stride_oh) * STRIDE_UNIT

    block_rows = tl.arange(0, BLOCK_M)
    rows = start_m + block_rows
    q_tile = load_rows(q, start_m, block_rows, stride_qm, seqlen_q, 0, BLOCK_D, HEAD_DIM, not EVEN_M)
    q_rest = q_tile
    if REST_D:
        q_rest = load_rows(q, start_m, block_rows, stride_qm, seqlen_q, BLOCK_D, REST_D, HEAD_DIM, not EVEN_M)
    if NEGATE_Q:
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
        q_rest = (-q_rest.to(tl.float32)).to(q_tile.dtype)

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, REST_DV if REST_DV else 16], tl.float32)

    # Keys 0 .. whole are seen by every row of the tile, keys from end on by none.
    last_key = seqlen_k - seqlen_q
    end = seqlen_k
    whole = seqlen_k
    if CAUSAL:
        end = tl.minimum(seqlen_k, tl.maximum(0, start_m + BLOCK_M + last_key))
        whole = tl.minimum(seqlen_k, tl.maximum(0, start_m + 1 + last_key))
    MASKED: tl.constexpr = CAUSAL or not EVEN_N
    if MASKED:
        whole = whole // BLOCK_N * BLOCK_N
    if MASKED and SPLIT:
        acc, acc_rest, row_max, row_sum = attend(
            acc, acc_rest, row_max, row_sum, 0, whole, whole,
            q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, rows, seqlen_k, last_key,
            HEAD_DIM, HEAD_DIM_V, CAUSAL, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, REST_D, BLOCK_DV, REST_DV, EMULATED, NONE,
        )  # fmt: skip
        acc, acc_rest, row_max, row_sum = attend(
            acc, acc_rest, row_max, row_sum, whole, end, whole,
            q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, rows, seqlen_k, last_key,
            HEAD_DIM, HEAD_DIM_V, CAUSAL, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, REST_D, BLOCK_DV, REST_DV, EMULATED, EVERY,
        )  # fmt: skip
    else:
        EDGE: tl.constexpr = FROM_WHOLE if MASKED else NONE
        acc, acc_rest, row_max, row_sum = attend(
            acc, acc_rest, row_max, row_sum, 0, end, whole,
            q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, rows, seqlen_k, last_key,
            HEAD_DIM, HEAD_DIM_V, CAUSAL, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_D, REST_D, BLOCK_DV, REST_DV, EMULATED, EDGE,
        )  # fmt: skip

    saw_nothing = row_sum == 0
    row_sum = tl.where(saw_nothing, 1.0, row_sum)
    store_rows(
        o, start_m, block_rows, stride_om, seqlen_q, acc, row_sum, saw_nothing,
        0, BLOCK_DV, HEAD_DIM_V, not EVEN_M, CAUSAL, EMULATED,
    )  # fmt: skip
    if REST_DV:
        store_rows(
            o, start_m, block_rows, stride_om, seqlen_q, acc_rest, row_sum, saw_nothing,
            BLOCK_DV, REST_DV, HEAD_DIM_V, not EVEN_M, CAUSAL, EMULATED,
        )  # fmt: skip
    if lse is not None:
        log_sum = tl.where(saw_nothing, NEGATIVE_INFINITY, (row_max + tl.math.log2(row_sum)) * LN2)
        first = (batch * heads + head) * seqlen_q
        tl.store(lse + first + rows, log_sum, mask=rows < seqlen_q)
