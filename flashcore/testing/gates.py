"""The error gates: is a result as good as its precision allows? Every limit is derived from the problem's own data.

An honest kernel makes four errors. It rounds its output to the dtype; it rounds the weights to the dtype before the
second matrix product, because that is what the tensor cores multiply; and it computes in fp32, scores and sums. Their
variances follow from the fp64 result, with u = 2**-digits, half the spacing of the dtype's numbers in [1, 2):

    output     ulp(out)^2 / 12                            a rounding error is uniform over one spacing
    weights    sum_j ulp(p_j)^2 / 12 * v_j^2 / l^2        p_j = exp(s_j - max s), l = sum_j p_j
    scores     sum_j (p_j / l)^2 * d_j^2 * (v_j - out)^2  d_j: fp32 sums err by about 2**-23 * scale * |q| |k_j|
    sums       4n * 2**-48 * ((sum_j p_j |v_j| / l)^2 + out^2)  half a spacing a key, in the output's sum and in l, and
                                                          twice: sums of like numbers err alike, not at random

d_j holds 2**-23 for the exponential as well, and softcap * 2**-23 where the score is a difference of numbers as large
as the cap. The sum of the four is `floor^2`, element by element. For N(0, 1) inputs of any length floor is 2.5e-4 to
2.9e-4 of the output in fp16 and 8 times that in bf16; output and weights take about equal parts and the others next to
none, while in fp32 they take the most. It widens by itself where a problem is ill-conditioned: cancelling values,
weights in the subnormal range, logits of 1e4 and beyond, near ties between large scores.

    allclose     |error| <= 2e-3 + 1e-3 * |reference|, the tolerance users know, or 6 floor where the floor is higher
    frobenius    norm of the error <= 1.5 floors: 4.2e-4 of the output in fp16 (see `_frobenius_limit` for few
                 rows, and for large scores)
    max_error    largest error <= 2x that of a plain path in the same dtype (flash-attention's rule): scores, softmax
                 and product each rounded to it; or 2x the largest floor times sqrt(3), the end of a uniform error
    row_ratio    the worst row: norm of its error <= 4 floors
    lse          |error| <= 1e-5 * max(1, |lse|), or 8 d where the scores' own error is larger
    non_finite   elements that are NaN or infinite where the reference is finite or the reverse, and rows without
                 a key that are not exactly 0 (lse: -inf): none

Where v is NaN or infinite in a key of the sequence, a row from which causality, a window or a mask hides that key may
go either way: its weight is 0, and 0 * NaN is NaN on a tensor core. Those elements are excused and counted. A key
beyond the sequence's length excuses nothing, nor does NaN in q or k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcore.reference.oracle import Block, blocks

ALLCLOSE_RTOL, ALLCLOSE_ATOL = 1e-3, 2e-3
FROBENIUS_LIMIT = 1.5
ROW_LIMIT = 4.0
LSE_TOLERANCE = 1e-5

_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}
# Below these a spacing shrinks no more: fp16's subnormals, and fp32's smallest normal, where GPUs flush to zero.
_LEAST_ULP = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-125, torch.float32: 2.0**-125}
_FP32_SUM = 2.0**-23


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure and the limit it must not pass."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN is above every limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} {'<=' if self.passed else 'exceeds'} {self.limit:.3g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates measured. Errors are against the fp64 reference."""

    allclose: Figure  # largest |error| / its tolerance
    frobenius: Figure  # norm of the error / norm of the reference
    max_error: Figure
    row_ratio: Figure  # error of the worst row / its floor
    lse: Figure  # largest |error| / tolerance, 0 when there is no lse to check
    non_finite: Figure  # number of elements
    excused: int  # elements that were not judged
    worst_row: tuple[int, int, int]  # batch, query head, row of row_ratio

    @property
    def figures(self) -> tuple[Figure, ...]:
        return self.non_finite, self.allclose, self.frobenius, self.max_error, self.row_ratio, self.lse

    @property
    def passed(self) -> bool:
        return all(figure.passed for figure in self.figures)

    @property
    def failures(self) -> str:
        """The figures that passed their limit, "" when none did."""
        return "; ".join(str(figure) for figure in self.figures if not figure.passed)

    def __str__(self) -> str:
        text = "; ".join(str(figure) for figure in self.figures)
        return f"{'passed' if self.passed else 'FAILED'}: {text}; worst row {self.worst_row}; {self.excused} excused"


@dataclass(frozen=True, slots=True)
class Expected:
    """What is right for one problem, and how far from it a result may be: no result has a part in it."""

    shape: tuple[int, ...]  # of the output
    parts: Iterable[_Part]  # those of `check` are computed one by one, and forgotten

    def check(self, out: Tensor, lse: Tensor | None = None) -> Verdict:
        """`check` of one result of the problem, which is on the device of its inputs; synchronises at the end."""
        shape = self.shape
        if out.shape != shape:
            raise ValueError(f"out: expected {tuple(shape)}, got {tuple(out.shape)}")
        if lse is not None and lse.shape != shape[:3]:
            raise ValueError(f"lse: expected {tuple(shape[:3])}, got {tuple(lse.shape)}")
        measured = [part.measure(out, lse) for part in self.parts]
        return _verdict(torch.stack(measured).tolist() if measured else [])


def expect(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, *, is_causal: bool = False, scale: float | None = None,
    window: tuple[int, int] = (-1, -1), softcap: float = 0.0, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Expected:
    """What `check` compares a result in `dtype` with, computed once for any number of results; arguments as for it."""
    parts = _parts(
        q, k, v, dtype, is_causal=is_causal, scale=scale, window=window, softcap=softcap, attn_mask=attn_mask,
        seqused_k=seqused_k,
    )
    return Expected((*q.shape[:3], v.shape[-1]), tuple(parts))


def check(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, lse: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,
) -> Verdict:
    """Measure `out`, and `lse` when given, against every gate; synchronises once a block and at the end.

    Args:
        out: [B, Hq, Sq, Dv] in fp16, bf16 or fp32, which sets the precision that is expected of it. Fill it with NaN
            before the kernel runs: an element that it leaves unwritten then fails.
        q, k, v: what the kernel read, [B, H, S, D].
        lse: [B, Hq, Sq], natural logarithm.
        is_causal, scale, window, softcap, attn_mask, seqused_k: as for `flashcore.reference.attention`.

    Raises:
        ValueError: out or lse of another shape, or a dtype without gates.
    """
    parts = _parts(
        q, k, v, out.dtype, is_causal=is_causal, scale=scale, window=window, softcap=softcap, attn_mask=attn_mask,
        seqused_k=seqused_k,
    )
    return Expected((*q.shape[:3], v.shape[-1]), parts).check(out, lse)


def require(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, lse: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,
) -> Verdict:
    """`check`, and an AssertionError with every figure when a gate fails."""
    verdict = check(
        out, q, k, v, lse=lse, is_causal=is_causal, scale=scale, window=window, softcap=softcap, attn_mask=attn_mask,
        seqused_k=seqused_k,
    )
    if not verdict.passed:
        raise AssertionError(
            f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {out.dtype}: {verdict.failures}"
            f"\n{verdict}"
        )
    return verdict


@dataclass(frozen=True, slots=True)
class _Part:
    """What is right for one block, in fp64, and its own figures. Elements are [b, h, group, rows, Dv]."""

    at: tuple[slice, slice, slice]  # batch, query heads and rows
    group: int
    reference: Tensor
    finite: Tensor  # elements
    nothing: Tensor  # rows without a key, [.., rows, 1]
    excused: Tensor  # elements
    tolerance: Tensor  # of elements
    floor2: Tensor  # of rows, [.., rows]
    lse: Tensor  # [.., rows]
    lse_tolerance: Tensor  # [.., rows]
    sums: tuple[Tensor, ...]  # of reference^2, floor^2, floor^4, floor^2 of rows alike; number of excused elements
    tops: tuple[Tensor, ...]  # largest error of the plain path, largest floor

    def measure(self, out: Tensor, lse: Tensor | None) -> Tensor:
        """The figures of this block of a result, as one fp64 vector on its device."""
        out = self._pick(out).double()
        finite, judged = out.isfinite(), ~self.excused
        wrong = judged & ((finite != self.finite) | (self.nothing & (out != 0)))
        error2 = (out - self.reference).masked_fill(~(judged & finite & self.finite), 0.0).square_()
        row_ratio2 = (error2.sum(-1) / self.floor2).nan_to_num_(0.0)  # 0 / 0: nothing of the row is judged
        worst = row_ratio2.argmax()
        place = torch.unravel_index(worst, row_ratio2.shape)  # in the block: batch, key head, head of its group, row
        lse_ratio, wrong_lse = self._measure_lse(lse)
        batch, heads, rows = self.at
        reference2, *floors, excused = self.sums
        figures = (
            error2.sum(), reference2, *floors, wrong.sum() + wrong_lse, excused,
            (error2.sqrt() / self.tolerance).max(), error2.max().sqrt(), *self.tops, lse_ratio,
            row_ratio2.flatten()[worst].sqrt(),
            batch.start + place[0], heads.start + place[1] * self.group + place[2], rows.start + place[3],
        )  # fmt: skip
        return torch.stack([figure.double() for figure in figures])

    def _measure_lse(self, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """(largest error / tolerance, number of elements that are finite, -inf or neither where they should not be)."""
        want = self.lse
        if lse is None:
            return want.new_zeros(()), want.new_zeros(())
        lse = self._pick(lse).double()
        finite, nothing = want.isfinite(), want == -torch.inf
        wrong = (lse.isfinite() != finite) | ((lse == -torch.inf) != nothing)
        ratio = ((lse - want).abs() / self.lse_tolerance).masked_fill(~finite | wrong, 0.0)
        return ratio.max(), wrong.sum()

    def _pick(self, tensor: Tensor) -> Tensor:
        """This block of a [B, Hq, Sq, ...] tensor, as [b, h, group, rows, ...]."""
        part: Tensor = tensor[self.at].unflatten(1, (-1, self.group))
        return part


def _parts(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, *, scale: float | None, softcap: float, **options: Any
) -> Iterator[_Part]:
    if dtype not in _DIGITS:
        raise ValueError(f"out: expected fp16, bf16 or fp32, got {dtype}")
    size = q.shape[-1] ** -0.5 if scale is None else scale
    for block in blocks(q, k, v, scale=scale, softcap=softcap, **options):
        yield _part(block, dtype, size, softcap)


def _part(block: Block, dtype: torch.dtype, scale: float, softcap: float) -> _Part:
    weights, sums, lse = block.softmax()
    reference = block.weigh(weights) / sums
    nothing = lse == -torch.inf
    v = block.v if block.v_is_finite else block.v.nan_to_num(0.0, 0.0, 0.0)
    score_error, lean = _score_error(block, sums, lse, scale)
    told_apart = score_error < 2.0 ** -_DIGITS[dtype] / 4.0
    largest = weights == 1.0
    floor2 = _floor2(block, weights, sums, reference, score_error, largest & told_apart, lean, v, dtype, softcap)
    alike = (largest & ~told_apart).any(-1)

    finite = reference.isfinite()
    excused = torch.zeros_like(finite) if block.v_is_finite else _excused(block) & finite & ~nothing
    unjudged = ~finite | excused
    reference2 = reference.masked_fill(unjudged, 0.0).square_()
    floor2.masked_fill_(unjudged, 0.0)
    plain_error = (_plain(block, v, dtype) - reference).masked_fill_(unjudged, 0.0)
    plain_error.masked_fill_(~plain_error.isfinite(), 0.0)
    row_floor2 = floor2.sum(-1)
    lse = lse.squeeze(-1)
    return _Part(
        at=(block.batch, block.heads_q, block.rows), group=block.group, reference=reference, finite=finite,
        nothing=nothing, excused=excused, floor2=row_floor2, lse=lse,
        tolerance=torch.maximum(ALLCLOSE_ATOL + ALLCLOSE_RTOL * reference2.sqrt(), 6.0 * floor2.sqrt()),
        lse_tolerance=torch.maximum(LSE_TOLERANCE * lse.abs().clamp(min=1.0), 8.0 * (lean * score_error).amax(-1)),
        sums=(
            reference2.sum(), row_floor2.sum(), row_floor2.square().sum(), row_floor2[alike].sum(), excused.sum()
        ),
        tops=(plain_error.abs().max(), floor2.max().sqrt()),
    )  # fmt: skip


def _score_error(block: Block, sums: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """How far fp32 may be off at each score, and each key's weight if its score erred upwards; [.., rows, Sk].

    A key whose score is within its error of the row's largest counts as if it were the largest.
    """
    scores = block.scores
    size = abs(scale) * block.q.norm(dim=-1, keepdim=True) * block.k.norm(dim=-1)[:, :, None, None, :]
    error = size.add_(scores.abs()).mul_(_FP32_SUM).masked_fill_(scores == -torch.inf, 0.0)
    top = (lse - sums.log()).nan_to_num(0.0, 0.0, 0.0)
    return error, (scores - top).add_(8.0 * error).clamp_(max=0.0).exp_()


def _floor2(
    block: Block, weights: Tensor, sums: Tensor, reference: Tensor, score_error: Tensor, exact: Tensor,
    lean: Tensor, v: Tensor, dtype: torch.dtype, softcap: float,
) -> Tensor:
    """Variance of an honest kernel's error, element by element: the sum in this module's docstring.

    `exact` are the weights without rounding: exp2(s * scale - max) of the largest score is 1, as long as the product's
    own rounding is small.
    """
    rounding = torch.minimum(_ulp(weights, dtype).square_().div_(12.0), weights.square())
    rounding = rounding.masked_fill_(exact, 0.0).div_(sums.square())
    wobble = (score_error + _FP32_SUM * (1.0 + softcap)).clamp_(max=1.0).mul_(lean / sums).square_()
    values = block.times(rounding.add_(wobble), v.square())
    values -= 2.0 * reference * block.times(wobble, v)
    values += reference.square() * wobble.sum(-1, keepdim=True)
    keys = (block.scores > -torch.inf).sum(-1, keepdim=True)
    values += keys * _FP32_SUM**2 * ((block.times(weights, v.abs()) / sums).square() + reference.square())
    return values.clamp_(min=0.0) + _ulp(reference, dtype).square_() / 12.0


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype`'s numbers at each fp64 x: x's exponent bits alone are the power of two below it."""
    power = (x.contiguous().view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return power.mul_(2.0 ** (1 - _DIGITS[dtype])).clamp_(min=_LEAST_ULP[dtype])


def _plain(block: Block, v: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(scores) @ v with every step rounded to `dtype`, as torch's math path computes it; fp64 to compare."""
    weights = block.scores.to(dtype).float().softmax(-1).to(dtype).float()
    return block.times(weights, v).to(dtype).double()


def _excused(block: Block) -> Tensor:
    """Elements whose row is kept from a key of its sequence, where v is not finite in it."""
    visible = block.masking.visible(block.batch, block.heads_kv, block.rows)
    if visible is None:
        return torch.zeros((), dtype=torch.bool, device=block.v.device)
    in_use = block.masking.in_use(block.batch)
    hidden = ~visible if in_use is None else in_use & ~visible
    return block.times(hidden.expand(block.scores.shape).double(), ~block.v.isfinite()) > 0


def _verdict(measured: list[list[float]]) -> Verdict:
    sums = [sum(block[i] for block in measured) for i in range(7)]
    error2, reference2, floor2, floor4, alike2, non_finite, excused = sums
    tops = [max((block[i] for block in measured), default=0.0) for i in range(7, 13)]
    allclose, max_error, plain_error, floor, lse, row_ratio = tops
    worst = max(measured, key=lambda block: block[12], default=[0.0] * 16)[13:]
    norm = math.sqrt(reference2) or 1.0
    return Verdict(
        allclose=Figure("allclose", allclose, 1.0),
        frobenius=Figure("frobenius", math.sqrt(error2) / norm, _frobenius_limit(floor2, floor4, alike2) / norm),
        max_error=Figure("max_error", max_error, 2.0 * max(plain_error, math.sqrt(3.0) * floor)),
        row_ratio=Figure("row_ratio", row_ratio, ROW_LIMIT),
        lse=Figure("lse", lse, 1.0),
        non_finite=Figure("non_finite", non_finite, 0.0),
        excused=int(excused),
        worst_row=(int(worst[0]), int(worst[1]), int(worst[2])),
    )


def _frobenius_limit(floor2: float, floor4: float, alike2: float) -> float:
    """Limit of the error's norm. 1.5 floors, where enough rows take part for their errors to average.

    The square of a uniform error has mean 1 and variance 0.8 in floors: over n rows six standard deviations end at
    1 + 6 * sqrt(0.8 / n), which is below 1.5**2 from 19 rows on. Rows count by their share of the floor.

    `alike2` is the part of rows whose largest weight is not just 1, as fp32 can't tell so large scores apart. What that
    weight's rounding makes of a row is the same in all of it, and in other rows of like queries: it does not average,
    and ends at sqrt(3) floors.
    """
    if floor4 == 0.0:
        return 0.0
    rows = floor2 * floor2 / floor4
    averaged = max(FROBENIUS_LIMIT**2, 1.0 + 6.0 * math.sqrt(0.8 / rows))
    return math.sqrt(averaged * (floor2 - alike2) + max(averaged, 3.0) * alike2)
