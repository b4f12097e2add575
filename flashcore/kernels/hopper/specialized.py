"""Attention forward on sm_90 for long sequences: warpgroups that share K and V, 64 query rows each.

Small blocks read K and V each for itself. From the L2 that takes power, which beside many keys a GPU is short of: at
its limit it lowers its clock. It takes time, too, above D=64, where few warpgroups fill an SM, and more of it where
rows lie across the L2's lines (D=48, 72 to 96) or end in half a sector (odd multiples of 8). Here a block fills an SM:

* four warpgroups up to D=64, each QK, softmax, PV in turn, of which each loads every fourth tile for all: a warp that
  does nothing else would have its registers from them, who need 128 a thread, all that there are for 16 warps;
* three, where four do not serve, in turn, too, beside a warp that loads: some other one always has products under way;
* two, where three would have too few items: each issues the next tile's QK and this tile's PV together, under whose
  products its softmax runs (FlashAttention-3, Shah et al. 2024).

A block stays for all its items, which are dealt in advance.
docs/design/hopper-log.md has the measurements. No branch and no address depends on a value of q, k or v.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention import held, product, qk
from .compat import aggregate, tma_load, tma_store
from .softmax import LN2, factor, hide, maximum, mean, parts, reciprocal, times, weights
from .work import Work

AHEAD = gl.constexpr(2)  # tiles that warpgroups load ahead of their own; the ring's others are how far one may lag


@aggregate
class Ring:
    """Tiles that are filled for `readers` warpgroups, who free them, one after the other; a turn counts them.

    A buffer's barriers complete once each time it is filled or freed, so that a turn tells its place: which buffer, and
    which phase of its barriers. Of a tile's columns COLUMNS + MORE are multiplied.
    """

    box: gl.shared_memory_descriptor  # [STAGES, 1, 1, rows, columns]
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    BYTES: gl.constexpr
    COLUMNS: gl.constexpr
    MORE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, box, full, empty, STAGES, BYTES, COLUMNS, MORE):
        self.box = box
        self.full = full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)
        self.BYTES = gl.constexpr(BYTES)
        self.COLUMNS = gl.constexpr(COLUMNS)
        self.MORE = gl.constexpr(MORE)

    @gluon.jit
    def prepare(self, readers: gl.constexpr):
        for i in gl.static_range(self.STAGES):
            mbarrier.init(self.full.index(i), count=1)
            mbarrier.init(self.empty.index(i), count=readers)

    @gluon.jit
    def place(self, turn):
        return turn % self.STAGES, (turn // self.STAGES) & 1

    @gluon.jit
    def after(self, place, turns: gl.constexpr = 1):
        """The place so many turns later, at most STAGES, without a division."""
        slot = place[0] + turns
        wraps = slot >= self.STAGES
        return gl.where(wraps, slot - self.STAGES, slot), gl.where(wraps, place[1] ^ 1, place[1])

    @gluon.jit
    def fill(self, turn, desc, batch, head, row):
        slot, _ = self.place(turn)
        self.wait_free(turn - self.STAGES, turn >= self.STAGES)
        mbarrier.expect(self.full.index(slot), self.BYTES)
        tma_load(desc, [batch, head, row, 0], self.full.index(slot), self.box.index(slot))

    @gluon.jit
    def fill_both(self, values, place, k_desc, v_desc, batch, head, row):
        """This ring's buffer and that of `values`, which has the same barriers."""
        full = self.full.index(place[0])
        mbarrier.wait(self.empty.index(place[0]), place[1] ^ 1)  # at once where nothing was filled before
        mbarrier.expect(full, self.BYTES + values.BYTES)
        tma_load(k_desc, [batch, head, row, 0], full, self.box.index(place[0]))
        tma_load(v_desc, [batch, head, row, 0], full, values.box.index(place[0]))

    @gluon.jit
    def wait(self, place, pred=True):
        mbarrier.wait(self.full.index(place[0]), place[1], pred=pred)

    @gluon.jit
    def free(self, place):
        mbarrier.arrive(self.empty.index(place[0]), count=1)

    @gluon.jit
    def wait_free(self, turn, pred=True):
        slot, phase = self.place(turn)
        mbarrier.wait(self.empty.index(slot), phase, pred=pred)

    @gluon.jit
    def tile(self, place):
        rows: gl.constexpr = self.box.shape[3]
        columns: gl.constexpr = self.box.shape[4]
        return self.box.index(place[0]).reshape([rows, columns])


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_box, q_full, keys, values, work):
    GROUPS: gl.constexpr = q_box.shape[0]
    ROWS: gl.constexpr = q_desc.block_shape[2]
    Q_BYTES: gl.constexpr = ROWS * q_desc.block_shape[3] * 2
    loads, turn = 0, 0
    while work.index(turn) < work.items:
        row_tile, head, batch = work.item(turn)
        row = row_tile * work.BLOCK_M
        tiles = work.keys(row + work.BLOCK_M)
        head_k = head // work.GROUP
        keys.fill(loads, k_desc, batch, head_k, 0)
        keys.wait_free(loads - 1, loads > 0)  # with them q of the item before was multiplied last
        for i in gl.static_range(GROUPS):
            mbarrier.expect(q_full.index(i), Q_BYTES)
            tma_load(q_desc, [batch, head, row + i * ROWS, 0], q_full.index(i), q_box.index(i))
        values.fill(loads, v_desc, batch, head_k, 0)
        for tile in range(1, tiles):
            keys.fill(loads + tile, k_desc, batch, head_k, tile * work.BLOCK_N)
            values.fill(loads + tile, v_desc, batch, head_k, tile * work.BLOCK_N)
        loads += tiles
        turn += 1


@gluon.jit
def _fetch_q(q_desc, q_box, q_full, turn, item, work, WHICH: gl.constexpr):
    """A warpgroup's own rows of the block's item at `turn`, if there is one."""
    ROWS: gl.constexpr = q_desc.block_shape[2]
    row_tile, head, batch = item
    exists = work.index(turn) < work.items
    row = (row_tile * q_box.shape[0] + WHICH) * ROWS
    mbarrier.expect(q_full.index(WHICH), ROWS * q_desc.block_shape[3] * 2, pred=exists)
    tma_load(q_desc, [batch, head, row, 0], q_full.index(WHICH), q_box.index(WHICH), pred=exists)


@gluon.jit
def _first(work, WHICH: gl.constexpr):
    """A warpgroup's cursor at the first tile that it loads: its number, counted over the block's items, the item's
    turn, its first key, the key head and the batch; causal also behind which key the item has no more tiles.
    """
    load, turn, row = gl.to_tensor(WHICH), gl.to_tensor(0), gl.to_tensor(WHICH * work.BLOCK_N)
    row_tile, head, batch = work.item(0)
    if work.CAUSAL:
        return _settled(load, turn, row, head // work.GROUP, batch, work.end(row_tile), work)
    else:  # an item has at least GROUPS tiles
        return load, turn, row, head // work.GROUP, batch


@gluon.jit
def _fetch(k_desc, v_desc, keys, values, place, cursor, work, GROUPS: gl.constexpr):
    """Fills the buffers at `place` with the tile at the cursor, whose next place it returns: behind the last item tile
    -1, which never comes.
    """
    load, turn, row, head, batch = cursor[:5]
    keys.fill_both(values, place, k_desc, v_desc, batch, head, row)
    load += GROUPS
    row += GROUPS * work.BLOCK_N
    if work.CAUSAL:
        return _settled(load, turn, row, head, batch, cursor[5], work)
    else:
        end = work.end(0)  # the same for all
        if row >= end:
            load, turn, row, head, batch, _ = _in_next_item(load, turn, row, end, work)
        return load, turn, row, head, batch


@gluon.jit
def _settled(load, turn, row, head, batch, end, work):
    """A causal cursor, in the item that has its tile: not every item has as many tiles as there are warpgroups."""
    while row >= end:
        load, turn, row, head, batch, end = _in_next_item(load, turn, row, end, work)
    return load, turn, row, head, batch, end


@gluon.jit
def _in_next_item(load, turn, row, end, work):
    row -= end
    turn += 1
    row_tile, head, batch = work.item(turn)
    load = gl.where(work.index(turn) < work.items, load, -1)
    return load, turn, row, head // work.GROUP, batch, work.end(row_tile)


@gluon.constexpr_function
def _sums(lse, k_box, v_box, groups):
    """Whether products with ones add up the weights, as these were rounded: at up to 64 columns, where instructions
    bind and not the tensor cores. An lse is the sum of what was not rounded.
    """
    return lse is None and max(k_box.shape[4], v_box.shape[4]) <= 64 and groups > 2


@gluon.constexpr_function
def _warpgroup(columns):
    """How the registers of a warpgroup hold a product with so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _scores(q_tile, keys, place):
    """q k^T of a tile; a promise, to be waited for."""
    rows: gl.constexpr = keys.box.shape[3]
    return qk(q_tile, keys.tile(place).permute((1, 0)), rows, keys.COLUMNS, keys.MORE, 4)


@gluon.jit
def _plus_values(acc, p, tile, values):
    """The parts of acc, and to each p times its columns of the tile; promises, and what is read meanwhile."""
    O: gl.constexpr = _warpgroup(values.COLUMNS)  # noqa: E741
    first, read = product(p, tile.slice(0, values.COLUMNS, 1), acc[0], O, False)
    if values.MORE:
        MORE_O: gl.constexpr = _warpgroup(values.MORE)
        more, again = product(p, tile.slice(values.COLUMNS, values.MORE, 1), acc[1], MORE_O, False)
        return (first, more), (read, again)
    else:
        return (first,), (read,)


@gluon.jit
def _arrived(acc, operands, values):
    """The parts of acc once all products are done."""
    done = warpgroup_mma_wait(0, deps=acc + operands)
    if values.MORE:
        return (done[0], done[1])
    else:
        return (done[0],)


@gluon.jit
def _rescaled(acc, alpha, values):
    """The parts of acc, each row times its factor."""
    first = times(acc[0], alpha)
    if values.MORE:
        return (first, times(acc[1], alpha))
    else:
        return (first,)


@gluon.jit
def _visible(s, tile, row, work, EVEN_N: gl.constexpr, NEGATE: gl.constexpr):
    """A tile's scores, -inf where a row does not see the key."""
    columns: gl.constexpr = s.shape[1]
    if NEGATE:
        s = -s
    if work.CAUSAL or not EVEN_N:
        shift = work.seqlen_k - work.seqlen_q
        visible = work.seqlen_k  # keys that every row of this tile sees
        if work.CAUSAL:
            visible = gl.minimum(visible, row + shift + 1)
        if (tile + 1) * columns > visible:
            s = hide(s, row, tile * columns, work.seqlen_k, shift, None, None, work.CAUSAL)
    return s


@gluon.jit
def _softmax(s, m, l, qk_scale, FIRST: gl.constexpr):
    """Scores of one tile -> weights in fp32, the running maximum m and sum l with it, and what the output so far is to
    be multiplied by (nothing to multiply when FIRST).
    """
    L: gl.constexpr = l.type.layout
    new_m, base = maximum(s, m, qk_scale, FIRST, False, False, True)
    p, sums = weights(s, base, qk_scale, L, False)
    alpha = factor(m, base, False)
    l = sums if FIRST else times(l, alpha) + sums  # noqa: E741
    return p, new_m, l, alpha


@gluon.jit
def _in_turn(
    q_tile, ones, k_desc, v_desc, keys, values, loads, place, cursor, tiles, row, acc, m, l, qk_scale, work,
    dtype: gl.constexpr, EVEN_N: gl.constexpr, NEGATE: gl.constexpr, SUMS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """PV takes a tile's keys in slices, each under the softmax of the next one: two, where a product with ones adds up
    the weights, or four. Beside so few columns an instruction less counts for more than a slice.
    """
    TOGETHER: gl.constexpr = GROUPS == 4  # K and V of a tile, which the warpgroups load
    SLICES: gl.constexpr = 2 if SUMS else 4
    KEYS: gl.constexpr = keys.box.shape[3] // SLICES
    L: gl.constexpr = l.type.layout
    for tile in range(tiles):
        if not TOGETHER:
            place = keys.place(loads)
        keys.wait(place)
        scores = _scores(q_tile, keys, place)
        if TOGETHER:
            if loads + AHEAD == cursor[0]:
                cursor = _fetch(k_desc, v_desc, keys, values, keys.after(place, AHEAD), cursor, work, GROUPS)
        s = warpgroup_mma_wait(0, deps=(scores,))
        if not TOGETHER:
            keys.free(place)
        s = _visible(s, tile, row, work, EVEN_N, NEGATE)
        new_m, base = maximum(s, m, qk_scale, False, False, False, False)
        s_parts = parts(s, SLICES)
        operands = ()  # of products under way
        for nth in gl.static_range(SLICES):
            p, sums = weights(s_parts[nth], base, qk_scale, L, False)
            if nth == 0:
                alpha = factor(m, base, False)
                m = new_m
                l = times(l, alpha) if SUMS else times(l, alpha) + sums  # noqa: E741
                acc = _rescaled(acc, alpha, values)
                if not TOGETHER:
                    values.wait(place)
            elif not SUMS:
                l += sums
            p = p.to(dtype)
            acc, read = _plus_values(acc, p, values.tile(place).slice(nth * KEYS, KEYS, 0), values)
            operands = operands + read
            if SUMS:
                l, again = product(p, ones, l, L, False)
                operands = operands + (again,)
        if SUMS:
            l = warpgroup_mma_wait(0, deps=(l,) + operands)[0]  # noqa: E741
        acc = _arrived(acc, operands, values)
        values.free(place)
        loads += 1
        if TOGETHER:
            place = keys.after(place)
    return acc, m, l, place, cursor


@gluon.jit
def _overlapped(
    q_tile, keys, values, loads, tiles, row, acc, m, l, qk_scale, work, dtype: gl.constexpr, EVEN_N: gl.constexpr,
    NEGATE: gl.constexpr,
):  # fmt: skip
    PRODUCTS: gl.constexpr = 2 if values.MORE else 1  # of PV
    keys.wait(keys.place(loads))
    s = warpgroup_mma_wait(0, deps=(_scores(q_tile, keys, keys.place(loads)),))
    keys.free(keys.place(loads))
    s = _visible(s, 0, row, work, EVEN_N, NEGATE)
    p, m, l, alpha = _softmax(s, m, l, qk_scale, True)
    p = p.to(dtype)
    keys.wait(keys.place(loads + 1), tiles > 1)
    for tile in range(1, tiles):
        scores = _scores(q_tile, keys, keys.place(loads + 1))
        values.wait(values.place(loads))
        sums, read = _plus_values(acc, p, values.tile(values.place(loads)), values)
        s = warpgroup_mma_wait(PRODUCTS, deps=(scores,))
        keys.free(keys.place(loads + 1))
        s = _visible(s, tile, row, work, EVEN_N, NEGATE)
        next_p, m, l, alpha = _softmax(s, m, l, qk_scale, False)
        # Here, not where the next tile is used: without a branch in front of it ptxas moves the wait for the products
        # up, ahead of the softmax that runs under them.
        keys.wait(keys.place(loads + 2), tile + 1 < tiles)
        acc = _arrived(sums, read + (next_p,), values)
        p = next_p.to(dtype)  # not before: PV still reads p's registers, and a copy into them costs more than waiting
        values.free(values.place(loads))
        acc = _rescaled(acc, alpha, values)
        loads += 1
    values.wait(values.place(loads))
    sums, read = _plus_values(acc, p, values.tile(values.place(loads)), values)
    acc = _arrived(sums, read, values)
    values.free(values.place(loads))
    return acc, m, l


@gluon.jit
def _consume(given, WHICH: gl.constexpr):
    """One warpgroup: rows WHICH * 64 on of each of the block's items."""
    (
        q_desc, k_desc, v_desc, o_desc, lse, q_box, q_full, o_box, ones_box, keys, values, work, qk_scale, EVEN_N,
        NEGATE,
    ) = given  # fmt: skip
    dtype: gl.constexpr = o_desc.dtype
    GROUPS: gl.constexpr = o_box.shape[0]
    ROWS: gl.constexpr = o_box.shape[3]
    S: gl.constexpr = _warpgroup(work.BLOCK_N)
    L: gl.constexpr = _warpgroup(8)
    SUMS: gl.constexpr = _sums(lse, keys.box, values.box, GROUPS)
    if GROUPS == 4 and SUMS and not work.CAUSAL:  # else no registers are left for it
        k_desc, v_desc = held(k_desc, v_desc, work.seqlen_k)
    q_tile = q_box.index(WHICH).reshape([ROWS, q_box.shape[4]])
    o_tile = o_box.index(WHICH)
    output = o_tile.reshape([ROWS, o_box.shape[4]])
    ones = ones_box.permute((1, 0))
    loads = 0
    place = keys.place(loads)
    turn = 0
    item = work.item(0)
    cursor = _first(work, WHICH)
    if GROUPS == 4:
        _fetch_q(q_desc, q_box, q_full, 0, item, work, WHICH)
        if WHICH < AHEAD:  # a block has that many tiles
            cursor = _fetch(k_desc, v_desc, keys, values, keys.place(WHICH), cursor, work, GROUPS)
    while work.index(turn) < work.items:
        row_tile, head, batch = item
        row = (row_tile * GROUPS + WHICH) * ROWS
        tiles = work.keys(row + ROWS)
        if GROUPS == 3:
            tiles = gl.where(row < work.seqlen_q, tiles, 0)  # a product of rows that are not there costs as much
        acc = (gl.zeros([ROWS, values.COLUMNS], gl.float32, _warpgroup(values.COLUMNS)),)
        if values.MORE:
            acc = acc + (gl.zeros([ROWS, values.MORE], gl.float32, _warpgroup(values.MORE)),)
        m = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S))
        l = gl.zeros([ROWS, 8], gl.float32, L)  # noqa: E741
        mbarrier.wait(q_full.index(WHICH), turn & 1)
        if GROUPS == 2:
            acc, m, l = _overlapped(
                q_tile, keys, values, loads, tiles, row, acc, m, l, qk_scale, work, dtype, EVEN_N, NEGATE
            )
        else:
            acc, m, l, place, cursor = _in_turn(
                q_tile, ones, k_desc, v_desc, keys, values, loads, place, cursor, tiles, row, acc, m, l, qk_scale,
                work, dtype, EVEN_N, NEGATE, SUMS, GROUPS,
            )  # fmt: skip
        loads += tiles
        if GROUPS == 4:
            item = work.item(turn + 1)
            _fetch_q(q_desc, q_box, q_full, turn + 1, item, work, WHICH)
        for _ in range(tiles, work.keys(row + (GROUPS - WHICH) * ROWS)):  # those that only other rows see
            if GROUPS < 4:
                place = keys.place(loads)
            keys.wait(place)
            if GROUPS == 4:
                if loads + AHEAD == cursor[0]:
                    cursor = _fetch(k_desc, v_desc, keys, values, keys.after(place, AHEAD), cursor, work, GROUPS)
            keys.free(place)
            if GROUPS < 4:
                values.wait(place)
                values.free(place)
            place = keys.after(place)
            loads += 1
        total = gl.max(l, 1) if SUMS else gl.sum(l, 1)  # with SUMS each column has the whole sum
        tma.store_wait(0)  # the item before this one has left the buffer
        inverse = reciprocal(total)
        output.slice(0, values.COLUMNS, 1).store(mean(acc[0], inverse, total, False).to(dtype))
        if values.MORE:
            output.slice(values.COLUMNS, values.MORE, 1).store(mean(acc[1], inverse, total, False).to(dtype))
        fence_async_shared()
        tma_store(o_desc, [batch, head, row, 0], o_tile)
        if lse is not None:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, S))
            total = gl.convert_layout(total, gl.SliceLayout(1, S), assert_trivial=True)
            base = (batch.to(gl.int64) * work.heads + head) * work.seqlen_q
            gl.store(lse + base + rows, m * LN2 + gl.log(total), mask=rows < work.seqlen_q)
        turn += 1
        if GROUPS < 4:
            item = work.item(turn)
    tma.store_wait(0)


@gluon.jit
def attention_forward_specialized(
    q_desc, k_desc, v_desc, o_desc, lse, qk_scale, longest_q, longest_k, row_tiles, heads, per_heads, together,
    per_together, cohort, per_cohort, items, blocks, per_blocks, shift,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, EVEN_N: gl.constexpr, NEGATE: gl.constexpr, D: gl.constexpr,
    MORE_D: gl.constexpr, DV: gl.constexpr, MORE_DV: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v as attention_forward has it, for problems without options of which every row sees some key.

    D + MORE_D and DV + MORE_DV: the columns of a box that are multiplied, in one part or two. GROUPS: warpgroups that
    compute; four also load. STAGES: buffers each for K and V. REGISTERS: of a thread that computes; what a warp that
    loads leaves goes to the first warpgroup. The boxes of q_desc and o_desc are one warpgroup's rows, row_tiles count a
    block's. together: heads, of all batches, whose items come together; cohort: these items. blocks: of the grid, for a
    register less than asking for it. shift: blocks by which items move on with each turn.
    """
    dtype: gl.constexpr = q_desc.dtype
    ROWS: gl.constexpr = q_desc.block_shape[2]
    BLOCK_N: gl.constexpr = k_desc.block_shape[2]
    BLOCK_D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[3]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_box = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    keys = Ring(
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER), STAGES, BLOCK_N * BLOCK_D * 2, D, MORE_D,
    )  # fmt: skip
    v_box = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], v_desc.layout)
    V_BYTES: gl.constexpr = BLOCK_N * BLOCK_DV * 2
    if GROUPS == 4:  # a tile's K and V come together, and are free when PV is done
        values = Ring(v_box, keys.full, keys.empty, STAGES, V_BYTES, DV, MORE_DV)
    else:
        values = Ring(
            v_box, gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER), STAGES, V_BYTES, DV, MORE_DV,
        )  # fmt: skip
        values.prepare(GROUPS)
    o_box = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, BLOCK_DV], o_desc.layout)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BLOCK_N // 2], dtype)  # for a slice of PV
    ones_box = gl.allocate_shared_memory(dtype, [8, BLOCK_N // 2], ONES)
    if _sums(lse, keys.box, v_box, GROUPS):
        ones_box.store(gl.full([8, BLOCK_N // 2], 1.0, dtype, gl.BlockedLayout([1, 8], [8, 4], [1, 4], [1, 0])))
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    keys.prepare(GROUPS)
    fence_async_shared()
    work = Work(
        gl.program_id(0), blocks, per_blocks, shift, items, row_tiles, heads, per_heads, together, per_together, cohort,
        per_cohort, longest_q, longest_k, GROUP, CAUSAL, GROUPS * ROWS, BLOCK_N,
    )  # fmt: skip
    gdc_wait()  # the set-up above overlaps with whatever ran before in the stream; it has now written its results
    gdc_launch_dependents()  # a next kernel's blocks find no room before ours end
    given = (
        q_desc, k_desc, v_desc, o_desc, lse, q_box, q_full, o_box, ones_box, keys, values, work, qk_scale, EVEN_N,
        NEGATE,
    )  # fmt: skip
    produced = (q_desc, k_desc, v_desc, q_box, q_full, keys, values, work)
    if GROUPS == 4:
        gl.warp_specialize(
            [(_consume, (given, 0)), (_consume, (given, 1)), (_consume, (given, 2)), (_consume, (given, 3))],
            [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip
    elif GROUPS == 3:
        gl.warp_specialize(
            [(_consume, (given, 0)), (_consume, (given, 1)), (_consume, (given, 2)), (_produce, produced)],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_consume, (given, 0)), (_consume, (given, 1)), (_produce, produced)], [4, 1], [REGISTERS, 24]
        )
