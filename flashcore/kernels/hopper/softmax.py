"""The softmax of the Hopper kernels, one tile of scores at a time: what hides scores, their maxima, the weights, and
what sums and output so far are multiplied by. No branch and no address depends on a score.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def hide(s, row, key, seqlen_k, shift, left, right, CAUSAL: gl.constexpr, PACK_GQA: gl.constexpr = 1):
    """-inf for keys past the end and those that a row does not see. PACK_GQA rows are one position.

    Columns by eights, of each of which a thread holds two: which eight is a constant in the instruction that compares,
    where whole columns would take a register each.
    """
    eights = gl.reshape(s, [s.shape[0], s.shape[1] // 8, 8])
    layout: gl.constexpr = eights.type.layout
    eight = gl.arange(0, s.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None] * 8
    column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    place = gl.arange(0, s.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    end = seqlen_k - key  # first hidden column
    if CAUSAL:  # the last position sees all keys, and rows past it are nobody's
        end = row + shift + 1 - key + place // PACK_GQA
    if left is not None:
        diagonal = row + shift - key + place
        end = gl.minimum(end, diagonal + right + 1)
        eights = gl.where(eight < diagonal - left - column, -float("inf"), eights)
    eights = gl.where(eight >= end - column, -float("inf"), eights)
    return gl.convert_layout(gl.reshape(eights, s.shape), s.type.layout, assert_trivial=True)


@gluon.jit
def apply_mask(s, mask, scale, HIDE: gl.constexpr):
    """bool: -inf where it is 0; else scale * s + mask, with HIDE -inf where the mask is, even if the score is NaN."""
    if mask.dtype == gl.int8:
        return gl.where(mask == 0, -float("inf"), s)
    else:
        bias = mask.to(gl.float32)
        s = s * scale + bias
        return gl.where(bias == -float("inf"), bias, s) if HIDE else s


@gluon.jit
def hide_pairs(p, bias):
    """0 where the bias is -inf, even if the weight is NaN: two weights in two instructions, where scores take three."""
    if bias.dtype == gl.float16:
        code: gl.constexpr = "{ .reg .b32 x; mov.b32 x, 0xFC00FC00; set.neu.u32.f16x2 x, $2, x; and.b32 $0, $1, x; }"
    else:
        code: gl.constexpr = "{ .reg .b32 x; mov.b32 x, 0xFF80FF80; set.neu.u32.bf16x2 x, $2, x; and.b32 $0, $1, x; }"
    return gl.inline_asm_elementwise(code, "=r,r,r", [p, bias], dtype=p.dtype, is_pure=True, pack=2)


@gluon.jit
def parts(x, PARTS: gl.constexpr):
    """[M, N] -> its columns in 1, 2, 4 ... parts, which are registers of the same thread."""
    m: gl.constexpr = x.shape[0]
    n: gl.constexpr = x.shape[1]
    if PARTS == 1:
        return (x,)
    else:
        first, last = gl.split(gl.permute(gl.reshape(x, [m, 2, n // 2]), (0, 2, 1)))
        return parts(first, PARTS // 2) + parts(last, PARTS // 2)


@gluon.jit
def _row_maxima(s, SPREAD: gl.constexpr):
    """A thread's columns one after the other, where each comparison waits for the one before; SPREAD: as four lists for
    each row, a few registers more.
    """
    if SPREAD:
        few = gl.max(gl.reshape(s, [s.shape[0], s.shape[1] // 16, 16]), 1)
        return gl.convert_layout(gl.max(few, 1), gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    else:
        return gl.max(s, 1)


@gluon.jit
def maximum(s, m, qk_scale, FIRST: gl.constexpr, EMPTY_ROWS: gl.constexpr, EXACT: gl.constexpr, SPREAD: gl.constexpr):
    """The running maximum m with a tile's scores, in units of log2, and what weights are taken relative to.

    EXACT: it is one of the scores, in units of e: they may be as low as bf16's or fp32's lowest finite number, where
    the rounding of their product with a factor is itself more than exp2 can take. SPREAD: as _row_maxima has it.
    """
    top = _row_maxima(s, SPREAD)
    new_m = top if EXACT else top * qk_scale
    if EMPTY_ROWS or not FIRST:  # -inf, too, where a bias hides nothing but NaN
        new_m = gl.maximum(m, new_m)
    base = new_m
    if EMPTY_ROWS:  # a row that has seen nothing yet: -inf - -inf is no number
        base = gl.where(new_m == -float("inf"), 0.0, new_m)
    return new_m, base


@gluon.jit
def weights(s, base, qk_scale, sums_layout: gl.constexpr, EXACT: gl.constexpr):
    """Scores -> weights in fp32, and their sums by row as _row_sums has them."""
    base = gl.convert_layout(base, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    p = gl.exp2((s - base[:, None]) * LOG2E if EXACT else s * qk_scale - base[:, None])
    return p, _row_sums(p, sums_layout)


@gluon.jit
def factor(m, base, EXACT: gl.constexpr):
    """What sums and output with the maximum m are to be multiplied by where they shall have `base`."""
    return gl.exp2((m - base) * LOG2E if EXACT else m - base)


@gluon.jit
def _row_sums(p, layout: gl.constexpr):
    """[M, N] -> [M, 8], summed within each thread: the lanes meet once, after the last tile."""
    m: gl.constexpr = p.shape[0]
    n: gl.constexpr = p.shape[1]
    return gl.convert_layout(gl.sum(gl.reshape(p, [m, n // 8, 8]), 1), layout, assert_trivial=True)


@gluon.jit
def times(x, row):
    """Each row of x times that row's factor."""
    layout: gl.constexpr = x.type.layout
    return x * gl.convert_layout(row, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]


@gluon.jit
def reciprocal(x):
    """1 / x as the MUFU has it, to a unit in the last place, where a division first sees to the subnormals and to what
    has a subnormal reciprocal: weights add up to 1 at least, or to 0.
    """
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def mean(acc, inverse, total, EMPTY_ROWS: gl.constexpr):
    """acc / total, and 0 in rows that saw no key."""
    layout: gl.constexpr = acc.type.layout
    out = times(acc, inverse)
    if EMPTY_ROWS:  # not by a factor of 0: what a tile holds in v beside what its rows may read can be NaN
        empty = gl.convert_layout(total == 0.0, gl.SliceLayout(1, layout), assert_trivial=True)
        out = gl.where(empty[:, None], 0.0, out)
    return out
