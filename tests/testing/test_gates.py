"""The gates pass an honest flash-attention algorithm on every family of inputs, and catch what is not honest.

The kernels themselves face the gates in tests/behaviour, their mutants in test_mutants.py; here the algorithm is
spelt out in torch, so that a gate can be told from a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashcore.reference import attention, oracle
from flashcore.testing import FAMILIES, Shape, Verdict, check, make, require
from flashcore.testing.gates import expect

FINITE = [name for name in FAMILIES if not name.startswith(("nan_", "inf_"))]
HALF = [torch.float16, torch.bfloat16]
LOG2E = 1.4426950408889634


def flash(
    q: Tensor, k: Tensor, v: Tensor, block_n: int = 64, *, is_causal: bool = False, scale: float | None = None,
    skip: int | None = None, narrow_weights: Callable[[Tensor], Tensor] | None = None,
    narrow_sum: Callable[[Tensor], Tensor] = lambda x: x, forget: str = "",
) -> tuple[Tensor, Tensor]:
    """Online softmax in fp32 over tiles of keys, weights rounded to the inputs' dtype; and ways to spoil it."""
    group, seqlen_q, seqlen_k = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    keys, values = (t.float().repeat_interleave(group, 1) for t in (k, v))
    scale = torch.tensor((q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E)
    narrow = narrow_weights or (lambda p: p.to(q.dtype).float())
    top = torch.full((*q.shape[:3], 1), -3e38)
    total, acc = torch.zeros_like(top), torch.zeros(*q.shape[:3], v.shape[-1])
    for start in range(0, seqlen_k, block_n):
        if skip is not None and start == skip:
            continue
        scores = q.float() @ keys[:, :, start : start + block_n].mT
        if is_causal:
            j = torch.arange(start, min(start + block_n, seqlen_k))
            scores = scores.masked_fill(j > torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, -torch.inf)
        new_top = top if forget == "maximum" and start else torch.maximum(top, scores.amax(-1, keepdim=True) * scale)
        weights = torch.exp2(torch.addcmul(-new_top.expand_as(scores), scores, scale))
        fade = torch.exp2(top - new_top)
        total = total * (1.0 if forget == "sum" else fade) + weights.sum(-1, keepdim=True)
        tile = narrow(weights) @ values[:, :, start : start + block_n]
        acc = narrow_sum(acc * (1.0 if forget == "acc" else fade) + tile)
        top = new_top
    out = torch.where(total == 0, 0.0, acc / total).to(q.dtype)
    return out, ((top + total.log2()) * math.log(2.0)).squeeze(-1)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    heads_kv = draw(st.integers(1, 2))
    return Shape(
        batch=draw(st.integers(1, 2)), heads_q=heads_kv * draw(st.integers(1, 2)), heads_kv=heads_kv,
        seqlen_q=draw(st.integers(1, 70)), seqlen_k=draw(st.integers(1, 150)), head_dim=8 * draw(st.integers(1, 16)),
    )


@given(
    shapes(), st.sampled_from(FINITE), st.sampled_from(HALF), st.sampled_from([16, 64]), st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200)
def test_an_honest_algorithm_passes(
    shape: Shape, family: str, dtype: torch.dtype, block_n: int, is_causal: bool, seed: int
) -> None:
    q, k, v = make(family, shape, dtype, seed=seed)
    out, lse = flash(q, k, v, block_n, is_causal=is_causal)
    require(out, q, k, v, lse=lse, is_causal=is_causal)


def test_rows_alike_with_scores_too_large_to_tell_apart() -> None:
    """The rounding of one weight in many rows: it does not average, and an honest kernel makes it."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for seed in range(40):
        q = (4e3 * torch.randn(1, 1, 1, 64, generator=generator)).half().expand(1, 1, 30, 64)
        k, v = (torch.randn(1, 1, 30, 64, generator=generator) for _ in "kv")
        k, v = (3e3 * k).half(), v.half()
        scores = (q.double() @ k.double().mT).float()
        scale = torch.tensor(0.125 / math.log(2.0))
        base = scores.amax(-1, keepdim=True) * scale
        weights = torch.exp2((scores.double() * scale.double() - base.double()).float())  # as one FFMA has it
        out = ((weights.half().double() @ v.double()).float() / weights.sum(-1, keepdim=True)).half()
        verdict = check(out, q, k, v)
        assert verdict.passed, (seed, verdict.failures)
        worst = max(worst, verdict.frobenius.value / verdict.frobenius.limit)
    assert worst > 1.5 / math.sqrt(3.0)  # some would have passed 1.5 floors


@pytest.mark.parametrize("number", [0.5125, 0.575, 0.7])
def test_fp32_sums_of_equal_numbers_err_alike(number: float) -> None:
    """Added one by one, each is rounded in the same direction: more than random roundings come to, and still honest."""
    keys, total = 1024, torch.zeros(())
    for _ in range(keys):
        total = total + torch.tensor(number)
    inputs = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, keys, 8), torch.full((1, 1, keys, 8), number)
    verdict = check((total / keys).expand(1, 1, 2, 8), *inputs)
    assert verdict.passed, verdict.failures
    assert verdict.frobenius.value > verdict.frobenius.limit / 2  # the limit for roundings at random


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("seqlen", [64, 256, 1024])
def test_the_limits_are_those_of_the_contract(dtype: torch.dtype, seqlen: int) -> None:
    """1.5 x 2.8e-4 for fp16 whatever the length, and eight times that for bf16."""
    q, k, v = make("independent", Shape(1, 2, seqlen, 64), dtype)
    verdict = check(flash(q, k, v)[0], q, k, v)
    unit = 1.0 if dtype == torch.float16 else 8.0
    assert verdict.frobenius.limit == pytest.approx(4.1e-4 * unit, rel=0.06)
    assert verdict.frobenius.value == pytest.approx(2.75e-4 * unit, rel=0.08)
    assert verdict.max_error.value < 0.8 * verdict.max_error.limit


def test_tensor_cores_are_no_fp32() -> None:
    """A path in fp32 passes; tensor cores that round its operands to the 11 bits of tf32 do not, nor one operand."""
    q, k, v = make("independent", Shape(1, 2, 128, 64, seqlen_k=1024), torch.float32)
    verdict = require(attention(q, k, v, compute_dtype=torch.float32), q, k, v)
    assert verdict.frobenius.value < 1e-6

    def tf32(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    for rounded in ((tf32(q), k, v), (q, tf32(k), v), (q, k, tf32(v))):
        out = attention(*rounded, compute_dtype=torch.float32)
        assert not check(out, q, k, v).passed


def e4m3(p: Tensor) -> Tensor:
    return p.to(torch.float8_e4m3fn).float()


FAULTS: dict[str, dict[str, object]] = {
    "weights in fp8": {"narrow_weights": e4m3},
    "accumulation in the inputs' dtype": {"narrow_sum": lambda x: x.half().float()},
    "1% of scale": {"scale": 0.125 * 1.01},
    "0.2% of scale": {"scale": 0.125 * 1.002},
    "one tile of keys skipped": {"skip": 64},
    "the last tile skipped": {"skip": 960},
    "accumulator not rescaled": {"forget": "acc"},
    "sum not rescaled": {"forget": "sum"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_allclose_alone_lets_pass(fault: str) -> None:
    q, k, v = make("independent", Shape(1, 2, 128, 64, seqlen_k=1024), torch.float16)
    verdict = check(flash(q, k, v, **FAULTS[fault])[0], q, k, v)  # type: ignore[arg-type]
    assert not verdict.passed
    assert not verdict.frobenius.passed


def test_a_maximum_that_goes_stale() -> None:
    """Without a new maximum the result is the same until the weights overflow fp16: only rising scores show it."""
    q, k, v = make("rising", Shape(1, 2, 128, 64, seqlen_k=1024), torch.float16)
    assert check(flash(q, k, v)[0], q, k, v).passed
    assert not check(flash(q, k, v, forget="maximum")[0], q, k, v).passed


# -- one wrong thing in a right result --------------------------------------------------------------------------


@pytest.fixture
def right() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, q, k, v of a causal problem whose first two rows read nothing."""
    q, k, v = make("independent", Shape(2, 4, 40, 32, heads_kv=2, seqlen_k=38), torch.float16)
    out, lse = flash(q, k, v, is_causal=True)
    require(out, q, k, v, lse=lse, is_causal=True)
    return out, lse, q, k, v


def spoil(right: tuple[Tensor, ...], at: tuple[int, ...], value: float, lse: bool = False) -> Verdict:
    out, row_lse, q, k, v = right
    (row_lse if lse else out)[at] = value
    verdict = check(out, q, k, v, lse=row_lse, is_causal=True)
    assert not verdict.passed and verdict.failures
    with pytest.raises(AssertionError, match="exceeds"):
        require(out, q, k, v, lse=row_lse, is_causal=True)
    return verdict


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1, 2, 39])
def test_an_element_that_is_not_finite(right: tuple[Tensor, ...], row: int, value: float) -> None:
    assert spoil(right, (1, 3, row, 31), value).non_finite.value == 1


def test_a_row_that_reads_nothing_is_exactly_zero(right: tuple[Tensor, ...]) -> None:
    assert spoil(right, (0, 0, 1, 5), 6e-8).non_finite.value == 1


def test_the_worst_row_is_named(right: tuple[Tensor, ...]) -> None:
    out = right[0]
    verdict = spoil(right, (1, 2, 17), 1.003 * out[1, 2, 17])  # type: ignore[arg-type]
    assert verdict.worst_row == (1, 2, 17)
    assert not verdict.row_ratio.passed and verdict.frobenius.passed


def test_two_rows_swapped(right: tuple[Tensor, ...]) -> None:
    out = right[0]
    out[0, 0, [30, 31]] = out[0, 0, [31, 30]]
    assert not check(out, *right[2:], is_causal=True).row_ratio.passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("row", [0, 20])
def test_lse(right: tuple[Tensor, ...], row: int, value: float) -> None:
    lse = right[1]
    if row == 0 and value == -math.inf:
        assert lse[0, 1, 0] == value
        return
    spoil(right, (0, 1, row), value, lse=True)


def test_lse_is_held_to_1e_5(right: tuple[Tensor, ...]) -> None:
    out, lse, q, k, v = right
    for factor, passes in ((1 + 5e-6, True), (1 + 4e-5, False), (LOG2E, False)):
        assert check(out, q, k, v, lse=lse * factor, is_causal=True).passed == passes


# -- NaN and infinity in the inputs -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FINITE])
def test_what_is_not_finite_belongs_where_it_is_read(family: str, is_causal: bool) -> None:
    q, k, v = make(family, Shape(2, 4, 24, 16, heads_kv=2), torch.float16, seed=3)
    want, lse = attention(q, k, v, is_causal=is_causal, return_lse=True)
    verdict = require(want.half(), q, k, v, lse=lse.float(), is_causal=is_causal)
    assert verdict.excused == 0 or (is_causal and family.endswith("_v"))
    everywhere = torch.full_like(want, math.nan).half()
    assert check(everywhere, q, k, v, is_causal=is_causal).non_finite.value > 0
    if family.startswith("nan") or family.endswith("_v"):
        hidden = check(want.nan_to_num(0.0, 0.0, 0.0).half(), q, k, v, is_causal=is_causal)
        assert hidden.non_finite.value == (~want.isfinite()).sum()


def test_zero_times_nan_is_excused_for_keys_of_the_sequence_alone() -> None:
    q, k, v = make("independent", Shape(1, 1, 16, 8), torch.float16)
    v[0, 0, 10, 3] = math.nan
    want = attention(q, k, v, is_causal=True).half()
    tile = want.clone()
    tile[0, 0, 8:10, 3] = math.nan  # rows above the diagonal that share a tile with it
    assert check(tile, q, k, v, is_causal=True).passed
    assert check(tile, q, k, v, is_causal=True).excused == 10
    tile[0, 0, 9, 4] = math.nan  # another column has no part in it
    assert check(tile, q, k, v, is_causal=True).non_finite.value == 1

    mask = torch.arange(16) != 10  # from every row
    hidden = attention(q, k, v, attn_mask=mask).half()
    hidden[0, 0, 2, 3] = math.nan
    assert check(hidden, q, k, v, attn_mask=mask).passed
    hidden[0, 0, 2, 4] = math.nan
    assert check(hidden, q, k, v, attn_mask=mask).non_finite.value == 1

    padded = torch.tensor([10])
    want = attention(q, k, v, seqused_k=padded).half()
    assert check(want, q, k, v, seqused_k=padded).passed
    want[0, 0, 2, 3] = math.nan
    assert check(want, q, k, v, seqused_k=padded).non_finite.value == 1


# -- the rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_expected_serves_any_number_of_results(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verdict is the one that `check` gives, to the last bit: what came before has no part in it."""
    q, k, v = make(family, Shape(2, 4, 24, 16, heads_kv=2, seqlen_k=30), torch.float16, seed=3)
    right, lse = (t.to(dtype) for t, dtype in zip(
        attention(q, k, v, is_causal=True, return_lse=True), (torch.float16, torch.float32), strict=True
    ))  # fmt: skip
    spoilt, unwritten = right.clone(), right.clone()
    spoilt[:, 1] *= 1.01
    unwritten[1, 2:, 20] = math.nan
    results = [(right, lse), (spoilt, lse), (right, 1.001 * lse + 0.01), (right, None), (unwritten, lse), (right, lse)]
    for limit in (oracle.BLOCK_SCORES, 2000):
        monkeypatch.setattr(oracle, "BLOCK_SCORES", limit)
        wanted = expect(q, k, v, torch.float16, is_causal=True)
        verdicts = [wanted.check(*result) for result in results]
        assert verdicts == [check(out, q, k, v, lse=lse, is_causal=True) for out, lse in results]
        assert [verdict.passed for verdict in verdicts] == [True, False, False, True, False, True]
    with pytest.raises(ValueError, match="out: expected"):
        wanted.check(right[:1])
    with pytest.raises(ValueError, match="lse: expected"):
        wanted.check(right, lse[:1])


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make("independent", Shape(3, 4, 30, 16, heads_kv=2), torch.float16)
    out, lse = flash(q, k, v)
    out[2, 3, 29] *= 1.01
    want = check(out, q, k, v, lse=lse)
    assert want.worst_row == (2, 3, 29)
    for limit in (100, 2000, 8000):
        monkeypatch.setattr(oracle, "BLOCK_SCORES", limit)
        got = check(out, q, k, v, lse=lse)
        assert got.worst_row == want.worst_row
        for a, b in zip(got.figures, want.figures, strict=True):
            assert (a.value, a.limit) == pytest.approx((b.value, b.limit), rel=1e-9)


@pytest.mark.parametrize("shape", [Shape(0, 2, 4, 8), Shape(2, 2, 0, 8, seqlen_k=4), Shape(2, 2, 4, 8, seqlen_k=0)])
def test_empty_sizes(shape: Shape) -> None:
    q, k, v = make("independent", shape)
    lse = torch.full(shape.q[:3], -torch.inf)
    require(torch.zeros(shape.q, dtype=torch.float16), q, k, v, lse=lse)
    if shape.batch and shape.seqlen_q:
        assert not check(torch.full(shape.q, 1e-7, dtype=torch.float16), q, k, v).passed
        assert not check(torch.zeros(shape.q, dtype=torch.float16), q, k, v, lse=lse + 1 / torch.zeros(())).passed


def test_fp32_is_held_to_fp32() -> None:
    q, k, v = make("independent", Shape(2, 2, 64, 32), torch.float32)
    out, lse = attention(q, k, v, return_lse=True, compute_dtype=torch.float32)
    require(out, q, k, v, lse=lse)
    assert not check(out * (1 + 1e-5), q, k, v).passed


def test_what_cannot_be_checked_is_refused() -> None:
    q, k, v = make("independent", Shape(1, 2, 4, 8))
    for wrong, match in ((q[:, :1], "out: expected"), (q.double(), "fp16, bf16 or fp32")):
        with pytest.raises(ValueError, match=match):
            check(wrong, q, k, v)
    with pytest.raises(ValueError, match="lse: expected"):
        check(q, q, k, v, lse=torch.zeros(1, 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FINITE)
def test_a_gpu_measures_what_the_cpu_does(family: str) -> None:
    q, k, v = make(family, Shape(2, 4, 70, 64, heads_kv=2, seqlen_k=90), torch.float16)
    out, lse = flash(q, k, v, is_causal=True)
    here = check(out, q, k, v, lse=lse, is_causal=True)
    there = check(out.cuda(), q.cuda(), k.cuda(), v.cuda(), lse=lse.cuda(), is_causal=True)
    assert there.passed and here.passed
    for a, b in zip(there.figures, here.figures, strict=True):
        assert (a.value, a.limit) == pytest.approx((b.value, b.limit), rel=1e-4, abs=1e-9)
