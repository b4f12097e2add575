"""torch.ops.flashcore: what PyTorch itself demands of a registered operator, and the gradients."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from flashcore import attention_varlen, reference
from flashcore.fast.attention_production import attention
from flashcore.launch import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device, *shape, dtype=torch.float16, requires_grad=False, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).requires_grad_(requires_grad)


def qkv(device, heads_kv=4, seqlen_k=24, requires_grad=False, dtype=torch.float16):
    return (
        make(device, 2, 4, 24, 16, seed=1, requires_grad=requires_grad, dtype=dtype),
        make(device, 2, heads_kv, seqlen_k, 16, seed=2, requires_grad=requires_grad, dtype=dtype),
        make(device, 2, heads_kv, seqlen_k, 16, seed=3, requires_grad=requires_grad, dtype=dtype),
    )


def packed(device, requires_grad=False, dtype=torch.float16):
    q, k, v = (make(device, 12, heads, 16, seed=heads, requires_grad=requires_grad, dtype=dtype) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 5, 5, 12], dtype=torch.int32, device=device)
    return q, k, v, cu_seqlens, cu_seqlens, 7, 7


OPTIONS = [
    {}, {"is_causal": True}, {"return_lse": True}, {"scale": 0.3, "is_causal": True, "return_lse": True},
    {"window": (4, 0), "softcap": 5.0},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14's own check reads it
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, options, requires_grad):
    opcheck(ops.attention, qkv(device, requires_grad=requires_grad), options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_opcheck_out(device, options):
    q, k, v = qkv(device)
    opcheck(ops.attention_out, (q, k, v, torch.empty_like(q)), options)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_a_mask_and_lengths(device, requires_grad):
    mask = make(device, 4, 1, 24, seed=4, requires_grad=requires_grad)
    used = torch.tensor([24, 7], dtype=torch.int32, device=device)
    q, k, v = qkv(device, requires_grad=requires_grad)
    opcheck(ops.attention, (q, k, v, mask, used), {"return_lse": True})
    opcheck(ops.attention, (q, k, v, mask > 0))
    q, k, v = (t.detach() for t in (q, k, v))
    opcheck(ops.attention_out, (q, k, v, torch.empty_like(q), mask.detach(), used))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_packed_sequences(device, options, requires_grad):
    q, k, v, *lengths = packed(device, requires_grad)
    opcheck(ops.attention_varlen, (q, k, v, *lengths), options)
    q, k, v = (t.detach() for t in (q, k, v))
    opcheck(ops.attention_varlen_out, (q, k, v, torch.empty_like(q), *lengths), options)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_strided_gqa_in_the_other_layout(device):
    q, k, v = (t.transpose(1, 2) for t in qkv(device, heads_kv=2))
    opcheck(ops.attention, (q, k, v), {"layout": "bshd", "return_lse": True})


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_kv, seqlen_k", [(2, 7), (1, 4), (2, 3)])
def test_gradients_are_the_derivatives(layout, is_causal, heads_kv, seqlen_k):
    """First and second order by finite differences, of the output and of lse; rows that read no key included."""
    shapes = [(1, 2, 5, 4), (1, heads_kv, seqlen_k, 4), (1, heads_kv, seqlen_k, 4)]
    inputs = [make("cpu", *shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    if layout == "bshd":
        inputs = [t.transpose(1, 2).contiguous() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]

    def call(q, k, v):
        out, lse = attention(q, k, v, is_causal=is_causal, layout=layout, return_lse=True, scale=0.7)
        return out, lse.where(lse.isfinite(), 0.0)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_gradients(device, is_causal):
    q, k, v = qkv(device, heads_kv=2, seqlen_k=40, requires_grad=True)
    attention(q, k, v, is_causal=is_causal).sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    reference.attention(*doubles, is_causal=is_causal).sum().backward()
    for t, want in zip((q, k, v), doubles, strict=True):
        torch.testing.assert_close(t.grad.double(), want.grad, rtol=1e-2, atol=2e-3)


def test_only_lse_has_a_gradient_too():
    q, k, v = qkv("cpu", requires_grad=True, dtype=torch.float64)
    out, lse = attention(q, k, v, return_lse=True)
    lse.sum().backward()
    doubles = [t.detach().requires_grad_() for t in (q, k, v)]
    reference.attention(*doubles, return_lse=True)[1].sum().backward()
    torch.testing.assert_close(q.grad, doubles[0].grad)
    torch.testing.assert_close(k.grad, doubles[1].grad)
    assert not v.grad.any()


def test_fakes_promise_the_strides_and_dtypes_that_come():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float16, torch.float32, torch.float64):
        for layout in ("bhsd", "bshd"):
            tensors = [t.transpose(1, 2) for t in qkv("cpu", dtype=dtype)]
            real = attention(*tensors, layout=layout, return_lse=True)
            with FakeTensorMode() as mode:
                fake = attention(*(mode.from_tensor(t) for t in tensors), layout=layout, return_lse=True)
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # torch's compiler uses it, and a GPU loads all of it
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strict", [True, False])
def test_export(device, strict):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, is_causal=True)

    q, k, v = qkv(device)
    exported = torch.export.export(Module(), (q, k, v), strict=strict)
    assert "flashcore.attention.default" in str(exported.graph)
    assert torch.equal(exported.module()(q, k, v), attention(q, k, v, is_causal=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # torch's compiler uses it, and a GPU loads all of it
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_gradients(device, dynamic):
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager", "dynamic": dynamic}
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, **options)
    for seqlen_k in (24, 40):
        q, k, v = qkv(device, seqlen_k=seqlen_k, requires_grad=True)
        compiled(q, k, v).sum().backward()
        want = torch.autograd.grad((attention(q, k, v) * 2).sum(), (q, k, v))
        for t, g in zip((q, k, v), want, strict=True):
            torch.testing.assert_close(t.grad, g, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")
@pytest.mark.parametrize("device", DEVICES)
def test_compiling_and_exporting_every_tensor(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, mask, used):
            return attention(q, k, v, attn_mask=mask, seqused_k=used, window=(9, 9), softcap=3.0)

    mask = make(device, 24, 24, seed=4, requires_grad=True)
    used = torch.tensor([24, 7], dtype=torch.int32, device=device)
    call = (*qkv(device, requires_grad=True), mask, used)
    want = Module()(*call)
    grads = torch.autograd.grad(want.sum(), call[:4])
    torch._dynamo.reset()
    got = torch.compile(Module(), fullgraph=True, backend="aot_eager")(*call)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), call[:4]), grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)
    exported = torch.export.export(Module(), tuple(t.detach() for t in call))
    torch.testing.assert_close(exported.module()(*call), want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")
@pytest.mark.parametrize("device", DEVICES)
def test_compiling_and_exporting_packed_sequences(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, cu_q, cu_k, max_q, max_k):
            return attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    for cut in (12, 7):
        q, k, v, cu, _, *longest = packed(device)
        call = (*(t[:cut].clone().requires_grad_() for t in (q, k, v)), cu.clamp(max=cut), cu.clamp(max=cut), *longest)
        want = Module()(*call)
        got = compiled(*call)
        torch.testing.assert_close(got, want)
        pairs = zip(*(torch.autograd.grad(out.sum(), call[:3]) for out in (got, want)), strict=True)
        for g, w in pairs:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)
    exported = torch.export.export(Module(), packed(device))
    assert "flashcore.attention_varlen.default" in str(exported.graph)
    assert torch.equal(exported.module()(*packed(device)), Module()(*packed(device)))


def test_packed_fakes_promise_what_comes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float16, torch.float64):
        tensors = packed("cpu", dtype=dtype)
        real = attention_varlen(*tensors, return_lse=True)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in tensors]
            fake = attention_varlen(*fakes, return_lse=True)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_bad_calls_of_the_operator_are_refused_as_well():
    q, k, v = qkv("cpu")
    with pytest.raises(ValueError, match="k: expected q's head dimension"):
        ops.attention(q, k[..., :8], v)
    with pytest.raises(ValueError, match="out: expected shape"):
        ops.attention_out(q, k, v, q.new_empty(1, 2, 3, 4))
    with pytest.raises(ValueError, match="out: expected memory apart"):
        ops.attention_out(q, k, v, q)
    with pytest.raises(ValueError, match="attn_mask: expected a shape"):
        ops.attention(q, k, v, q)
    with pytest.raises(ValueError, match="window: expected two ints"):
        ops.attention(q, k, v, window=(-2, 0))
    q, k, v, *lengths = packed("cpu")
    with pytest.raises(ValueError, match="cu_seqlens_q: expected int32"):
        ops.attention_varlen(q, k, v, lengths[0].long(), *lengths[1:])
    with pytest.raises(ValueError, match="out: expected memory apart"):
        ops.attention_varlen_out(q, k, v, q, *lengths)
