"""Gradients on a GPU: every way to compute them against fp64, and what loading and launching they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore import attention_varlen, reference
from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention
from flashcore.launch import gradients, node, packet, shim

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["node", "shim", "python"], autouse=True)
def path(request, monkeypatch):
    if request.param == "python":
        with shim.disabled():
            yield
        return
    if not shim.load():
        pytest.skip(shim.status())
    if request.param == "shim":
        with node.disabled():
            yield
        return
    monkeypatch.delenv("FLASHCORE_NODE")
    if node._found() is None and (why := node._missing()):
        pytest.skip(f"no node in C++: {why}")
    node.build()
    yield


@pytest.fixture
def routes(monkeypatch):
    """What computed the gradients, call by call."""
    seen: list[str] = []
    for name in ("_flash", "_efficient", "_by_definition"):
        function = getattr(gradients, name)

        def call(*args: Any, function: Any = function, name: str = name) -> Any:
            seen.append(name.strip("_"))
            return function(*args)

        monkeypatch.setattr(gradients, name, call)
    return seen


def make(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def mask_of(kind: Any, *shape: int) -> Tensor:
    mask = make(*shape, seed=9, dtype=torch.float16)
    return mask > -0.5 if kind == torch.bool else mask.to(kind)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("flash", {}),
    "bfloat16": ("flash", {"dtype": torch.bfloat16}),
    "causal": ("flash", {"is_causal": True}),
    "more rows than keys": ("flash", {"is_causal": True, "rows": 200}),
    "window": ("flash", {"window": (40, 10)}),
    "narrow window": ("flash", {"window": (3, 0), "rows": 200}),
    "head dimension 128": ("flash", {"dim": 128}),
    "head dimension 24": ("flash", {"dim": 24, "is_causal": True}),
    "negative scale": ("by_definition", {"scale": -0.2}),
    "scale of 0": ("by_definition", {"scale": 0.0, "is_causal": True}),
    "another v": ("efficient", {"dim_v": 32, "is_causal": True}),
    "bool mask": ("efficient", {"mask": (torch.bool, (2, 1, 100, 150))}),
    "mask of keys": ("efficient", {"mask": (torch.bool, (2, 1, 1, 150))}),
    "bias": ("efficient", {"mask": (torch.float16, (4, 100, 150))}),
    "causal bias": ("efficient", {"mask": (torch.float16, (1, 4, 100, 150)), "is_causal": True}),
    "lengths": ("efficient", {"used": (150, 31)}),
    "no key": ("efficient", {"used": (0, 150), "window": (50, 50)}),
    "fp32 bias": ("by_definition", {"mask": (torch.float32, (4, 100, 150))}),
    "softcap": ("by_definition", {"softcap": 5.0}),
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", CASES)
def test_every_way_against_fp64(routes, name, layout):
    how, options = CASES[name]
    options = dict(options)
    kind, shape = options.pop("mask", (None, ()))
    mask = None if kind is None else mask_of(kind, *shape)
    used = options.pop("used", None)
    dtype, dim, rows = options.pop("dtype", torch.float16), options.pop("dim", 64), options.pop("rows", 100)
    inputs = [
        make(2, 4, rows, dim, seed=1, dtype=dtype), make(2, 2, 150, dim, seed=2, dtype=dtype),
        make(2, 2, 150, options.pop("dim_v", dim), seed=3, dtype=dtype),
    ]  # fmt: skip
    if layout == "bshd":
        inputs = [t.transpose(1, 2).contiguous() for t in inputs]
    if mask is not None and mask.dtype != torch.bool:
        inputs.append(mask)
    extra = {"seqused_k": None if used is None else lengths(*used), **options}

    doubles = [t.double().requires_grad_() for t in inputs]
    heads_first = [t.transpose(1, 2) if layout == "bshd" else t for t in doubles[:3]]
    bias = doubles[3] if len(doubles) > 3 else mask
    want = reference.attention(*heads_first, attn_mask=bias, **extra)
    weight = torch.randn(want.shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda").to(dtype)
    (want * weight).sum().backward()

    for _ in range(2):
        asked = [t.clone().requires_grad_() for t in inputs]
        try:
            out = attention(*asked[:3], attn_mask=asked[3] if len(asked) > 3 else mask, layout=layout, **extra)
        except UnsupportedError as refusal:
            pytest.skip(str(refusal))
        out = out.transpose(1, 2) if layout == "bshd" else out
        (out * weight).sum().backward()
        for t, w in zip(asked, doubles, strict=True):
            error = (t.grad.double() - w.grad).abs().max().item()
            eps = torch.finfo(t.dtype).eps
            assert error <= 8 * eps * max(w.grad.abs().max().item(), 1.0), (error, w.grad.abs().max().item())
    assert routes == [how] * 2


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 5)}, {"softcap": 5.0}], ids=str)
def test_packed_sequences(routes, options):
    cu_q, cu_k = lengths(0, 70, 70, 75, 200), lengths(0, 90, 91, 91, 230)
    inputs = [make(200, 4, 64, seed=1), make(230, 2, 64, seed=2), make(230, 2, 64, seed=3)]
    doubles = [t.double().requires_grad_() for t in inputs]
    want = attention_varlen(*doubles, cu_q, cu_k, 125, 139, backend="reference", **options)
    want.square().sum().backward()
    routes.clear()
    for _ in range(2):
        asked = [t.clone().requires_grad_() for t in inputs]
        try:
            attention_varlen(*asked, cu_q, cu_k, 125, 139, **options).square().sum().backward()
        except UnsupportedError as refusal:
            pytest.skip(str(refusal))
        for t, w in zip(asked, doubles, strict=True):
            torch.testing.assert_close(t.grad.double(), w.grad, rtol=2e-2, atol=2e-2)
    assert routes == ["by_definition" if "softcap" in options else "flash"] * 2


def test_a_gradient_of_lse_and_of_a_gradient(routes):
    q, k, v = (make(1, 2, 64, 32, seed=i).requires_grad_() for i in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    (out.sum() + lse.sum()).backward()
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    grad.square().sum().backward()
    # The last one is of the output, of which the gradient is a function too.
    assert routes == ["by_definition", "by_definition", "flash"] and k.grad.isfinite().all()


def test_deterministic_algorithms_repeat_their_bits():
    q, k, v = (make(2, 4, 300, 64, seed=i).requires_grad_() for i in range(3))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # torch's compiler uses it
def test_compiled_backward(routes):
    torch._dynamo.reset()
    q, k, v = (make(2, 4, 128, 64, seed=i).requires_grad_() for i in range(3))
    want = torch.autograd.grad(attention(q, k, v, is_causal=True).square().sum(), (q, k, v))
    routes.clear()
    function = torch.compile(lambda q, k, v: attention(q, k, v, is_causal=True).square().sum(), fullgraph=True)
    got = torch.autograd.grad(function(q, k, v), (q, k, v))
    assert "by_definition" not in routes  # traced: torch's kernel is in the graph
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("backend", [None, "portable"])
def test_a_changed_length_alone_loads_nothing(backend, options):
    """As long as the tile stays, and whether it fills: 130, 140 and 150 are alike, and so are they with gradients."""
    def call(length: int, requires_grad: bool) -> None:
        q, k, v = (make(2, 4, length, 64, seed=i).requires_grad_(requires_grad) for i in range(3))
        attention(q, k, v, backend=backend, **options)

    for requires_grad in (False, True):
        call(130, requires_grad)
        before = packet.loaded_kernels()
        for length in (140, 150, 135, 149):
            call(length, requires_grad)
        assert packet.loaded_kernels() == before


def test_a_changed_total_alone_loads_nothing():
    def call(rows: list[int]) -> None:
        cu = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
        q, k, v = (make(sum(rows), 4, 64, seed=i) for i in range(3))
        attention_varlen(q, k, v, cu, cu, max(rows), max(rows))

    try:
        call([130, 20, 99])
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    before = packet.loaded_kernels()
    for rows in ([140, 21, 99], [150, 130, 1], [130, 130, 131], [135]):
        call(rows)
    assert packet.loaded_kernels() == before
