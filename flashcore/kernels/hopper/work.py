"""The items of a block that stays for all of them: rows of a head, one after the other."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .attention import divide
from .compat import aggregate


@aggregate
class Work:
    """Which items are a block's, and what an item is."""

    first: gl.tensor
    step: gl.tensor
    per_step: gl.tensor
    shift: gl.tensor
    items: gl.tensor
    row_tiles: gl.tensor
    heads: gl.tensor
    per_heads: gl.tensor
    together: gl.tensor
    per_together: gl.tensor
    cohort: gl.tensor
    per_cohort: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    GROUP: gl.constexpr
    CAUSAL: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, first, step, per_step, shift, items, row_tiles, heads, per_heads, together, per_together, cohort,
        per_cohort, seqlen_q, seqlen_k, GROUP, CAUSAL, BLOCK_M, BLOCK_N,
    ):  # fmt: skip
        self.first = first
        self.step = step
        self.per_step = per_step
        self.shift = shift
        self.items = items
        self.row_tiles = row_tiles
        self.heads = heads
        self.per_heads = per_heads
        self.together = together
        self.per_together = per_together
        self.cohort = cohort
        self.per_cohort = per_cohort
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.GROUP = gl.constexpr(GROUP)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)

    @gluon.jit
    def index(self, turn):
        """The block's item at `turn`. Items move on over the blocks by `shift` with each, so that long ones come to
        all, or where that is 0 to and fro: who had fewer keys in one has more in the next.
        """
        place = self.first
        there = (turn & 1) == 0
        if self.BLOCK_M < 256:  # four warpgroups have no registers left for it
            place += turn * self.shift
            place -= divide(place, self.per_step) * self.step
            there |= self.shift > 0
        return turn * self.step + gl.where(there, place, self.step - 1 - place)

    @gluon.jit
    def item(self, turn):
        """(row tile, head, batch). So many heads together as the launch says, then the next ones, batches outermost; of
        these causal the last rows first, which see the most keys, else the first ones: the last may be fewer.
        """
        index = self.index(turn)
        pair = divide(index, self.per_cohort)
        level = index - pair * self.cohort
        if self.CAUSAL or self.BLOCK_M < 256:
            place = level
            level = divide(place, self.per_together)
            pair = pair * self.together + place - level * self.together
        batch = divide(pair, self.per_heads)
        row_tile = self.row_tiles - 1 - level if self.CAUSAL else level
        return row_tile, pair - batch * self.heads, batch

    @gluon.jit
    def keys(self, end):
        """Tiles of keys that the rows before `end` see; at least one."""
        seen = self.seqlen_k
        if self.CAUSAL:
            seen = gl.minimum(seen, end + self.seqlen_k - self.seqlen_q)
        return gl.maximum((seen + self.BLOCK_N - 1) // self.BLOCK_N, 1)

    @gluon.jit
    def end(self, row_tile):
        """Behind the last tile of keys that an item's rows see."""
        return self.keys((row_tile + 1) * self.BLOCK_M) * self.BLOCK_N
