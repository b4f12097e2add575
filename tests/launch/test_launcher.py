"""The hot path on the fake GPU of conftest.py: every condition under which a call seen before must not be trusted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flashcore import reference
from flashcore.core.errors import UnsupportedError
from flashcore.fast import attention_production
from flashcore.fast.attention_production import attention
from flashcore.launch import driver, launcher, shim

F16 = torch.float16


def make(*shape: int, dtype: torch.dtype = F16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(shape: tuple[int, ...] = (2, 4, 48, 16), dtype: torch.dtype = F16, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(make(*shape, dtype=dtype, seed=seed + i) for i in range(3))


def expect(out: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    want = reference.cpu(q.detach(), k.detach(), v.detach(), **options)
    assert torch.equal(out.detach(), want)


def test_a_second_call_launches_the_same_kernel_with_the_new_addresses(gpu):
    for seed in (0, 10):
        q, k, v = qkv(seed=seed)
        expect(attention(q, k, v), q, k, v)
    assert len(gpu.bindings) == 1
    assert len(gpu.launches) == 2
    first, second = gpu.launches
    assert first.function == second.function and first.grid == second.grid
    assert second.tensors["q"] == q.data_ptr() != first.tensors["q"]


def test_a_call_seen_before_goes_its_own_path(gpu, monkeypatch):
    """The shim serves it where there is one, a guarded entry elsewhere; neither looks at the call again."""
    tensors = qkv()
    out = torch.empty_like(tensors[0])
    for options in ({}, {"out": out}, {"return_lse": True}, {"is_causal": True, "scale": 0.3}):
        attention(*tensors, **options)

    def unexpected(*args):
        raise AssertionError("the call was looked at again")

    monkeypatch.setattr(attention_production, "_attend", unexpected)
    if shim.attend is not None:
        for table in ("recent", "recent_into"):
            monkeypatch.setattr(attention_production, table, {})
        monkeypatch.setattr(attention_production, "find", unexpected)
    q, k, v = qkv(seed=10)
    expect(attention(q, k, v), q, k, v)
    expect(attention(q, k, v, out=out), q, k, v)
    expect(attention(q, k, v, return_lse=True)[0], q, k, v)
    expect(attention(q, k, v, is_causal=True, scale=0.3), q, k, v, is_causal=True, scale=0.3)


def test_every_call_gets_an_output_of_its_own(gpu):
    q, k, v = qkv()
    outs = [attention(q, k, v) for _ in range(3)]
    assert len({o.data_ptr() for o in outs}) == 3


VARIATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dtype": (lambda t: tuple(x.bfloat16() for x in t), {}),
    "batch": (lambda t: tuple(x[:1] for x in t), {}),
    "length": (lambda t: tuple(x[:, :, :32].contiguous() for x in t), {}),
    "key length": (lambda t: (t[0], t[1][:, :, :32], t[2][:, :, :32]), {}),
    "heads": (lambda t: (t[0], t[1][:, :2], t[2][:, :2]), {}),
    "head dimension": (lambda t: tuple(x[..., :8].contiguous() for x in t), {}),
    "strides": (lambda t: tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in t), {}),
    "strides of v": (lambda t: (*t[:2], t[2].transpose(1, 2).contiguous().transpose(1, 2)), {}),
    "broadcast": (lambda t: (t[0], t[1][:, :1].expand_as(t[1]), t[2][:, :1].expand_as(t[2])), {}),
    "causal": (lambda t: t, {"is_causal": True}),
    "scale": (lambda t: t, {"scale": 0.5}),
    "one tensor thrice": (lambda t: (t[0], t[0], t[0]), {}),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_call_that_differs_is_never_served_by_the_plan_of_another(gpu, name):
    change, options = VARIATIONS[name]
    q, k, v = qkv()
    for _ in range(2):
        expect(attention(q, k, v), q, k, v)
        other = change((q, k, v))
        expect(attention(*other, **options), *other, **options)
        other = change(qkv(seed=30))
        expect(attention(*other, **options), *other, **options)
    assert len(gpu.launches) == 6


def test_bshd_is_the_same_by_strides(gpu):
    q, k, v = (t.transpose(1, 2) for t in qkv())
    for _ in range(2):
        out = attention(q, k, v, layout="bshd")
        assert out.is_contiguous()
        expect(out.transpose(1, 2), *(t.transpose(1, 2) for t in (q, k, v)))


def test_lse(gpu):
    q, k, v = qkv()
    for _ in range(2):
        out, lse = attention(q, k, v, return_lse=True)
        want, want_lse = reference.cpu(q, k, v, return_lse=True)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        expect(attention(q, k, v), q, k, v)


def test_alignment_is_part_of_the_plan(gpu):
    q, k, v = qkv()
    storage = torch.zeros(k.numel() + 8, dtype=F16)
    shifted = storage[1 : 1 + k.numel()].view_as(k).copy_(k)
    for _ in range(2):
        expect(attention(q, k, v), q, k, v)
        expect(attention(q, shifted, v), q, k, v)
    aligned = [all(a.aligned for n, a in b.args.items() if n in "qkvo") for b in gpu.bindings]
    assert aligned == [True, False]
    assert [launch.function for launch in gpu.launches] == [1, 2, 1, 2]


def test_out_is_written_and_returned(gpu):
    q, k, v = qkv()
    for seed in (0, 10):
        q, k, v = qkv(seed=seed)
        out = torch.full_like(q, float("nan"))
        assert attention(q, k, v, out=out) is out
        expect(out, q, k, v)
    assert not gpu.allocated
    padded = torch.zeros(2, 4, 48, 32, dtype=F16)
    assert attention(q, k, v, out=padded[..., :16]).data_ptr() == padded.data_ptr()
    expect(padded[..., :16], q, k, v)
    assert not padded[..., 16:].any()


def test_an_overlapping_out_is_refused_also_when_the_call_was_seen_before(gpu):
    q, k, v = qkv()
    attention(q, k, v, out=torch.empty_like(q))
    for bad in (q, k, v):
        with pytest.raises(ValueError, match="out: expected memory apart"):
            attention(q, k, v, out=bad)
    storage = torch.zeros(q.numel() + 8, dtype=F16)
    a, b = storage[:-8].view_as(q), storage[8:].view_as(q)
    with pytest.raises(ValueError, match="out: expected memory apart"):
        attention(a, k, v, out=b)
    assert len(gpu.launches) == 1


def test_the_stream_is_the_current_one(gpu):
    if shim.attend is not None:
        pytest.skip("the shim asks DLPack for the stream, which has none for CPU tensors")
    q, k, v = qkv()
    out = torch.empty_like(q)
    for gpu.stream in (0, 7, 0, 9):
        attention(q, k, v, out=out)
    assert [launch.stream for launch in gpu.launches] == [0, 7, 0, 9]


def test_another_current_device_is_switched_for_the_call(gpu, monkeypatch):
    switched = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            switched.append(self.device)
            self.before, gpu.device, gpu.context = (gpu.device, gpu.context), self.device, 0x77

        def __exit__(self, *_):
            gpu.device, gpu.context = self.before

    q, k, v = qkv()
    attention(q, k, v)
    monkeypatch.setattr(torch.cuda, "device", Device)
    gpu.device, gpu.context = 5, 0x55
    expect(attention(q, k, v), q, k, v)
    assert switched == [-1] and gpu.device == 5


def test_a_thread_without_a_context_gets_one(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    gpu.context = None
    expect(attention(q, k, v), q, k, v)
    assert gpu.context == 0x77


def test_a_failed_launch_raises_and_the_next_call_works(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    gpu.status = 719
    with pytest.raises(RuntimeError, match="719"):
        attention(q, k, v)
    gpu.status = 0
    expect(attention(q, k, v), q, k, v)


# -- autograd and modes -----------------------------------------------------------------------------------------


def gradients(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    reference.attention(*doubles, **options).sum().backward()
    return tuple(t.grad for t in doubles)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"return_lse": True}], ids=str)
def test_a_plan_made_without_gradients_never_serves_a_call_that_needs_them(gpu, options):
    q, k, v = qkv()
    q.requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            result = attention(q, k, v, **options)
            assert not (result[0] if options.get("return_lse") else result).requires_grad
    for _ in range(2):
        result = attention(q, k, v, **options)
        out = result[0] if options.get("return_lse") else result
        assert out.requires_grad
        q.grad = None
        out.sum().backward()
        want = gradients(q, k, v, is_causal=options.get("is_causal", False))[0]
        torch.testing.assert_close(q.grad.double(), want, rtol=2e-2, atol=2e-3)
    with torch.no_grad():
        assert not torch.is_tensor(result) or not attention(q, k, v, **options).requires_grad


def test_gradients_reach_every_input(gpu):
    q, k, v = (t.requires_grad_() for t in qkv())
    for _ in range(2):
        for t in (q, k, v):
            t.grad = None
        attention(q, k, v).sum().backward()
        for t, want in zip((q, k, v), gradients(q, k, v), strict=True):
            torch.testing.assert_close(t.grad.double(), want, rtol=2e-2, atol=2e-3)


def test_parameters(gpu):
    q, k, v = qkv()
    p = torch.nn.Parameter(k)
    for _ in range(2):
        assert attention(q, p, v).requires_grad
        with torch.no_grad():
            expect(attention(q, p, v), q, k, v)


def test_out_has_no_gradient(gpu):
    q, k, v = qkv()
    out = torch.empty_like(q)
    q.requires_grad_()
    with torch.no_grad():
        attention(q, k, v, out=out)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out: "):
            attention(q, k, v, out=out)
    assert len(gpu.launches) == 1


def test_inference_mode_and_its_tensors(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    with torch.inference_mode():
        for _ in range(2):
            expect(attention(q, k, v), q, k, v)
        inner = qkv()
    for _ in range(2):
        expect(attention(*inner), *inner)
    q.requires_grad_()
    assert attention(q, k, v).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it
def test_a_forward_mode_tangent_is_refused(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    with forward_ad.dual_level():
        expect(attention(q, k, v), q, k, v)
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedError, match="forward-mode"):
            attention(dual, k, v)
    with pytest.raises((UnsupportedError, NotImplementedError), match="forward|jvp"):
        torch.func.jvp(lambda x: attention(x, k, v), (q,), (q,))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    with Seen() as seen:
        expect(attention(q, k, v), q, k, v)
        attention(q, k, v, out=torch.empty_like(q))
    assert "flashcore.attention.default" in seen.names
    assert "flashcore.attention_out.default" in seen.names
    assert len(gpu.launches) == 1


def test_make_fx_records_the_operator_and_no_constant(gpu):
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = qkv()
    attention(q, k, v)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda a, b, c: attention(a, b, c), tracing_mode=mode)(q, k, v)
        assert "flashcore.attention" in graph.code
    others = qkv(seed=10)
    expect(graph(*others), *others)


def test_vmap_and_grad_transforms(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    stacked = [torch.stack([t, t * 2]) for t in (q, k, v)]
    for _ in range(2):
        both = torch.vmap(attention)(*stacked)
        for i in range(2):
            expect(both[i], *(t[i] for t in stacked))
        one = torch.vmap(attention, in_dims=(0, None, None))(stacked[0], k, v)
        expect(one[1], stacked[0][1], k, v)
    got = torch.func.grad(lambda x: attention(x, k, v).sum())(q)
    torch.testing.assert_close(got.double(), gradients(q, k, v)[0], rtol=2e-2, atol=2e-3)


def test_fake_tensors_have_shapes_only(gpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = qkv()
    attention(q, k, v)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        out, lse = attention(*fakes, return_lse=True)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert len(gpu.launches) == 1


def test_a_subclass_stays_one(gpu):
    class Tagged(torch.Tensor):
        pass

    q, k, v = qkv()
    attention(q, k, v)
    for _ in range(2):
        assert type(attention(q.as_subclass(Tagged), k, v)) is Tagged


def test_a_torch_function_override_is_called(gpu):
    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return ("overridden", func) if func is attention else super().__torch_function__(func, types, args, kwargs)

    q, k, v = qkv()
    attention(q, k, v)
    assert attention(q.as_subclass(Wrapped), k, v) == ("overridden", attention)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    traced = torch.jit.trace(lambda a, b, c: attention(a, b, c), (q, k, v), check_trace=False)
    assert "flashcore::attention" in str(traced.graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_what_is_not_half(gpu, dtype):
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        for _ in range(2):
            out = attention(q, k, v)
            assert out.dtype == dtype
            expect(out, q.to(dtype), k.to(dtype), v.to(dtype))
            half = qkv(seed=20)
            assert attention(*half).dtype == F16


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # torch's compiler uses it, and a GPU loads all of it
def test_compiled_functions_call_the_operator(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    torch._dynamo.reset()
    function = torch.compile(lambda a, b, c: attention(a, b, c) * 2, fullgraph=True, backend="aot_eager")
    for seed in (0, 10):
        q, k, v = qkv(seed=seed)
        assert torch.equal(function(q, k, v), reference.cpu(q, k, v) * 2)
    into = torch.compile(lambda a, b, c, o: attention(a, b, c, out=o), fullgraph=True, backend="aot_eager")
    out = torch.empty_like(q)
    into(q, k, v, out)
    expect(out, q, k, v)


# -- bounds and threads -----------------------------------------------------------------------------------------


def test_the_caches_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(launcher, "MAX_PLANS", 4)
    monkeypatch.setattr(launcher, "MAX_PACKETS", 3)
    for length in range(8, 32):
        q, k, v = qkv((1, 1, length, 8))
        expect(attention(q, k, v, scale=1.0 / length), q, k, v, scale=1.0 / length)
    assert len(launcher._plans) <= 4 and len(launcher._entries) <= 4 and len(launcher.recent) <= 4
    kept = [qkv((1, 1, 8, 8), seed=i) for i in range(10)]
    for q, k, v in kept:
        expect(attention(q, k, v), q, k, v)
    assert all(len(plan.packets) <= 3 for plan in launcher._plans.values())


def test_many_shapes_one_compilation(gpu):
    for length in (64, 128, 192, 256, 64, 128):
        q, k, v = qkv((1, 2, length, 16))
        expect(attention(q, k, v, 64, 64), q, k, v)
    assert len(gpu.bindings) == 1


def test_threads(gpu):
    """Each thread alternates between its own shape and one that all share."""
    wrong: list[str] = []

    def work(i: int) -> None:
        try:
            for round in range(15):
                shape = (1, 2, 8 * (i + 1), 8) if round % 2 else (1, 2, 40, 8)
                q, k, v = qkv(shape, seed=100 * i + round)
                expect(attention(q, k, v), q, k, v)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- errors -----------------------------------------------------------------------------------------------------


def test_the_call_after_an_error_works(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    for bad, error in (
        ((q, k, None), TypeError),
        ((q, k[..., :8], v), ValueError),
        ((q, k.float(), v), ValueError),
        ((q[..., ::2], k[..., ::2], v[..., ::2]), ValueError),
        ((q.double(), k.double(), v.double()), UnsupportedError),
    ):
        with pytest.raises(error):
            attention(*bad)
        expect(attention(q, k, v), q, k, v)
    with pytest.raises(ValueError, match="block_m"):
        attention(q, k, v, block_m=48)
    with pytest.raises(UnsupportedError, match="hopper"):
        attention(q, k, v, backend="hopper")
    for _ in range(2):  # a list has no hash
        expect(attention(q, k, v, window=[4, 4]), q, k, v, window=(4, 4))  # type: ignore[arg-type]
    expect(attention(q, k, v), q, k, v)


def test_the_shim_is_built_beside_a_kernel_not_within_a_capture(gpu, monkeypatch):
    started = []
    monkeypatch.setattr(shim, "start", lambda: started.append(len(gpu.bindings)))
    q, k, v = qkv()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="captured"):
        attention(q, k, v)
    assert not started
    gpu.capturing = False
    for _ in range(2):
        attention(q, k, v)
    assert started == [0]


def test_a_capture_that_would_have_to_compile_is_refused(gpu):
    q, k, v = qkv()
    attention(q, k, v)
    gpu.capturing = True
    expect(attention(q, k, v), q, k, v)  # seen before
    longer = qkv((1, 2, 48, 16))
    expect(attention(*longer), *longer)  # the kernel is loaded, only the plan is new
    allocated = len(gpu.allocated)
    with pytest.raises(RuntimeError, match="captured"):
        attention(q, k, v, is_causal=True)
    assert len(gpu.allocated) == allocated


@pytest.mark.parametrize("shape_q, length_k", [((0, 4, 48, 16), 48), ((2, 4, 0, 16), 48), ((2, 4, 48, 16), 0)])
def test_nothing_to_do_launches_nothing(gpu, shape_q, length_k):
    q = make(*shape_q)
    k, v = make(shape_q[0], 4, length_k, 16), make(shape_q[0], 4, length_k, 16)
    for _ in range(2):
        out, lse = attention(q, k, v, return_lse=True)
        assert out.shape == q.shape and not out.any()
        assert lse.shape == q.shape[:3] and bool((lse == -torch.inf).all())
        into = torch.ones_like(q)
        assert attention(q, k, v, out=into) is into and not into.any()
        if not q.numel():
            into = torch.empty(1, dtype=F16).as_strided(q.shape, (0, 0, 0, 0))
            assert attention(q, k, v, out=into) is into
    assert not gpu.launches


def test_documented_functions_serve_as_well(gpu, documented):
    q, k, v = qkv()
    q.requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            expect(attention(q, k, v), q, k, v)
        assert attention(q, k, v).requires_grad
        with torch.inference_mode():
            expect(attention(q, k, v), q, k, v)
        assert attention(q, q, q).requires_grad
        expect(attention(*(t.bfloat16() for t in (q, k, v))), *(t.bfloat16() for t in (q, k, v)))


def test_a_kernel_with_unexpected_parameters_is_launched_by_triton(gpu, monkeypatch):
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(driver, "parameters", lambda function: [(0, 8)] * 30)
    monkeypatch.setattr(
        launcher.packet.triton_side, "runner", lambda compiled: lambda *arguments: calls.append(arguments)
    )
    q, k, v = qkv()
    for _ in range(2):
        out = attention(q, k, v)
    binding = gpu.bindings[0]
    assert not gpu.launches and len(calls) == 2
    gx, gy, gz, stream, *arguments = calls[-1]
    named = dict(zip(binding.fn.arg_names, arguments, strict=True))
    assert (gx, gy, gz) == binding.grid and stream == 0
    assert named["q"] == q.data_ptr() and named["o"] == out.data_ptr() and named["seqlen_k"] == 48
    assert named["DTYPE"] is F16 and named["dim"] == 16
