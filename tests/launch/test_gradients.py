"""Gradients of every option: against finite differences, and the ways to torch's own kernels against the definition.

Those kernels run on GPUs only. Here stand-ins that read what their signatures say take their place, in fp64.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashcore
from flashcore import reference
from flashcore.core.target import A100, H100, L4
from flashcore.fast.attention_production import attention
from flashcore.launch import gradients
from flashcore.launch.arguments import Options
from flashcore.launch.gradients import Call

F64 = torch.float64


def make(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def holes(*shape: int, seed: int = 7) -> Tensor:
    """A bool mask that hides about a third, and the first row wholly."""
    mask = make(*shape, seed=seed) > -0.5
    mask[..., :1, :] = False
    return mask


def infinities(*shape: int, seed: int = 8) -> Tensor:
    return make(*shape, seed=seed).masked_fill(~holes(*shape), -torch.inf)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": (2, 1)},
    "window beyond the rows": {"window": (0, 0)},
    "causal window": {"window": (2, 5), "is_causal": True},
    "softcap": {"softcap": 1.5},
    "bool mask": {"attn_mask": holes(2, 1, 5, 7)},
    "mask of rows": {"attn_mask": make(7)},
    "mask with infinities": {"attn_mask": infinities(4, 5, 7)},
    "lengths": {"seqused_k": lengths(3, 9)},
    "no key": {"seqused_k": lengths(0, -4)},
    "causal lengths": {"seqused_k": lengths(3, 7), "is_causal": True},
    "everything": {
        "window": (4, 2), "softcap": 2.0, "attn_mask": make(1, 4, 1, 7), "seqused_k": lengths(6, 2), "scale": -0.4,
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", CALLS)
def test_every_option_of_both_orders(name: str, layout: str) -> None:
    """Of the output, of lse and of a mask of numbers, with rows that read nothing."""
    options = dict(CALLS[name])
    inputs = [make(2, 4, 5, 3, seed=1), make(2, 2, 7, 3, seed=2), make(2, 2, 7, 3, seed=3)]
    if layout == "bshd":
        inputs = [t.transpose(1, 2).contiguous() for t in inputs]
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.dtype == F64:
        inputs.append(mask)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = mask) -> tuple[Tensor, Tensor]:
        if bias is not None and bias.dtype == F64:  # finite differences of infinities are none
            bias = bias.where(mask.isfinite(), -torch.inf)
        out, lse = attention(q, k, v, attn_mask=bias, layout=layout, return_lse=True, **options)
        return out, lse.where(lse.isfinite(), 0.0)

    inputs = [t.where(t.isfinite(), 0.0).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


CU_Q, CU_K = lengths(0, 3, 3, 8), lengths(0, 5, 7, 9)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (1, 0), "softcap": 2.0}], ids=str)
def test_packed_sequences_of_both_orders(options: dict[str, Any]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flashcore.attention_varlen(q, k, v, CU_Q, CU_K, 5, 5, return_lse=True, **options)
        return out, lse.where(lse.isfinite(), 0.0)

    inputs = [t.requires_grad_() for t in (make(8, 4, 3, seed=1), make(9, 2, 3, seed=2), make(9, 2, 3, seed=3))]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_rows_of_no_sequence_have_no_gradient() -> None:
    q, k, v = (make(9, 2, 4, seed=i).requires_grad_() for i in range(3))
    cu = lengths(2, 4, 7)
    out = flashcore.attention_varlen(q, k, v, cu, cu, 3, 3)
    out.sum().backward()
    inside = [t.detach()[2:7].requires_grad_() for t in (q, k, v)]
    flashcore.attention_varlen(*inside, cu - 2, cu - 2, 3, 3).sum().backward()
    for t, part in zip((q, k, v), inside, strict=True):
        torch.testing.assert_close(t.grad[2:7], part.grad)
        assert not t.grad[:2].any() and not t.grad[7:].any()


def test_padding_that_is_not_read_does_not_reach_a_gradient() -> None:
    q, k, v = make(2, 2, 4, 3, seed=1), make(2, 2, 6, 3, seed=2), make(2, 2, 6, 3, seed=3)
    used = lengths(4, 0)
    poisoned = [t.clone() for t in (k, v)]
    for t in poisoned:
        t[0, :, 4:] = torch.nan
        t[1] = torch.inf
    grads = []
    for keys in ((k, v), poisoned):
        inputs = [t.clone().requires_grad_() for t in (q, *keys)]
        attention(*inputs, seqused_k=used).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for clean, got in zip(*grads, strict=True):
        assert torch.equal(clean, got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_have_the_dtypes_of_their_inputs(dtype: torch.dtype) -> None:
    inputs = [make(1, 2, 4, 8, seed=i, dtype=dtype).requires_grad_() for i in range(3)]
    mask = make(1, 1, 4, 4, seed=4, dtype=torch.float32).requires_grad_()
    attention(*inputs, attn_mask=mask).sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in (*inputs, mask)]
    reference.attention(*doubles[:3], attn_mask=doubles[3]).sum().backward()
    for t, want in zip((*inputs, mask), doubles, strict=True):
        assert t.grad.dtype == t.dtype
        torch.testing.assert_close(t.grad.double(), want.grad, rtol=1e-2, atol=2e-3)


def test_only_a_mask_that_asks_gets_a_gradient() -> None:
    q, k, v = (make(1, 2, 4, 8, seed=i).requires_grad_() for i in range(3))
    mask = make(4, 4, seed=5)
    attention(q, k, v, attn_mask=mask).sum().backward()
    assert mask.grad is None and q.grad is not None
    q, k, v = (t.detach() for t in (q, k, v))
    attention(q, k, v, attn_mask=mask.requires_grad_()).square().sum().backward()
    assert mask.grad is not None and mask.grad.any() and q.grad is None


# -- the ways to torch's kernels --------------------------------------------------------------------------------


def flash(
    grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, state, unused, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    """What aten::_flash_attention_backward computes: of [B, S, H, D], or [total, H, D] with cu_seqlens."""
    assert dropout == 0.0 and lse.is_contiguous() and all(t.stride(-1) == 1 for t in (grad_out, q, k, v, out))
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    if cu_q is None:
        parts = [((b,), (b,), lse[b]) for b in range(q.shape[0])]
        assert max_q == q.shape[1] and max_k == k.shape[1]
    else:
        bounds = [list(zip(cu.tolist(), cu.tolist()[1:], strict=False)) for cu in (cu_q, cu_k)]
        parts = [((slice(*a),), (slice(*b),), lse[:, slice(*a)]) for a, b in zip(*bounds, strict=True)]
    for rows, keys, row_lse in parts:
        lq, lk = q[rows].shape[0], k[keys].shape[0]
        diagonal = torch.arange(lq)[:, None] + lk - lq
        j = torch.arange(lk)
        right = 0 if is_causal else window_size_right
        hidden = torch.zeros(lq, lk, dtype=torch.bool)
        if window_size_left >= 0:
            hidden |= j < diagonal - window_size_left
        if right >= 0:
            hidden |= j > diagonal + right
        found = heads(grad_out[rows], q[rows], k[keys], v[keys], out[rows], row_lse, scale, hidden, 0.0)
        for into, at, part in zip(grads, (rows, keys, keys), found[:3], strict=True):
            into[at] = part
    return tuple(grads)


def efficient(
    grad_out, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, structure, wants_bias, *, scale
):
    """What aten::_efficient_attention_backward computes: of [B, S, H, D], as many key heads as query heads."""
    batch, rows, count, _ = q.shape
    keys = k.shape[1]
    assert dropout == 0.0 and cu_q is None and cu_k is None and (max_q, max_k) == (rows, keys)
    assert k.shape[2] == v.shape[2] == count and lse.shape == (batch, count, -(-rows // 32) * 32)
    if bias is not None:
        assert bias.shape == (batch, count, rows, keys) and bias.stride(-1) == 1 and bias.dtype == q.dtype
        assert all(s * bias.itemsize % 16 == 0 for s in bias.stride()[:-1])
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    if structure == 2:
        hidden |= torch.arange(keys) > torch.arange(rows)[:, None] + keys - rows
    grads = [
        heads(grad_out[b], q[b], k[b], v[b], out[b], lse[b, :, :rows], scale, hidden, 0.0 if bias is None else bias[b])
        for b in range(batch)
    ]
    grad_q, grad_k, grad_v, grad_bias = (torch.stack(g) for g in zip(*grads, strict=True))
    return grad_q, grad_k, grad_v, grad_bias if wants_bias else torch.empty(0)


def heads(grad_out, q, k, v, out, lse, scale, hidden, bias):
    """Gradients of one sequence, [S, H, D], from its output and log-sum-exp, as flash-attention derives them."""
    group = q.shape[1] // k.shape[1]
    g, q, k, v, out = (t.transpose(0, 1) for t in (grad_out, q, k, v, out))
    k, v = (t.repeat_interleave(group, 0) for t in (k, v))
    scores = ((q @ k.mT) * scale + bias).masked_fill(hidden, -torch.inf)
    lse = lse.where(lse != -torch.inf, 0.0).unsqueeze(-1)  # theirs of a row that reads nothing may be either infinity
    weights = (scores - lse).exp()
    grad_scores = weights * (g @ v.mT - (g * out).sum(-1, keepdim=True))
    grad_q, grad_k, grad_v = (grad_scores @ k) * scale, (grad_scores.mT @ q) * scale, weights.mT @ g
    grad_k, grad_v = (t.unflatten(0, (-1, group)).sum(1) for t in (grad_k, grad_v))
    return *(t.transpose(0, 1) for t in (grad_q, grad_k, grad_v)), grad_scores


@pytest.fixture
def kernels(monkeypatch):
    called = []

    def counted(function):
        def call(*args, **kwargs):
            called.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(gradients, "_flash_kernel", counted(flash))
    monkeypatch.setattr(gradients, "_efficient_kernel", counted(efficient))
    return called


ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("flash", {}),
    "causal": ("flash", {"is_causal": True}),
    "scale": ("flash", {"scale": -0.3}),
    "window": ("flash", {"window": (2, 1)}),
    "window without rows": ("flash", {"window": (0, -1), "is_causal": True}),
    "plain with another v": ("efficient", {"dim_v": 5}),
    "causal with another v": ("efficient", {"dim_v": 5, "is_causal": True}),
    "window with another v": ("efficient", {"dim_v": 5, "window": (2, 1)}),
    **{name: ("efficient", options) for name, options in CALLS.items() if "mask" in name or "length" in name},
    "no key": ("efficient", CALLS["no key"]),
    "causal bool mask": ("efficient", {"attn_mask": holes(1, 4, 5, 7), "is_causal": True}),
    "masked lengths": ("efficient", {"attn_mask": make(2, 1, 1, 1), "seqused_k": lengths(2, 7), "window": (3, 3)}),
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rows", [5, 9])
@pytest.mark.parametrize("name", ROUTED)
def test_torch_s_kernels_are_given_what_the_definition_says(kernels, name, rows, layout) -> None:
    how, options = ROUTED[name]
    options = dict(options)
    mask, used, dim_v = options.pop("attn_mask", None), options.pop("seqused_k", None), options.pop("dim_v", 4)
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = torch.cat([mask, mask], -2)[..., :rows, :]
    shapes = (2, 4, rows, 4), (2, 2, 7, 4), (2, 2, 7, dim_v)
    q, k, v = (make(*shape, seed=i) for i, shape in enumerate(shapes))
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out, lse = attention(q, k, v, attn_mask=mask, seqused_k=used, layout=layout, return_lse=True, **options)
    call = Call(Options(layout=layout, **options))
    wants = mask is not None and mask.dtype == F64
    given = (q, k, v, (mask, used), out, lse, make(*out.shape, seed=9).expand_as(out), None)
    with torch.no_grad():
        got = gradients.backward(call, how, *given, wants_mask=wants)
        want = gradients.backward(call, None, *given, wants_mask=wants)
    assert kernels == [how]
    assert (got[3] is None) == (not wants)
    for g, w, t in zip(got, want, (q, k, v, mask), strict=True):
        if w is not None:
            assert g.shape == t.shape
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (1, 1)}], ids=str)
def test_packed_sequences_by_torch_s_kernel(kernels, options) -> None:
    q, k, v = make(8, 4, 4, seed=1), make(9, 2, 4, seed=2), make(9, 2, 4, seed=3)
    out, lse = flashcore.attention_varlen(q, k, v, CU_Q, CU_K, 5, 5, return_lse=True, **options)
    call = Call(Options(**options), (5, 5))
    wrong = CU_Q.clone()
    wrong[-1] = 100  # clamped before the kernel sees it
    for cu_q in (CU_Q, wrong):
        given = (q, k, v, (cu_q, CU_K), out, lse, make(*out.shape, seed=9), None)
        with torch.no_grad():
            got, want = gradients.backward(call, "flash", *given), gradients.backward(call, None, *given)
        for g, w in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(g, w)
    assert kernels == ["flash"] * 2


def test_what_torch_s_kernels_do_not_compute_goes_by_definition(kernels) -> None:
    q, k, v = (make(1, 2, 5, 4, seed=i) for i in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    given = (Call(Options(return_lse=True)), "flash", q, k, v, (None, None), out, lse)
    with torch.no_grad():
        gradients.backward(*given, out, lse)  # a gradient of lse
        gradients.backward(*given, None, lse)
    gradients.backward(*given, out, None)  # a graph is being built: the second order
    assert kernels == []


def test_expanded_and_unaligned_gradients_are_copied_first(kernels) -> None:
    q, k, v = (make(1, 2, 5, 4, seed=i) for i in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    odd = torch.zeros(1, 2, 5, 5, dtype=F64)[..., 1:]
    for grad in (torch.ones((), dtype=F64).expand_as(out), odd):
        with torch.no_grad():
            gradients.backward(Call(Options()), "flash", q, k, v, (None, None), out, lse, grad, None)
    assert gradients._by_vectors(odd).is_contiguous() and gradients._by_vectors(q) is q


@pytest.mark.parametrize("target", [H100, A100, L4])
def test_routes(monkeypatch, target) -> None:
    monkeypatch.setattr(gradients.targets, "current", lambda index: target)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = torch.device("cuda", 0)

    def asked(dtype=torch.float16, dim=64, dim_v=None, mask=None, used=False, longest=None, **options):
        shapes = [(8, 4, d) for d in (dim, dim_v or dim)]
        q, v = (SimpleNamespace(device=cuda, dtype=dtype, shape=shape, numel=lambda: 1) for shape in shapes)
        lengths = SimpleNamespace(dtype=torch.int32)
        extra = (SimpleNamespace(dtype=mask) if mask else None, lengths if used else None)
        return gradients.route(Call(Options(**options), longest), q, q, v, (lengths, lengths) if longest else extra)

    assert asked() == asked(torch.bfloat16) == asked(window=(4, 4)) == asked(longest=(4, 4)) == "flash"
    assert asked(mask=torch.bool) == asked(mask=torch.float16) == asked(used=True) == asked(dim_v=32) == "efficient"
    assert asked(torch.float32) == asked(torch.float32, mask=torch.float32) == "efficient"
    assert asked(dim=256) == (None if target is L4 else "flash")
    definition = [
        {"softcap": 1.0}, {"mask": torch.float32}, {"dim": 60}, {"backend": "reference"}, {"longest": (0, 4)},
        {"longest": (4, 4), "dtype": torch.float32}, {"dtype": F64},
    ]  # fmt: skip
    assert [asked(**options) for options in definition] == [None] * len(definition)
    torch.use_deterministic_algorithms(True)
    try:
        assert asked() == "flash" and asked(mask=torch.bool) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradients.route(Call(Options()), *[torch.zeros(1, 1, 4, 8).half()] * 3, (None, None)) is None
