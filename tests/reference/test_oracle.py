"""The oracle against torch, against its own definition spelt out row by row, and at every edge of its conventions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashcore.reference import attention, cpu, oracle


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def qkv(b: int, hq: int, hkv: int, sq: int, sk: int, d: int, dv: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return normal(b, hq, sq, d, seed=1), normal(b, hkv, sk, d, seed=2), normal(b, hkv, sk, dv or d, seed=3)


def row_by_row(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None,
    window: tuple[int, int] = (-1, -1), softcap: float = 0.0, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition with Python loops: each row gathers the keys it reads, and nothing else takes part."""
    batch, heads, seqlen_q, dim = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, seqlen_q, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64)
    scale = dim**-0.5 if scale is None else scale
    for b in range(batch):
        length = k.shape[2] if seqused_k is None else min(max(int(seqused_k[b]), 0), k.shape[2])
        for h in range(heads):
            for i in range(seqlen_q):
                scores, values = [], []
                for j in range(length):
                    ahead = j - (i + length - seqlen_q)
                    if (is_causal and ahead > 0) or ahead > window[1] >= 0 or -ahead > window[0] >= 0:
                        continue
                    s = scale * float(q[b, h, i] @ k[b, h // group, j])
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    if attn_mask is not None:
                        m = attn_mask.expand(batch, heads, seqlen_q, k.shape[2])[b, h, i, j].item()
                        if m is False or m == -math.inf:
                            continue
                        s += 0.0 if m is True else m
                    scores.append(s)
                    values.append(v[b, h // group, j])
                if scores:
                    s = torch.tensor(scores, dtype=torch.float64)
                    out[b, h, i] = s.softmax(0) @ torch.stack(values)
                    lse[b, h, i] = s.logsumexp(0)
    return out, lse


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])  # torch 2.13 gives NaN for causal scales <= 0
def test_equals_torch(is_causal: bool, scale: float | None) -> None:
    q, k, v = qkv(2, 6, 2, 33, 33, 24)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, is_causal=is_causal, scale=scale), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 7, 9), (1, 4, 7, 9), (2, 1, 1, 9), (7, 9), (4, 1, 9), (1, 1, 7, 1)])
@pytest.mark.parametrize("kind", ["bool", "float", "half"])
def test_masks_equal_torch(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = qkv(2, 4, 2, 7, 9, 8)
    mask = normal(*shape)
    mask = mask > 0 if kind == "bool" else mask.half() if kind == "half" else mask.masked_fill(mask < -1, -torch.inf)
    theirs = mask if kind == "bool" else mask.double()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=theirs, enable_gqa=True).nan_to_num()
    torch.testing.assert_close(attention(q, k, v, attn_mask=mask), want, rtol=1e-11, atol=1e-12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, object]]:
    b, hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sq, sk = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    side = st.integers(-1, 5)
    options: dict[str, object] = {
        "is_causal": draw(st.booleans()),
        "window": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "scale": draw(st.sampled_from([None, 0.4, 0.0, -1.0])),
    }
    if draw(st.booleans()):
        options["seqused_k"] = torch.tensor(draw(st.lists(st.integers(-1, sk + 1), min_size=b, max_size=b)))
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        mask = normal(draw(st.sampled_from([1, b])), draw(st.sampled_from([1, hkv * group])), sq, sk, seed=7)
        options["attn_mask"] = mask > 0 if kind == "bool" else mask.masked_fill(mask < 0, -torch.inf)
    return qkv(b, hkv * group, hkv, sq, sk, 4, draw(st.sampled_from([2, 4]))), options


@given(problems())
@settings(max_examples=150)
def test_equals_its_definition(problem: tuple[tuple[Tensor, Tensor, Tensor], dict[str, object]]) -> None:
    inputs, options = problem
    same(attention(*inputs, return_lse=True, **options), row_by_row(*inputs, **options))  # type: ignore[call-overload]


@pytest.mark.parametrize("limit", [1, 50, 400, 3000])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    inputs = qkv(3, 4, 2, 13, 11, 8)
    options = {
        "window": (6, 2), "attn_mask": normal(3, 1, 13, 11) > -1, "seqused_k": torch.tensor([11, 4, 0]),
        "return_lse": True,
    }
    want = attention(*inputs, **options)
    monkeypatch.setattr(oracle, "BLOCK_SCORES", limit)
    same(attention(*inputs, **options), want)


def test_rows_without_keys_give_zero() -> None:
    q, k, v = qkv(2, 2, 2, 5, 3, 8)
    out, lse = attention(q, k, v, is_causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    assert (out[:, :, 2:] != 0).all() and lse[:, :, 2:].isfinite().all()
    nobody = torch.zeros(5, 3, dtype=torch.bool)
    for options in ({"attn_mask": nobody}, {"attn_mask": torch.full((3,), -torch.inf)}, {"seqused_k": torch.zeros(2)}):
        out, lse = attention(q, k, v, return_lse=True, **options)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_sizes(shape: tuple[int, int, int, int]) -> None:
    b, h, sq, sk = shape
    out, lse = attention(*qkv(b, h, h, sq, sk, 8), return_lse=True, is_causal=True, attn_mask=torch.ones(sq, sk) > 0)
    assert out.shape == (b, h, sq, 8) and lse.shape == (b, h, sq)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["q", "k", "v"])
def test_what_is_not_finite_stays_where_it_is_read(of: str, bad: float) -> None:
    clean = dict(zip("qkv", qkv(2, 4, 2, 9, 9, 8), strict=True))
    want = attention(**clean, is_causal=True)
    dirty = {name: t.clone() for name, t in clean.items()}
    head = 2 if of == "q" else 1
    dirty[of][1, head, 4] = bad
    got = attention(**dirty, is_causal=True)
    touched = torch.zeros_like(want, dtype=torch.bool)
    if of == "q":
        touched[1, 2, 4] = True
    else:  # rows from 4 on of both query heads that share the key head
        touched[1, 2:, 4:] = True
    assert torch.equal(got[~touched], want[~touched])
    if math.isnan(bad) or of == "v":
        assert not got[touched].isfinite().any()


@pytest.mark.parametrize("options", [
    {"seqused_k": torch.tensor([5, 2])},
    {"attn_mask": torch.tensor([True, True, False, False, False, True, False])},
    {"attn_mask": torch.tensor([0.0, 1.0, -torch.inf, -torch.inf, -torch.inf, 0.0, -torch.inf])},
    {"window": (0, 0)},
])  # fmt: skip
def test_hidden_keys_never_reach_an_output(options: dict[str, object]) -> None:
    q, k, v = qkv(2, 2, 1, 1, 7, 8)
    _, lse = attention(q, k, v, return_lse=True, **options)
    want = attention(q, k, v, **options)
    eye = torch.eye(7, dtype=torch.float64).expand(2, 1, 7, 7)
    unread = (attention(q, k, eye, **options) == 0).all(1).squeeze(-2)  # [B, Sk]
    assert unread.any()
    k[:, 0][unread], v[:, 0][unread] = math.nan, math.inf
    got, got_lse = attention(q, k, v, return_lse=True, **options)
    assert torch.equal(got, want) and torch.equal(got_lse, lse)


def test_lse_is_the_natural_logarithm_of_the_sum() -> None:
    q, k, v = qkv(1, 2, 2, 4, 6, 8)
    _, lse = attention(q, k, v, scale=0.5, return_lse=True)
    torch.testing.assert_close(lse, ((q @ k.mT) * 0.5).logsumexp(-1))


def test_gradients() -> None:
    options = {"window": (3, 1), "softcap": 2.0, "seqused_k": torch.tensor([4, 0]), "attn_mask": normal(1, 1, 3, 5)}
    q, k, v = (t.requires_grad_() for t in qkv(2, 2, 1, 3, 5, 3))
    assert torch.autograd.gradcheck(lambda *a: attention(*a, **options), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *a: attention(*a, **options, return_lse=True)[1].clamp(min=-50.0), (q, k, v)
    )
    (attention(q, k, v, is_causal=True)).sum().backward()  # Sq < Sk, and below Sq > Sk with rows that read nothing
    assert q.grad is not None and q.grad.isfinite().all()
    attention(k, q[:, :1], v[:, :, :3], is_causal=True).sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cpu_path(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in qkv(2, 4, 2, 17, 19, 16))
    want, want_lse = attention(q, k, v, return_lse=True)
    got, lse = cpu(q, k, v, return_lse=True)
    assert got.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half_ulp = max(torch.finfo(dtype).eps / 2, 1e-6 if dtype != torch.float64 else 0)
    torch.testing.assert_close(got.double(), want, rtol=1.01 * half_ulp, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    out = torch.full((2, 17, 4, 16), math.nan, dtype=dtype).transpose(1, 2)
    assert cpu(q, k, v, out=out) is out
    assert torch.equal(out, got)
