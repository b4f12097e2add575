"""Attention forward on sm_90: one block computes tiles of 64 query rows a warpgroup against all their keys.

Four small blocks share an SM. Each runs QK, softmax, PV strictly in turn; another block's matrix products run under
this one's softmax. With nothing of its own in flight a block needs one buffer each for K and V and few enough
registers (126 at 64x128 and D=64) for four blocks to fit, which hides more than pipelining inside a block does:
docs/design/hopper-log.md has the measurements.

Loads run half a tile ahead: K's buffer is free once the scores are there and is refilled during softmax and PV; V's is
asked for once QK is under way, behind the barrier in front of it, and filled during QK and softmax. A persistent block
carries on over its items, so the next item's Q and K load while this one finishes. With SLICES the softmax of a tile's
last keys runs while PV of its first ones is under way.

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
from .softmax import (
    LN2,
    LOG2E,
    apply_mask,
    factor,
    hide,
    hide_pairs,
    maximum,
    mean,
    parts,
    reciprocal,
    times,
    weights,
)


@gluon.jit
def divide(x, reciprocal):
    """x // d for reciprocal = ceil(2**32 / d): one wide multiplication instead of some forty instructions."""
    return ((x.to(gl.uint64) * reciprocal.to(gl.uint64)) >> 32).to(gl.int32)


@gluon.jit
def _item(index, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs, CAUSAL: gl.constexpr):
    """(row tile, head, batch) of a work item. Causal: the rows that see the most keys first."""
    if CAUSAL:
        turn = divide(index, per_pairs)
        pair = index - turn * pairs
        row_tile = row_tiles - 1 - turn
    else:
        pair = divide(index, per_row_tiles)
        row_tile = index - pair * row_tiles
    batch = divide(pair, per_heads)
    return row_tile, pair - batch * heads, batch


@gluon.jit
def _rows_of(cu_seqlens, batch, total, longest):
    """(first row, number of rows) of a packed sequence, within the tensor whatever cu_seqlens holds."""
    first = gl.minimum(gl.maximum(gl.load(cu_seqlens + batch), 0), total)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + batch + 1), first), total)
    return gl.minimum(first, total - 1), gl.minimum(end - first, longest)


@gluon.jit
def _tile_of(number, cu_seqlens, sequences, total, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """(tile of rows, sequence) of a number; a tile past every end where it is before the first sequence's.

    A sequence's numbers begin with first row // BLOCK_M + its own: one for every BLOCK_M rows that it may touch. Every
    warp looks at 32 sequences at once, one a lane, which meet without shared memory; then at the 32nd part around.
    """
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    low, end, step, begin = sequences * 0, sequences, 2, sequences * 0
    while step > 1:
        step = (end - low + 31) // 32
        batch = low + lanes * step
        row = gl.minimum(gl.maximum(gl.load(cu_seqlens + batch, mask=batch < end, other=0), 0), total)
        reached = (batch < end) & (row // BLOCK_M + batch <= number)
        begin = gl.max(gl.where(reached, row // BLOCK_M + batch, -1), 0)
        low = gl.max(gl.where(reached, batch, low), 0)
        end = gl.minimum(end, low + step)
    return gl.where(begin < 0, total // BLOCK_M + 1, number - begin), low


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _lanes(SEQUENCES: gl.constexpr, WARPS: gl.constexpr):
    return gl.arange(0, SEQUENCES, gl.BlockedLayout([SEQUENCES // 32], [32], [WARPS], [0]))


@gluon.jit
def _turns(seqused_k, cu_seqlens_k, sequences, longest, SEQUENCES: gl.constexpr, WARPS: gl.constexpr):
    """When each sequence's turn is if those with the most keys come first, by quarters of the longest; -1 for those
    past the last. A counting sort of at most SEQUENCES <= 128 in the lanes of a warp, the four counters in one number.
    """
    lanes = _lanes(SEQUENCES, WARPS)
    exists = lanes < sequences
    if cu_seqlens_k is not None:
        keys = gl.load(cu_seqlens_k + lanes + 1, mask=exists, other=0)
        keys -= gl.load(cu_seqlens_k + lanes, mask=exists, other=0)
    else:
        keys = gl.load(seqused_k + lanes, mask=exists, other=0)
    place = 0  # of a sequence's counter: the longest quarter's is the lowest byte
    for quarters in gl.static_range(1, 4):
        place += gl.where(4 * keys <= quarters * longest, 8, 0)
    one = gl.where(exists, 1 << place, 0)
    before = gl.associative_scan(one, 0, _add) - one
    begin = gl.sum(one, 0) * 0x01010100  # in each byte the sum of those below it
    return gl.where(exists, ((before + begin) >> place) & 255, -1)


@gluon.jit
def _whose(turns, turn, SEQUENCES: gl.constexpr, WARPS: gl.constexpr):
    """The sequence whose turn it is."""
    return gl.max(gl.where(turns == turn, _lanes(SEQUENCES, WARPS), 0), 0)


@gluon.jit
def _used(seqused_k, batch, longest, pred=True):
    """Number of keys of a sequence, within the tensor whatever seqused_k holds."""
    return gl.minimum(gl.maximum(gl.load(seqused_k + batch, mask=pred), 0), longest)


@gluon.jit
def held(a, b, size):
    """Descriptors a and b, for use in a loop. ptxas computes the address of a parameter anew in front of each load, in
    a dozen instructions; one that might be either's, for all it knows of the size, it keeps in registers. That takes
    boxes of one shape: else they are as they were.
    """
    if a.block_shape[-1] == b.block_shape[-1]:
        if size < 0:
            a, b = b, a
    return a, b


@gluon.jit
def _load(desc, batch, head, first, length, longest, row, full, box, pred=True):
    """Rows `row` on of a sequence into `box`; what lies past its end reads as 0.

    Where only the device knows the end, the descriptor has five dimensions, [batch, head, y, x, column], in which
    y + x - longest is the row in memory: x = longest - length + row passes the dimension's end just where row passes
    the sequence's. Its address is that of row -longest, which need not be mapped: harmless while a box holds some row,
    but a box without any was seen to fault, so that length must not be 0.
    """
    if len(desc.block_shape) == 5:
        tma_load(desc, [batch, head, first + length, longest - length + row, 0], full, box, pred=pred)
    else:
        tma_load(desc, [batch, head, row, 0], full, box, pred=pred)


@gluon.jit
def _key_tiles(row, seqlen_k, shift, left, right, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """First and last + 1 of the key tiles that rows from `row` on read; at least one: a barrier completes in each."""
    seen, begin = seqlen_k, 0
    if CAUSAL:
        seen = gl.minimum(seen, row + BLOCK_M + shift)
    if left is not None:
        seen = gl.minimum(seen, row + BLOCK_M + shift + right)
        begin = gl.maximum(row + shift - left, 0) // BLOCK_N
    return begin, gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, begin + 1)


@gluon.jit
def qk(q_tile, k_tile, KEYS: gl.constexpr, D: gl.constexpr, MORE_D: gl.constexpr, WARPS: gl.constexpr):
    """q k^T of the tile's first KEYS keys and D + MORE_D columns; a promise, to be waited for."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    rows: gl.constexpr = q_tile.shape[0]
    nothing = gl.zeros([rows, KEYS], gl.float32, layout)
    keys = k_tile.slice(0, KEYS, 1)
    s = warpgroup_mma(q_tile.slice(0, D, 1), keys.slice(0, D, 0), nothing, use_acc=False, is_async=True)
    if MORE_D:
        s = warpgroup_mma(q_tile.slice(D, MORE_D, 1), keys.slice(D, MORE_D, 0), s, is_async=True)
    return s


@gluon.jit
def product(p, values, acc, layout: gl.constexpr, FIRST: gl.constexpr):
    """acc + p values, p values alone if FIRST; a promise, to be waited for, and what is read meanwhile."""
    p = gl.convert_layout(p, gl.DotOperandLayout(0, layout, 2), assert_trivial=True)
    return warpgroup_mma(p, values, acc, use_acc=not FIRST, is_async=True), p


@gluon.jit
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, lse, mask_desc, seqused_k, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences,
    qk_scale, cap, left, right, longest_q, longest_k, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs,
    items,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, EVEN_N: gl.constexpr, SINGLE: gl.constexpr, TAIL: gl.constexpr,
    ENDS: gl.constexpr, EMPTY_ROWS: gl.constexpr, NEGATE: gl.constexpr, PERSISTENT: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, MORE_D: gl.constexpr, DV: gl.constexpr, MORE_DV: gl.constexpr,
    WARPS: gl.constexpr, SLICES: gl.constexpr, LATE: gl.constexpr, SORTED: gl.constexpr, MASK_B: gl.constexpr,
    MASK_H: gl.constexpr, PACK_GQA: gl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v over 4-D descriptors [batch, heads, rows, columns] whose boxes are one tile.

    SINGLE: all keys fit in one tile. TAIL: keys of the last tile, causal of all tiles that hide some, where they have a
    copy of the loop's body of their own, else 0; then no other hides any, but with ENDS a whole one for an end that
    fills more of it than a narrow one. EMPTY_ROWS: some rows see no key. NEGATE: the scale is negative, qk_scale its
    magnitude. D + MORE_D and DV + MORE_DV: the columns of a box that are multiplied, in one part or two. SLICES: in how
    many PV takes the keys of a whole tile. PACK_GQA: query heads of a key head whose rows a block has, position by
    position, by q's and o's fourth dimension of five; heads are key heads then. LATE: let the next kernel start when
    this one ends, not at once. SORTED: if not 0, sequences with the most keys come first, of which there are at most
    this many: 32, 64 or 128. PERSISTENT: a one-dimensional grid of blocks that each take every gridDim-th item; else a
    grid of (row tiles, heads, batch), when causal (heads at once, row tiles, such groups of heads of all batches).

    None where an option is not in use. mask_desc: over the mask's own sizes, 1 where it is broadcast; MASK_B, MASK_H: 0
    where its batch or head is. cap: of the scores, before the mask is added. qk_scale has a factor of log2(e), without
    it where the scores get a bias, and 2 / cap where there is a cap. left, right: keys beside the diagonal.
    seqused_k, cu_seqlens_q, cu_seqlens_k: lengths on the device, of sequences of at most longest_q, longest_k rows. Of
    these a persistent kernel takes seqused_k only. sequences: how many, where the grid is (_tile_of's numbers, heads).
    """
    dtype: gl.constexpr = q_desc.dtype
    ROWS: gl.constexpr = BLOCK_M // PACK_GQA  # of a sequence
    BLOCK_D: gl.constexpr = q_desc.block_shape[-1]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])  # noqa: E741
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    MORE_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MORE_DV, 16])
    BIAS: gl.constexpr = mask_desc is not None and mask_desc.dtype != gl.int8
    EXACT: gl.constexpr = BIAS and mask_desc.dtype != gl.float16
    HIDE_PAIRS: gl.constexpr = BIAS and lse is None and mask_desc.dtype != gl.float32
    RAGGED: gl.constexpr = seqused_k is not None or cu_seqlens_k is not None
    MASKED: gl.constexpr = CAUSAL or not EVEN_N or left is not None
    PARTS: gl.constexpr = 3 if ENDS else 2 if TAIL else 1
    NARROW: gl.constexpr = PARTS - 1 if TAIL else PARTS  # the part of TAIL's tiles, if any
    STAYS: gl.constexpr = PERSISTENT or not SINGLE  # for more than one tile
    SHORT: gl.constexpr = STAYS and not BIAS and BLOCK_N <= 64 and BLOCK_D <= 64  # QK is too short to load V under it
    SPREAD: gl.constexpr = SINGLE == (DV <= 32)  # the maxima: as was measured to gain, and fits in the registers
    ONE_ITEM: gl.constexpr = not PERSISTENT and cu_seqlens_q is None and (mask_desc is None or BLOCK_N > 64)

    PLAIN: gl.constexpr = not CAUSAL and not RAGGED and mask_desc is None and cap is None and left is None
    if PLAIN and not SINGLE and not PERSISTENT:  # there it was seen to gain
        k_desc, v_desc = held(k_desc, v_desc, longest_k)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_box = gl.allocate_shared_memory(dtype, q_desc.block_shape, q_desc.layout)
    k_box = gl.allocate_shared_memory(dtype, k_desc.block_shape, k_desc.layout)
    v_box = gl.allocate_shared_memory(dtype, v_desc.block_shape, v_desc.layout)
    q_tile = q_box.reshape([BLOCK_M, BLOCK_D])
    k_tile = k_box.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    v_tile = v_box.reshape([BLOCK_N, BLOCK_DV])
    o_box = q_box
    if PERSISTENT or BLOCK_DV != BLOCK_D:  # a persistent block's q already is the next item's
        o_box = gl.allocate_shared_memory(dtype, o_desc.block_shape, o_desc.layout)
    o_tile = o_box.reshape([BLOCK_M, BLOCK_DV])
    Q_BYTES: gl.constexpr = BLOCK_M * BLOCK_D * 2
    K_BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    V_BYTES: gl.constexpr = BLOCK_N * BLOCK_DV * 2
    if mask_desc is not None:
        MASK_ROWS: gl.constexpr = mask_desc.block_shape[2]
        MASK_BYTES: gl.constexpr = MASK_ROWS * BLOCK_N * mask_desc.dtype.primitive_bitwidth // 8
        mask_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mask_box = gl.allocate_shared_memory(mask_desc.dtype, mask_desc.block_shape, mask_desc.layout)
        mask_tile = mask_box.reshape([MASK_ROWS, BLOCK_N])
        mbarrier.init(mask_full, count=1)
    if BIAS:
        ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BLOCK_N], dtype)
        ones_box = gl.allocate_shared_memory(dtype, [8, BLOCK_N], ONES)
        ones_box.store(gl.full([8, BLOCK_N], 1.0, dtype, gl.BlockedLayout([1, 8], [8, 4], [1, WARPS], [1, 0])))
        ones = ones_box.permute((1, 0))

    mbarrier.init(q_full, count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    fence_async_shared()
    mbarrier.expect(q_full, Q_BYTES)
    mbarrier.expect(k_full, K_BYTES)
    mbarrier.expect(v_full, V_BYTES)
    if mask_desc is not None:
        mbarrier.expect(mask_full, MASK_BYTES)
    if PERSISTENT:
        first, step = gl.program_id(0), gl.num_programs(0)
        row_tile, head, batch = _item(first, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs, CAUSAL)
    else:
        first, step = 0, 1
        if CAUSAL:
            pair = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
            batch = divide(pair, per_heads)
            row_tile, head = row_tiles - 1 - gl.program_id(1), pair - batch * heads
        else:
            row_tile, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    gdc_wait()  # the set-up above overlaps with whatever ran before in the stream; it has now written its results
    if sequences is not None:
        number = gl.num_programs(0) - 1 - gl.program_id(0) if CAUSAL else gl.program_id(0)
        row_tile, batch = _tile_of(number, cu_seqlens_q, sequences, total_q, BLOCK_M, WARPS)
        head = gl.program_id(1)
    if SORTED:
        turns = _turns(seqused_k, cu_seqlens_k, divide(pairs, per_heads), longest_k, SORTED, WARPS)
        batch = _whose(turns, batch, SORTED, WARPS)
    seqlen_q, seqlen_k, first_q, first_k = longest_q, longest_k, 0, 0
    if cu_seqlens_q is not None:
        first_q, seqlen_q = _rows_of(cu_seqlens_q, batch, total_q, longest_q)
        first_k, seqlen_k = _rows_of(cu_seqlens_k, batch, total_k, longest_k)
        batch = 0
    elif seqused_k is not None:
        seqlen_k = _used(seqused_k, batch, longest_k)
    shift = seqlen_k - seqlen_q
    begin = 0
    if left is not None:
        begin, _ = _key_tiles(row_tile * BLOCK_M, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N, CAUSAL)
    exists = True
    if cu_seqlens_q is not None:  # the grid is made for the longest sequence, or for any lengths
        exists = row_tile * BLOCK_M < seqlen_q
        items = exists.to(gl.int32)
    row, key = row_tile * ROWS, begin * BLOCK_N
    length = gl.maximum(seqlen_k, 1) if RAGGED else seqlen_k
    if PACK_GQA > 1:
        tma_load(q_desc, [batch, head, row, 0, 0], q_full, q_box)
    else:
        _load(q_desc, batch, head, first_q, seqlen_q, longest_q, row, q_full, q_box, exists)
    _load(k_desc, batch, head // GROUP, first_k, length, longest_k, key, k_full, k_box, exists)
    if mask_desc is not None:
        mask_row = row if MASK_ROWS > 1 else 0
        tma_load(mask_desc, [batch * MASK_B, head * MASK_H, mask_row, key], mask_full, mask_box)
    _load(v_desc, batch, head // GROUP, first_k, length, longest_k, key, v_full, v_box, exists)
    # The next kernel's set-up may overlap in turn. Started now, its blocks would sit where ours still want to go
    # unless ours all fit with room to spare.
    if not LATE:
        gdc_launch_dependents()

    loads, turn = 0, 0  # of K, and of V, and of q: their parity is the phase of the barriers
    # A block that takes one item says so: else what follows the loop over key tiles has what it computes from the
    # thread alone kept in registers across that loop, which has none left. (With a mask the compiler needs more then.)
    for index in range(first, 1 if ONE_ITEM else items, step):
        row = row_tile * ROWS
        if seqused_k is not None:
            shift = seqlen_k - seqlen_q
        first_tile, tiles = _key_tiles(row, seqlen_k, shift, left, right, ROWS, BLOCK_N, CAUSAL)
        visible = seqlen_k  # keys that every row of this tile sees
        if CAUSAL:
            visible = gl.minimum(visible, row + shift + 1)
        whole = tiles  # tiles of BLOCK_N keys that hide none, where others come behind them
        if TAIL and (CAUSAL or RAGGED):
            whole = gl.maximum(visible - 1, 0) // BLOCK_N
        elif TAIL:
            whole = tiles - 1
        wide = whole  # all tiles of BLOCK_N keys
        if ENDS:
            wide += (seqlen_k - whole * BLOCK_N > TAIL).to(gl.int32)
            tiles = whole + 1
        elif TAIL and (CAUSAL or RAGGED):
            seen = gl.minimum(seqlen_k, row + shift + ROWS) if CAUSAL else seqlen_k
            tiles = whole + gl.maximum((seen - whole * BLOCK_N + TAIL - 1) // TAIL, 1)
        hidden = 0  # keys before this one are hidden from some row
        if left is not None:
            visible = gl.minimum(visible, row + shift + right + 1)
            hidden = row + BLOCK_M - 1 + shift - left
        more = False
        next_row_tile, next_head, next_batch = row_tile, head, batch
        if PERSISTENT:
            more = index + step < items
            next_row_tile, next_head, next_batch = _item(
                index + step, row_tiles, per_row_tiles, heads, per_heads, pairs, per_pairs, CAUSAL
            )
            if SORTED:
                next_batch = _whose(turns, next_batch, SORTED, WARPS)
            if seqused_k is not None:
                next_seqlen_k = _used(seqused_k, next_batch, longest_k, more)
        acc = gl.zeros([BLOCK_M, DV], gl.float32, O)
        if MORE_DV:
            more_acc = gl.zeros([BLOCK_M, MORE_DV], gl.float32, MORE_O)
        if BIAS:
            weight = gl.zeros([BLOCK_M, 8], gl.float32, L)
        m = gl.full([BLOCK_M], -float("inf"), gl.float32, gl.SliceLayout(1, S))
        l = gl.zeros([BLOCK_M, 8], gl.float32, L)  # noqa: E741
        mbarrier.wait(q_full, turn & 1)
        for part in gl.static_range(PARTS):  # whole tiles, with ENDS one that hides some, narrow ones: a copy each
            start = wide if part == NARROW else whole if part else first_tile
            stop = first_tile + 1 if SINGLE else tiles if part == NARROW else wide if part else whole
            for tile in range(start, stop):
                key = wide * BLOCK_N + (tile - wide) * TAIL if part == NARROW else tile * BLOCK_N
                load_key = key + TAIL if part == NARROW else (tile + 1) * BLOCK_N
                if TAIL and part == 0:  # a narrow one follows
                    last, refill, load_batch, load_head = False, True, batch, head // GROUP
                else:
                    last = tile + 1 == tiles
                    refill = more | (tile + 1 < tiles)
                    load_batch = gl.where(last, next_batch, batch)
                    load_head = gl.where(last, next_head, head) // GROUP
                    load_key = gl.where(last, 0, load_key)
                load_rows = length
                if PERSISTENT and seqused_k is not None:
                    load_rows = gl.maximum(gl.where(last, next_seqlen_k, seqlen_k), 1)
                mbarrier.wait(k_full, loads & 1)
                if STAYS and not SHORT:
                    block_barrier()  # every warp's product has read v
                scores = qk(q_tile, k_tile, TAIL if part == NARROW else BLOCK_N, D, MORE_D, WARPS)
                if STAYS and not SHORT:
                    _load(v_desc, batch, head // GROUP, first_k, length, longest_k, key, v_full, v_box, loads > 0)
                if mask_desc is not None:
                    mbarrier.wait(mask_full, loads & 1)
                    mask = mask_tile.load(S)
                s = warpgroup_mma_wait(0, deps=(scores,))
                if STAYS:
                    mbarrier.expect(k_full, K_BYTES, pred=refill)
                    if mask_desc is not None:
                        mbarrier.expect(mask_full, MASK_BYTES, pred=refill)
                    if PERSISTENT:
                        mbarrier.expect(q_full, Q_BYTES, pred=last & more)
                    block_barrier()  # every warp's product has read k, and q; every warp the mask
                    _load(k_desc, load_batch, load_head, first_k, load_rows, longest_k, load_key, k_full, k_box, refill)
                    if mask_desc is not None:
                        mask_row = gl.where(last, next_row_tile, row_tile) * BLOCK_M if MASK_ROWS > 1 else 0
                        at = [load_batch * MASK_B, gl.where(last, next_head, head) * MASK_H, mask_row, load_key]
                        tma_load(mask_desc, at, mask_full, mask_box, pred=refill)
                    if PERSISTENT:
                        next_row, load_q = next_row_tile * BLOCK_M, last & more
                        _load(q_desc, next_batch, next_head, 0, seqlen_q, seqlen_q, next_row, q_full, q_box, load_q)
                if NEGATE:
                    s = -s
                if cap is not None:  # tanh by exp2: tanh.approx is right to 11 bits only
                    s = cap - 2.0 * cap / (1.0 + gl.exp2(s * qk_scale))
                if mask_desc is not None:
                    s = apply_mask(s, mask, qk_scale if cap is None else 1.0, not HIDE_PAIRS)
                if (SINGLE and MASKED) or part:
                    s = hide(s, row, key, seqlen_k, shift, left, right, CAUSAL, PACK_GQA)
                elif MASKED and not TAIL:
                    if ((tile + 1) * BLOCK_N > visible) | (key < hidden):
                        s = hide(s, row, key, seqlen_k, shift, left, right, CAUSAL, PACK_GQA)
                if not STAYS:  # asked for with K: nothing to wait for, and no branch within the softmax
                    mbarrier.wait(v_full, loads & 1)
                unit = qk_scale if cap is None and not BIAS else LOG2E
                old_m = gl.convert_layout(m, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
                m, base = maximum(s, old_m, unit, SINGLE, EMPTY_ROWS, EXACT, SPREAD)
                SLICED: gl.constexpr = SLICES if s.shape[1] == BLOCK_N else 1
                s_parts = parts(s, SLICED)
                if HIDE_PAIRS:
                    mask_parts = parts(mask.broadcast_to(s.shape), SLICED)
                operands = ()  # of products under way
                for nth in gl.static_range(SLICED):
                    p, sums = weights(s_parts[nth], base, unit, L, EXACT)
                    if nth:
                        l += sums
                    else:
                        alpha = factor(old_m, base, EXACT)
                        l = sums if SINGLE else times(l, alpha) + sums  # noqa: E741
                        if not SINGLE:
                            acc = times(acc, alpha)
                            if MORE_DV:
                                more_acc = times(more_acc, alpha)
                            if BIAS:
                                weight = times(weight, alpha)
                    p = p.to(dtype)
                    if HIDE_PAIRS:
                        p = hide_pairs(p, mask_parts[nth])
                    if STAYS and nth == 0:
                        mbarrier.wait(v_full, loads & 1)
                        mbarrier.expect(v_full, V_BYTES, pred=refill)
                    values = v_tile.slice(nth * p.shape[1], p.shape[1], 0)
                    acc, read = product(p, values.slice(0, DV, 1), acc, O, SINGLE and nth == 0)
                    operands = operands + (read,)
                    if BIAS:
                        # Their sum as a product with ones: an addition less for each score, and the weights as they
                        # were rounded, all the same way where a row has nothing but fp16's lowest number.
                        weight, read = product(p, ones.slice(0, p.shape[1], 0), weight, L, SINGLE and nth == 0)
                        operands = operands + (read,)
                    if MORE_DV:
                        rest = values.slice(DV, MORE_DV, 1)
                        more_acc, read = product(p, rest, more_acc, MORE_O, SINGLE and nth == 0)
                        operands = operands + (read,)
                m = gl.convert_layout(m, gl.SliceLayout(1, S), assert_trivial=True)
                acc = warpgroup_mma_wait(0, deps=(acc,) + operands)[0]
                if BIAS:
                    weight = warpgroup_mma_wait(0, deps=(weight,) + operands)[0]
                if MORE_DV:
                    more_acc = warpgroup_mma_wait(0, deps=(more_acc,) + operands)[0]
                if SHORT:
                    block_barrier()  # every warp's product has read v
                    _load(v_desc, load_batch, load_head, first_k, load_rows, longest_k, load_key, v_full, v_box, refill)
                loads += 1

        if LATE:
            if not more:
                gdc_launch_dependents()
        total = gl.sum(l, 1)
        divisor = gl.max(weight, 1) if BIAS else total  # each column has the whole sum
        inverse = reciprocal(divisor)
        if PERSISTENT:
            tma.store_wait(0)  # the item before this one has left the buffer
        o_tile.slice(0, DV, 1).store(mean(acc, inverse, divisor, EMPTY_ROWS).to(dtype))
        if MORE_DV:
            o_tile.slice(DV, MORE_DV, 1).store(mean(more_acc, inverse, divisor, EMPTY_ROWS).to(dtype))
        fence_async_shared()
        if cu_seqlens_q is not None:
            tma_store(o_desc, [batch, head, first_q + seqlen_q, longest_q - seqlen_q + row, 0], o_box)
        else:
            tma_store(o_desc, [batch, head, row, 0, 0] if PACK_GQA > 1 else [batch, head, row, 0], o_box)
        if lse is not None:
            place = gl.arange(0, BLOCK_M, gl.SliceLayout(1, S))
            rows = row + place // PACK_GQA
            total = gl.convert_layout(total, gl.SliceLayout(1, S), assert_trivial=True)
            if cu_seqlens_q is not None:
                base = head.to(gl.int64) * total_q + first_q
            else:
                base = ((batch.to(gl.int64) * heads + head) * PACK_GQA + place % PACK_GQA) * seqlen_q
            gl.store(lse + base + rows, (m if EXACT else m * LN2) + gl.log(total), mask=rows < seqlen_q)
        row_tile, head, batch = next_row_tile, next_head, next_batch
        if PERSISTENT and seqused_k is not None:
            seqlen_k = next_seqlen_k
            length = gl.maximum(seqlen_k, 1)
        turn += 1
    tma.store_wait(0)
