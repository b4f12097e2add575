"""torch.ops.flashcore: what PyTorch itself demands of a registered operator, and the gradients."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from flashcore import reference
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


OPTIONS = [{}, {"is_causal": True}, {"return_lse": True}, {"scale": 0.3, "is_causal": True, "return_lse": True}]


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


def test_bad_calls_of_the_operator_are_refused_as_well():
    q, k, v = qkv("cpu")
    with pytest.raises(ValueError, match="k: expected q's head dimension"):
        ops.attention(q, k[..., :8], v)
    with pytest.raises(ValueError, match="out: expected shape"):
        ops.attention_out(q, k, v, q.new_empty(1, 2, 3, 4))
    with pytest.raises(ValueError, match="out: expected memory apart"):
        ops.attention_out(q, k, v, q)
