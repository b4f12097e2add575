"""The graph of a call seen before, on the fake GPU, by every path: what autograd promises of any other node."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flashcore import reference
from flashcore.fast.attention_production import attention
from flashcore.launch import gradients, shim
from flashcore.security import fake_gpu

SHAPE = (1, 2, 24, 16)
F16 = torch.float16


def leaves(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).to(F16).requires_grad_() for _ in range(3)]


def wanted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(reference.attention(*doubles, **options).sum(), doubles)


def same(found: Any, want: Any) -> None:
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=2e-2, atol=4e-3)


@pytest.fixture(params=[None, "flash"])
def how(request, monkeypatch) -> str | None:
    """By which way gradients go. "flash" has output and lse saved; the definition then stands in for torch's kernel."""
    backward = gradients.backward
    monkeypatch.setattr(gradients, "route", lambda *call: request.param)
    monkeypatch.setattr(gradients, "backward", lambda call, how, *rest, **wants: backward(call, None, *rest, **wants))
    return request.param


def warm(**options: Any) -> None:
    for _ in range(2):
        attention(*leaves(seed=50), **options)


def test_what_is_saved(gpu, how):
    warm()
    q, k, v = leaves()
    out = attention(q, k, v)
    saved = out.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved[:3]] == [t.data_ptr() for t in (q, k, v)]
    if how is None:
        assert len(saved) == 3
    else:
        lse = reference.cpu(*(t.detach() for t in (q, k, v)), return_lse=True)[1]
        assert len(saved) == 5 and saved[3].data_ptr() == out.data_ptr() and saved[3].grad_fn is out.grad_fn
        torch.testing.assert_close(saved[4], lse)
    assert isinstance(out.grad_fn, Node) and out.grad_fn.name() == "AttentionBackward"
    assert [f.variable is t for (f, _), t in zip(out.grad_fn.next_functions, (q, k, v), strict=True)] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2, 24, 16), (2, 3, 7, 8)])
def test_output_and_saved_lse_are_tensors_of_their_own(gpu, monkeypatch, shape, dtype):
    """Though the node in C++ has both in one allocation."""
    monkeypatch.setattr(gradients, "route", lambda *call: "flash")
    for _ in range(3):
        inputs = [t.to(dtype).requires_grad_() for t in (torch.randn(shape), torch.randn(shape), torch.randn(shape))]
        out = attention(*inputs)
    plain = torch.empty(shape, dtype=dtype)
    assert (out.shape, out.stride(), out.storage_offset()) == (plain.shape, plain.stride(), 0)
    assert out._base is None and not out._is_view() and out.is_contiguous() and out.dtype == dtype
    lse = out.grad_fn.saved_tensors[4]
    want, want_lse = reference.cpu(*(t.detach() for t in inputs), return_lse=True)
    assert lse.is_contiguous() and lse.data_ptr() % 64 == out.data_ptr() % 64 == 0 and not lse.requires_grad
    assert torch.equal(out.detach(), want)
    torch.testing.assert_close(lse, want_lse)
    with torch.no_grad():
        out.fill_(9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.grad_fn.saved_tensors  # noqa: B018
    torch.testing.assert_close(lse, want_lse)
    lse.fill_(7)
    assert (out == 9).all()


@pytest.mark.parametrize("changed", range(4))
def test_a_tensor_changed_in_place_is_noticed(gpu, how, changed):
    warm()
    inputs = leaves()
    out = attention(*inputs)
    loss = out.sum()
    with torch.no_grad():
        (*inputs, out)[changed].mul_(2)
    if changed == 3 and how is None:
        same(torch.autograd.grad(loss, inputs), wanted(*inputs))  # the output is not read
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_used_once_unless_retained(gpu, how):
    warm()
    inputs = leaves()
    loss = attention(*inputs).sum()
    for _ in range(2):
        same(torch.autograd.grad(loss, inputs, retain_graph=True), wanted(*inputs))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_second_order(gpu, how):
    warm()
    inputs = leaves()
    doubles = [t.detach().double().requires_grad_() for t in inputs]

    def second(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), tensors)

    for got, right in zip(second(attention, inputs), second(reference.attention, doubles), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=5e-2, atol=5e-2)


def test_hooks_of_the_node_and_of_the_output(gpu, how):
    warm()
    inputs, seen = leaves(), []
    out = attention(*inputs)
    out.register_hook(lambda grad: grad * 2)
    out.grad_fn.register_hook(lambda into, of: seen.append((len(into), len(of))))
    out.sum().backward()
    same([t.grad / 2 for t in inputs], wanted(*inputs))
    assert seen == [(3, 1)]


def test_hooks_of_saved_tensors_may_call_attention_themselves(gpu, how):
    """They run on the way from apply, when the results of the call are already where they belong."""
    warm()
    inputs, others = leaves(), leaves(seed=10)
    inner = []

    def pack(t: Tensor) -> Tensor:
        if len(inner) < 2:
            at = len(inner)
            inner.append(None)
            with torch.enable_grad():
                inner[at] = attention(*others)
        return t.clone()

    with saved_tensors_hooks(pack, lambda t: t.clone()):
        out = attention(*inputs)
    assert torch.equal(out.detach(), reference.cpu(*(t.detach() for t in inputs)))
    same(torch.autograd.grad(out.sum(), inputs), wanted(*inputs))
    for result in inner:
        assert torch.equal(result.detach(), reference.cpu(*(t.detach() for t in others)))
        same(torch.autograd.grad(result.sum(), others), wanted(*others))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(gpu, how, reentrant):
    warm()
    inputs = leaves()
    out = checkpoint(attention, *inputs, use_reentrant=reentrant)
    same(torch.autograd.grad(out.sum(), inputs) if not reentrant else backward(out, inputs), wanted(*inputs))


def backward(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    out.sum().backward()
    return [t.grad for t in inputs]


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_call_that_fails_leaves_nothing_behind(gpu, how, return_lse):
    options = {"return_lse": return_lse}
    warm(**options)
    inputs = leaves()
    for fault in ("launch", "empty"):
        gpu.status, gpu.failing = (1, {}) if fault == "launch" else (0, {"empty": MemoryError("none left")})
        with pytest.raises((RuntimeError, MemoryError)):
            attention(*inputs, **options)
        gpu.status, gpu.failing = 0, {}
        result = attention(*inputs, **options)
        out = result[0] if return_lse else result
        same(torch.autograd.grad(out.sum(), inputs), wanted(*inputs))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_nothing_outlives_its_graph(gpu, how, used, return_lse):
    """By reference counts alone: memory of a GPU can't wait for the garbage collector."""
    warm(return_lse=return_lse)
    gc.collect()
    gc.disable()
    try:
        inputs = leaves()
        result = attention(*inputs, return_lse=return_lse)
        out = result[0] if return_lse else result
        assert len(out.grad_fn.saved_tensors) == 3 + 2 * (how is not None)
        if used:
            out.sum().backward()
        gpu.allocated.clear()
        last = [weakref.ref(t) for t in (*inputs, out)]
        del inputs, result, out
        assert [ref() for ref in last] == [None] * 4
    finally:
        gc.enable()


def test_a_graph_that_was_used_has_let_go_of_its_tensors(gpu, how):
    warm()
    inputs = leaves()
    out = attention(*inputs)
    node = out.grad_fn
    assert node.needs_input_grad == (True,) * 3
    out.sum().backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        node.saved_tensors  # noqa: B018
    assert node.name() == "AttentionBackward"


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_gradient_that_is_not_there(gpu, how, return_lse):
    """Where nothing comes back through the output, zeros stand for it; beside lse, which may have one, nothing does."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    warm(return_lse=return_lse)
    inputs = leaves()
    result = attention(*inputs, return_lse=return_lse)
    found = torch.autograd.grad(
        Nothing.apply(result[0] if return_lse else result).sum(), inputs, allow_unused=True
    )
    assert [t is None for t in found] == [return_lse] * 3
    if not return_lse:
        assert not any(t.any() for t in found)


def test_gradients_of_lse_and_of_both(gpu, how):
    warm(return_lse=True)
    inputs = leaves()
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    for take in (lambda out, lse: lse.sum(), lambda out, lse: out.sum() + 2 * lse.sum()):
        found = torch.autograd.grad(take(*attention(*inputs, return_lse=True)), inputs, allow_unused=True)
        want = torch.autograd.grad(take(*reference.attention(*doubles, return_lse=True)), doubles, allow_unused=True)
        for got, right in zip(found, want, strict=True):
            right = torch.zeros_like(got, dtype=torch.float64) if right is None else right
            torch.testing.assert_close(got.double(), right, rtol=2e-2, atol=4e-3)


def test_one_input_that_requires_grad(gpu, how):
    for wanted_one in range(3):
        for _ in range(3):
            inputs = [t.detach().requires_grad_(i == wanted_one) for i, t in enumerate(leaves())]
            out = attention(*inputs)
        assert out.grad_fn.needs_input_grad == tuple(i == wanted_one for i in range(3))
        out.sum().backward()
        right = wanted(*inputs)
        for i, t in enumerate(inputs):
            assert (t.grad is not None) == (i == wanted_one)
            if t.grad is not None:
                torch.testing.assert_close(t.grad.double(), right[i], rtol=2e-2, atol=4e-3)


def test_one_tensor_in_three_places(gpu, how):
    warm()
    (q, *_) = leaves()
    for _ in range(3):
        out = attention(q, q, q)
    same(torch.autograd.grad(out.sum(), [q]), [sum(wanted(q, q, q))])


def test_inputs_that_are_results(gpu, how):
    """Their nodes, not leaves, are what comes next, a thousand times over."""
    warm()
    inputs = leaves()
    same(torch.autograd.grad(attention(*(t * 1 for t in inputs)).sum(), inputs), wanted(*inputs))
    x = inputs[0]
    for _ in range(1000):
        x = attention(x, *inputs[1:])
    assert x.grad_fn.next_functions[0][0].name() == "AttentionBackward"
    x.sum().backward()
    assert inputs[0].grad is not None


def test_anomaly_mode_says_where_the_call_was_made(gpu, how):
    warm()
    inputs = leaves()
    with torch.no_grad():
        inputs[2].fill_(torch.inf)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(check_nan=True):
            out = attention(*inputs)
            with pytest.raises(RuntimeError, match="'AttentionBackward' returned nan values"):
                out.sum().backward()
    assert any("test_anomaly_mode_says_where" in str(w.message) for w in seen)


def test_an_error_in_backward_reaches_its_caller(gpu, how, monkeypatch):
    warm()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("the backward pass fell over")

    monkeypatch.setattr(gradients, "backward", fail)
    out = attention(*leaves())
    with pytest.raises(KeyError, match="fell over"):
        out.sum().backward()


def test_hooks_of_saved_tensors_see_each_and_may_refuse(gpu, how):
    warm()
    inputs, packed = leaves(), []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        out = attention(*inputs)
    assert [t.data_ptr() for t in packed[:3]] == [t.data_ptr() for t in inputs]
    assert len(packed) == 3 + 2 * (how is not None)
    same(torch.autograd.grad(out.sum(), inputs), wanted(*inputs))
    def refuse(t: Tensor) -> Tensor:
        raise ValueError("not this one")

    with saved_tensors_hooks(refuse, lambda t: t), pytest.raises(ValueError, match="not this one"):
        attention(*inputs)
    same(torch.autograd.grad(attention(*inputs).sum(), inputs), wanted(*inputs))


def test_several_threads(gpu, how):
    """Each makes graphs of its own, and all go back at once through one that they share."""
    warm()
    shared = leaves(seed=7)
    product = attention(*shared)
    right = wanted(*shared)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(20):
                inputs = leaves(seed)
                same(torch.autograd.grad(attention(*inputs).sum(), inputs), wanted(*inputs))
                same(torch.autograd.grad(product.sum(), shared, retain_graph=True), right)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_launch_a_call(gpu, how):
    warm()
    before = len(gpu.launches)
    attention(*leaves())
    assert len(gpu.launches) == before + 1


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_without_the_attribute_that_save_for_backward_sets(native, monkeypatch, how, masked, return_lse):
    monkeypatch.setattr(shim, "saved_attribute", None)
    options = {"attn_mask": torch.ones(24, 24, dtype=torch.bool).tril()} if masked else {}
    with fake_gpu.installed(native):
        warm(return_lse=return_lse, **options)
        inputs = leaves()
        result = attention(*inputs, return_lse=return_lse, **options)
        out = result[0] if return_lse else result
        assert len(out.grad_fn.saved_tensors) == 3 + 2 * masked + 2 * (how is not None)
        same(torch.autograd.grad(out.sum(), inputs), wanted(*inputs, **options))
