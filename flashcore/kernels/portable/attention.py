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
LOG2E = tl.constexpr(1.4426950408889634)

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
    HIDES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """acc / row_sum into columns START .. START + BLOCK of rows `first + rows`, nothing outside of n_rows x DIM."""
    result = acc * (1.0 / row_sum)[:, None]
    if HIDES:  # a row that sees no key shares its tile with rows that do: 0 * NaN of their v is not 0
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
    if a.dtype == tl.float32:  # by FFMA: tensor cores would round the operands to 11 bits
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def length_of(cu_seqlens, batch, total, longest):
    """(first row, number of rows) of a packed sequence, within the tensor whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch + 1), first), total)
    return first, tl.minimum(end - first, longest)


@triton.jit
def tile_of(number, cu_seqlens, sequences, total, BLOCK_M: tl.constexpr):
    """(sequence, tile of its rows) of a number; a tile past every end where it is before the first sequence's.

    A sequence's numbers begin with first row // BLOCK_M + its own: one for every BLOCK_M rows that it may touch. Every
    warp looks at 32 sequences at once, one a lane, which meet without shared memory; then at the 32nd part around.
    """
    lanes = tl.arange(0, 32)
    low, end, step, begin = sequences * 0, sequences, 2, sequences * 0
    while step > 1:
        step = tl.cdiv(end - low, 32)
        batch = low + lanes * step
        row = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch, mask=batch < end, other=0), 0), total)
        reached = (batch < end) & (row // BLOCK_M + batch <= number)
        begin = tl.max(tl.where(reached, row // BLOCK_M + batch, -1), 0)
        low = tl.max(tl.where(reached, batch, low), 0)
        end = tl.minimum(end, low + step)
    return low, tl.where(begin < 0, total // BLOCK_M + 1, number - begin)


@triton.jit
def hide(scores, rows, keys, seqlen_k, last_key, left, right, CAUSAL: tl.constexpr):
    """Scores of keys that a row must not see, set to -inf; row i has its diagonal at key i + last_key."""
    if left is not None:
        diagonal = rows[:, None] + last_key
        visible = (keys < seqlen_k)[None, :]
        visible &= (keys[None, :] >= diagonal - left) & (keys[None, :] <= diagonal + right)
    elif CAUSAL:  # implies the bound: rows of the problem end at key seqlen_k - 1
        visible = keys[None, :] <= rows[:, None] + last_key
    else:
        visible = (keys < seqlen_k)[None, :]
    return tl.where(visible, scores, NEGATIVE_INFINITY)


@triton.jit
def apply_mask(
    scores, scale, mask, stride_mm, stride_mn, start_n, n_rows, n_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BOUND_M: tl.constexpr, BOUND_N: tl.constexpr,
):  # fmt: skip
    """bool (bytes): -inf where it is 0; else scale * scores + mask, where a -inf hides the score even if it is NaN.

    mask points to the first key of the tile's first row; past n_rows and n_keys, where it may end within the tile, it
    is not read. MASK_M, MASK_N: 0 where it is broadcast over the rows, or the keys, and is read once for all of them.
    """
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offsets = tl.zeros([1, 1], tl.int32)
    inside = tl.full([1, 1], True, tl.int1)
    if MASK_M:
        offsets += rows[:, None] * stride_mm
        if BOUND_M:
            inside &= rows[:, None] < n_rows
    if MASK_N:
        if MASK_N == 1:
            mask += start_n
            offsets += keys[None, :]
        else:
            mask += tl.cast(start_n, tl.int64) * stride_mn
            offsets += keys[None, :] * stride_mn
        if BOUND_N:
            inside &= (start_n + keys)[None, :] < n_keys
    if (MASK_M and BOUND_M) or (MASK_N and BOUND_N):
        values = tl.load(mask + offsets, mask=inside, other=0)
    else:
        values = tl.load(mask + offsets)
    if mask.dtype.element_ty == tl.uint8:
        return tl.where(values != 0, scores, NEGATIVE_INFINITY)
    else:
        bias = values.to(tl.float32)
        return tl.where(bias == NEGATIVE_INFINITY, NEGATIVE_INFINITY, scores * scale + bias)


@triton.jit
def softmax_tile(scores, qk_scale, row_max, row_sum, BIAS: tl.constexpr):
    """One step of the online softmax. Returns (weights, factor for what was accumulated before, maximum, sum).

    The maximum is in units of log2. With a bias it is one of the scores: they may be as low as the lowest finite
    number, where the rounding of their product with a factor is itself more than exp2 can take.
    """
    if BIAS:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.math.exp2((row_max - new_max) * LOG2E)
        weights = tl.math.exp2((scores - new_max[:, None]) * LOG2E)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
        rescale = tl.math.exp2(row_max - new_max)
        weights = tl.math.exp2(scores * qk_scale - new_max[:, None])  # one FFMA and one MUFU per score
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def attend(
    acc, acc_rest, row_max, row_sum, begin, end, whole,
    q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, cap, mask, stride_mm, stride_mn,
    rows, n_rows, seqlen_k, last_key, left, right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, EMULATED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds keys begin .. end to the rows' state (acc, acc_rest, row_max, row_sum), BLOCK_N at a time.

    EDGE: which of these tiles hold a key that some row must not see: NONE, EVERY, or those FROM_WHOLE on.
    """
    keys = tl.arange(0, BLOCK_N)
    BOUND: tl.constexpr = EDGE != NONE and not EVEN_N
    BIAS: tl.constexpr = mask is not None and mask.dtype.element_ty != tl.uint8
    for start_n in tl.range(begin, end, BLOCK_N):
        k_tile = load_rows(k, start_n, keys, stride_kn, seqlen_k, 0, BLOCK_D, HEAD_DIM, BOUND)
        scores = multiply(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EMULATED)
        if REST_D:
            k_rest = load_rows(k, start_n, keys, stride_kn, seqlen_k, BLOCK_D, REST_D, HEAD_DIM, BOUND)
            scores = multiply(q_rest, k_rest.T, scores, EMULATED)
        if cap is not None:  # tanh by exp2: the hardware's own is right to 11 bits only
            scores = cap - 2.0 * cap / (1.0 + tl.math.exp2(scores * qk_scale))
        if mask is not None:
            scores = apply_mask(
                scores, qk_scale if cap is None else 1.0, mask, stride_mm, stride_mn, start_n, n_rows, seqlen_k,
                BLOCK_M, BLOCK_N, MASK_M, MASK_N, not EVEN_M, BOUND,
            )  # fmt: skip
        if EDGE == EVERY:
            scores = hide(scores, rows, start_n + keys, seqlen_k, last_key, left, right, CAUSAL)
        elif EDGE == FROM_WHOLE:
            if start_n >= whole:
                scores = hide(scores, rows, start_n + keys, seqlen_k, last_key, left, right, CAUSAL)
        weights, rescale, row_max, row_sum = softmax_tile(
            scores, qk_scale if cap is None else LOG2E, row_max, row_sum, BIAS
        )
        v_tile = load_rows(v, start_n, keys, stride_vn, seqlen_k, 0, BLOCK_DV, HEAD_DIM_V, BOUND)
        weights = narrow(weights, v_tile.dtype, EMULATED)
        acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED)
        if REST_DV:
            v_rest = load_rows(v, start_n, keys, stride_vn, seqlen_k, BLOCK_DV, REST_DV, HEAD_DIM_V, BOUND)
            acc_rest = multiply(weights, v_rest, acc_rest * rescale[:, None], EMULATED)
    return acc, acc_rest, row_max, row_sum


@triton.jit
def attention_forward(
    q, k, v, o, lse, mask, seqused_k, cu_seqlens_q, cu_seqlens_k, qk_scale, cap, left, right,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    stride_mb, stride_mh, stride_mm, stride_mn,
    heads, seqlen_q, seqlen_k, total_q, total_k, sequences,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, STRIDE_UNIT: tl.constexpr, WIDE: tl.constexpr,
    FOLD_BATCH: tl.constexpr, SPLIT: tl.constexpr, NEGATE_Q: tl.constexpr, EMULATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr,
    MASK_UNIT: tl.constexpr, MASK_WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M query rows of one head.

    q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], o [B, Hq, Sq, Dv], fp16, bf16 or fp32, last
    dimension contiguous; lse fp32 [B, Hq, Sq] contiguous, or None. Sk may be 0.

    None where an option is not in use: mask (bytes of a bool, or floats to add), over the scores by its own strides;
    seqused_k int32 [B]; cu_seqlens_q, cu_seqlens_k int32 [B + 1] of packed q, o [total_q, Hq, D] and k, v
    [total_k, Hkv, D], whose lse is [Hq, total_q] and whose seqlen_q, seqlen_k are the longest; sequences: how many,
    where the grid is (numbers of tiles, heads) as `tile_of` has them; left, right: keys beside the diagonal.

    qk_scale: softmax scale times log2(e), above 0: the row maximum is taken before scaling, and a hidden score,
        -inf, times 0 would be NaN. NEGATE_Q serves a negative scale; negation is exact. Without the factor of log2(e)
        where the scores get a bias, and with 2 / cap where cap bounds the scores.
    STRIDE_UNIT: strides are counted in this many elements. 16 bytes of them make every row's address a multiple of
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
    MASK_M, MASK_N: whether the mask has rows and keys of its own; MASK_N = 1 where keys are side by side, 2 elsewhere.
    MASK_UNIT, MASK_WIDE: as STRIDE_UNIT and WIDE, of the mask.
    """
    # Neighbouring blocks share K and V: tiles of one head first. Causal, the longest rows of all heads start first,
    # so that the last wave is made of the shortest.
    fast, slow = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2)
    if FOLD_BATCH:
        extent = heads if CAUSAL else tl.cdiv(seqlen_q, BLOCK_M)
        fast, batch = fast % extent, fast // extent
    if sequences is not None:
        head = slow
        number = tl.num_programs(0) - 1 - fast if CAUSAL else fast
        batch, tile = tile_of(number, cu_seqlens_q, sequences, total_q, BLOCK_M)
        start_m = tile * BLOCK_M
    elif CAUSAL:
        head, start_m = fast, (tl.num_programs(1) - 1 - slow) * BLOCK_M
    else:
        head, start_m = slow, fast * BLOCK_M
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    stride_qm = stride_qm.to(OFFSET) * STRIDE_UNIT
    stride_kn = stride_kn.to(OFFSET) * STRIDE_UNIT
    stride_vn = stride_vn.to(OFFSET) * STRIDE_UNIT
    stride_om = stride_om.to(OFFSET) * STRIDE_UNIT
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    RAGGED: tl.constexpr = seqused_k is not None or cu_seqlens_q is not None
    first_row = batch * 0
    if seqused_k is not None:
        seqlen_k = tl.minimum(tl.maximum(tl.load(seqused_k + batch), 0), seqlen_k)
    if cu_seqlens_q is not None:
        first_row, seqlen_q = length_of(cu_seqlens_q, batch, total_q, seqlen_q)
        first_key, seqlen_k = length_of(cu_seqlens_k, batch, total_k, seqlen_k)
        if start_m >= seqlen_q:  # the grid is made for the longest sequence, or for any lengths
            return
        q += first_row.to(tl.int64) * stride_qm
        o += first_row.to(tl.int64) * stride_om
        k += first_key.to(tl.int64) * stride_kn
        v += first_key.to(tl.int64) * stride_vn
    q += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    k += (batch * stride_kb + head // GROUP * stride_kh) * STRIDE_UNIT
    v += (batch * stride_vb + head // GROUP * stride_vh) * STRIDE_UNIT
    o += (batch * stride_ob + head * stride_oh) * STRIDE_UNIT
    if mask is not None:
        MASK_OFFSET: tl.constexpr = tl.int64 if MASK_WIDE else tl.int32
        stride_mm = stride_mm.to(MASK_OFFSET) * MASK_UNIT
        mask += (batch * stride_mb + head * stride_mh) * MASK_UNIT + start_m.to(tl.int64) * stride_mm
        stride_mn = stride_mn.to(MASK_OFFSET)

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
    begin = 0
    end = seqlen_k
    whole = seqlen_k
    if left is not None:
        begin = tl.maximum(0, start_m + last_key - left) // BLOCK_N * BLOCK_N
        end = tl.minimum(seqlen_k, tl.maximum(0, start_m + BLOCK_M + last_key + right))
        whole = begin
    elif CAUSAL:
        end = tl.minimum(seqlen_k, tl.maximum(0, start_m + BLOCK_M + last_key))
        whole = tl.minimum(seqlen_k, tl.maximum(0, start_m + 1 + last_key))
    WINDOW: tl.constexpr = left is not None
    MASKED: tl.constexpr = CAUSAL or WINDOW or not EVEN_N
    HIDES: tl.constexpr = CAUSAL or WINDOW or RAGGED or mask is not None
    if MASKED:
        whole = whole // BLOCK_N * BLOCK_N
    if MASKED and SPLIT and not WINDOW:
        acc, acc_rest, row_max, row_sum = attend(
            acc, acc_rest, row_max, row_sum, 0, whole, whole,
            q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, cap, mask, stride_mm, stride_mn,
            rows, seqlen_q - start_m, seqlen_k, last_key, left, right,
            HEAD_DIM, HEAD_DIM_V, CAUSAL, EVEN_M, EVEN_N, MASK_M, MASK_N,
            BLOCK_M, BLOCK_N, BLOCK_D, REST_D, BLOCK_DV, REST_DV, EMULATED, NONE,
        )  # fmt: skip
        acc, acc_rest, row_max, row_sum = attend(
            acc, acc_rest, row_max, row_sum, whole, end, whole,
            q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, cap, mask, stride_mm, stride_mn,
            rows, seqlen_q - start_m, seqlen_k, last_key, left, right,
            HEAD_DIM, HEAD_DIM_V, CAUSAL, EVEN_M, EVEN_N, MASK_M, MASK_N,
            BLOCK_M, BLOCK_N, BLOCK_D, REST_D, BLOCK_DV, REST_DV, EMULATED, EVERY,
        )  # fmt: skip
    else:
        EDGE: tl.constexpr = EVERY if WINDOW else FROM_WHOLE if MASKED else NONE
        acc, acc_rest, row_max, row_sum = attend(
            acc, acc_rest, row_max, row_sum, begin, end, whole,
            q_tile, q_rest, k, v, stride_kn, stride_vn, qk_scale, cap, mask, stride_mm, stride_mn,
            rows, seqlen_q - start_m, seqlen_k, last_key, left, right,
            HEAD_DIM, HEAD_DIM_V, CAUSAL, EVEN_M, EVEN_N, MASK_M, MASK_N,
            BLOCK_M, BLOCK_N, BLOCK_D, REST_D, BLOCK_DV, REST_DV, EMULATED, EDGE,
        )  # fmt: skip

    saw_nothing = row_sum == 0
    row_sum = tl.where(saw_nothing, 1.0, row_sum)
    store_rows(
        o, start_m, block_rows, stride_om, seqlen_q, acc, row_sum, saw_nothing,
        0, BLOCK_DV, HEAD_DIM_V, not EVEN_M, HIDES, EMULATED,
    )  # fmt: skip
    if REST_DV:
        store_rows(
            o, start_m, block_rows, stride_om, seqlen_q, acc_rest, row_sum, saw_nothing,
            BLOCK_DV, REST_DV, HEAD_DIM_V, not EVEN_M, HIDES, EMULATED,
        )  # fmt: skip
    if lse is not None:
        BIAS: tl.constexpr = mask is not None and mask.dtype.element_ty != tl.uint8
        if BIAS:
            log_sum = row_max + tl.math.log2(row_sum) * LN2
        else:
            log_sum = (row_max + tl.math.log2(row_sum)) * LN2
        log_sum = tl.where(saw_nothing, NEGATIVE_INFINITY, log_sum)
        if cu_seqlens_q is not None:
            first = head * total_q + first_row
        else:
            first = (batch * heads + head) * seqlen_q
        tl.store(lse + first + rows, log_sum, mask=rows < seqlen_q)
