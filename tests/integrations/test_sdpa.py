"""torch's SDPA through its registry of flash implementations, which CUDA tensors alone reach."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from flashcore import UnsupportedError, attention
from flashcore.integrations import sdpa

torch_attention = torch.nn.attention
needs_registry = pytest.mark.skipif(
    not hasattr(torch_attention, "register_flash_attention_impl"), reason="needs torch 2.10 or newer"
)


@pytest.fixture(autouse=True)
def afterwards():
    sdpa._warn_once.cache_clear()
    yield
    sdpa.restore()
    assert not sdpa.is_active()


def qkv(device="cpu", dtype=torch.float32, kv_heads=4, length_k=16, dim=8):
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, 16, dim), (2, kv_heads, length_k, dim), (2, kv_heads, length_k, dim))
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def order():
    return torch_attention._cur_sdpa_kernel_backends(with_priority=True)


@needs_registry
def test_it_is_switched_on_and_off():
    def overridden():
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{sdpa._OPERATOR}", "CUDA")

    if torch.cuda.is_available():  # torch sets its own order at the first choice
        F.scaled_dot_product_attention(*qkv("cuda", torch.float16))
    before = order(), overridden()
    for _ in range(2):
        sdpa.activate()
        sdpa.activate()
        assert sdpa.is_active() and overridden()
        assert order()[0] == torch_attention.SDPBackend.FLASH_ATTENTION and set(order()) == set(before[0])
        sdpa.restore()
        sdpa.restore()
        assert (order(), overridden()) == before and not sdpa.is_active()


@needs_registry
def test_torch_and_others_may_end_it():
    registry = pytest.importorskip("torch.nn.attention._registry", reason="another torch")
    sdpa.activate()
    assert registry.current_flash_attention_impl() == "flashcore"
    torch_attention.restore_flash_attention_impl()
    assert not sdpa.is_active()
    sdpa.activate()
    torch_attention.register_flash_attention_impl("other", register_fn=lambda: None)
    torch_attention.activate_flash_attention_impl("other")
    assert not sdpa.is_active()


def test_a_torch_without_the_registry(monkeypatch):
    monkeypatch.delattr(torch_attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(UnsupportedError, match=r"2\.10"):
        sdpa.activate()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_its_nine_results(is_causal, scale):
    q, k, v = qkv()
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = sdpa._forward(q, k, v, is_causal=is_causal, scale=scale)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(found[0], out.detach())
    torch.testing.assert_close(found[1], lse.detach())
    assert found[0].stride() == q.stride() and not found[0].requires_grad
    assert found[2:6] == (None, None, 16, 16)
    meta = torch.ops.aten._scaled_dot_product_flash_attention(*(t.detach().to("meta") for t in (q, k, v)))
    for ours, theirs in zip(found[6:], meta[6:], strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@pytest.mark.parametrize("asked", ["dropout", "debug mask", "aligned", "refused"])
def test_the_rest_stays_torchs_and_says_so_once(asked, monkeypatch, caplog):
    q, k, v = qkv(length_k=20 if asked == "aligned" else 16)
    given = {"dropout": {"dropout_p": 0.5}, "debug mask": {"return_debug_mask": True}, "aligned": {"is_causal": True}}
    if asked == "refused":
        def refuse(*args, **kwargs):
            raise UnsupportedError("refused")

        monkeypatch.setattr(sdpa, "attention", refuse)
    calls = []

    def torchs(q, k, v, *rest, **named):
        calls.append((rest, named))
        return q, q[..., 0], *(torch.empty(0),) * 3

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", torchs)
    for _ in range(2):
        out, *rest = sdpa._forward(q, k, v, scale=0.5, **given.get(asked, {}))
        assert torch.equal(out, q) and len(rest) == 8 and rest[3:5] == [16, k.shape[2]]
    rest, named = calls[0]
    assert rest == (
        None, None, 16, k.shape[2], 0.5 if asked == "dropout" else 0.0, asked == "aligned", asked == "debug mask",
    ) and named == {"scale": 0.5}  # fmt: skip
    assert len(calls) == 2 and [r.levelno for r in caplog.records] == [logging.WARNING]
    assert asked in caplog.text


# -- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often the hook computed something."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(sdpa, "attention", counting)
    return calls


@pytest.mark.gpu
@needs_registry
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_torchs_function_on_a_gpu(is_causal, kv_heads, counted):
    options = {"is_causal": is_causal, "enable_gqa": kv_heads != 4}
    q, k, v = (t.requires_grad_() for t in qkv("cuda", torch.float16, kv_heads, dim=64))
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*exact, **options)
    grad = torch.randn_like(want)
    wanted = torch.autograd.grad(want, exact, grad)
    sdpa.activate()
    out = F.scaled_dot_product_attention(q, k, v, **options)
    assert len(counted) == 1
    torch.testing.assert_close(out.double().cpu(), want, atol=2e-3, rtol=2e-3)
    grads = torch.autograd.grad(out, (q, k, v), grad.to("cuda", torch.float16))
    for got, expected in zip(grads, wanted, strict=True):
        assert (got.double().cpu() - expected).norm() / expected.norm() < 2e-3
    sdpa.restore()
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), out, atol=2e-3, rtol=2e-3)
    assert len(counted) == 1


@pytest.mark.gpu
@needs_registry
def test_what_is_left_to_torch_on_a_gpu(counted):
    q, k, v = qkv("cuda", torch.float16, dim=64)
    sdpa.activate()
    mask = torch.ones(16, 16, dtype=torch.bool, device="cuda").tril()
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert not counted
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert torch.isfinite(out).all() and not counted


@pytest.mark.gpu
@needs_registry
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")
def test_compiled_and_captured(counted):
    q, k, v = qkv("cuda", torch.float16, dim=64)
    sdpa.activate()
    torch._dynamo.reset()
    with torch.no_grad():
        function = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q * 1, k, v) + 1, fullgraph=True)
        torch.testing.assert_close(function(q, k, v), attention(q, k, v) + 1)
        assert counted
        F.scaled_dot_product_attention(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = F.scaled_dot_product_attention(q, k, v)
        q.copy_(v)
        graph.replay()
        assert torch.equal(out, attention(q, k, v))
