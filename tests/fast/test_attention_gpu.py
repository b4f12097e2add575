"""attention() on a GPU, by both launch paths: the conditions that only a real driver can break."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.library import opcheck

from flashcore.core.errors import UnsupportedError
from flashcore.core.target import H100
from flashcore.fast.attention_production import attention
from flashcore.fast.planning import explain
from flashcore.launch import launcher, ops, packet, shim
from flashcore.testing import gates

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["shim", "python"], autouse=True)
def path(request):
    if request.param == "shim":
        if not shim.load():
            pytest.skip(shim.status())
        yield
    else:
        with shim.disabled():
            yield


def qkv(*shape, dtype=torch.float16, seed=0, device="cuda"):
    generator = torch.Generator(device).manual_seed(seed)
    shape = shape or (2, 4, 128, 64)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))


def right(out, q, k, v, **options):
    verdict = gates.check(out, q, k, v, **options)
    assert verdict.passed, verdict.failures


SHAPES = [
    (2, 4, 128, 64), (1, 1, 1, 64), (3, 2, 77, 64), (2, 3, 200, 128), (1, 2, 130, 8), (2, 2, 65, 256), (1, 2, 96, 72),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_right_twice(shape, dtype, is_causal):
    for seed in (0, 1):
        q, k, v = qkv(*shape, dtype=dtype, seed=seed)
        out, lse = attention(q, k, v, is_causal=is_causal, return_lse=True)
        verdict = gates.check(out, q, k, v, is_causal=is_causal, lse=lse)
        assert verdict.passed, verdict.failures
        right(attention(q, k, v, is_causal=is_causal), q, k, v, is_causal=is_causal)


@pytest.mark.parametrize(
    ("heads_q", "heads_kv", "rows", "keys", "dim", "is_causal"),  # that fill an H100 with blocks of 256 rows
    [(66, 22, 500, 2176, 64, False), (33, 33, 512, 2048, 64, False), (33, 11, 512, 2304, 40, False),
     (33, 33, 512, 2048, 48, False), (66, 22, 500, 1000, 24, False), (66, 66, 512, 512, 56, False),
     (33, 11, 512, 2304, 40, True), (66, 22, 500, 1150, 24, True), (33, 33, 1024, 1024, 56, True)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_keys_right_and_equal_twice(heads_q, heads_kv, rows, keys, dim, is_causal, dtype):
    q, (k, v, _) = qkv(2, heads_q, rows, dim, dtype=dtype)[0], qkv(2, heads_kv, keys, dim, dtype=dtype, seed=1)
    assert explain(q, k, v, is_causal=is_causal, target=H100).config.block_m == 256
    out, lse = attention(q, k, v, is_causal=is_causal, return_lse=True)
    right(out, q, k, v, is_causal=is_causal, lse=lse)
    first, second = (attention(q, k, v, is_causal=is_causal) for _ in range(2))
    assert torch.equal(first, second)
    right(first, q, k, v, is_causal=is_causal)
    right(attention(q, k, v, is_causal=is_causal, scale=-0.1), q, k, v, is_causal=is_causal, scale=-0.1)


@pytest.mark.parametrize("backend", ["portable", "hopper"])
def test_each_kernel_by_name_and_with_views(backend):
    try:
        for seed in range(3):
            q, k, v = qkv(2, 128, 4, 64, seed=seed)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2)[:, :2], v.transpose(1, 2)[:, 2:]
            right(attention(q, k, v, backend=backend), q, k, v)
            out = torch.empty(2, 128, 4, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
            assert attention(q, k, v, backend=backend, out=out) is out
            right(out, q, k, v)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))


def test_the_kernel_is_launched_by_the_driver_itself():
    q, k, v = qkv()
    attention(q, k, v)
    assert all(plan.launch.template is not None for plan in launcher._plans.values())


def test_addresses_that_other_tensors_had_before():
    """Descriptors are kept by address: a new tensor there must be read, also one of another shape."""
    for seed in range(20):
        for shape in ((2, 4, 128, 64), (4, 4, 64, 64), (2, 2, 256, 64)):
            q, k, v = qkv(*shape, seed=seed)
            right(attention(q, k, v), q, k, v)
            del q, k, v


def test_a_stream_that_is_not_the_default():
    q, k, v = qkv(8, 8, 512, 64)
    attention(q, k, v)
    stream = torch.cuda.Stream()
    for seed in range(3):
        late = torch.empty_like(q)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # whatever runs on another stream would read `late` before it is written
            late.copy_(qkv(8, 8, 512, 64, seed=seed)[0])
            out = attention(late, k, v)
        stream.synchronize()
        right(out, late, k, v)


def test_graph_capture_and_replay():
    q, k, v = qkv()
    attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
        twice = attention(out, k, v)
    for seed in (1, 2):
        for tensor, new in zip((q, k, v), qkv(seed=seed), strict=True):
            tensor.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        right(out, q, k, v)
        right(twice, out, k, v)


def test_a_cold_call_in_a_capture_raises_and_spoils_nothing(monkeypatch):
    # One compiled kernel serves many problems: without this, one that another test has loaded may serve this one.
    monkeypatch.setattr(packet, "_loaded", {})
    launcher.forget()
    q, k, v = qkv(1, 2, 48, 40)
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match="captured"):
            attention(q, k, v, is_causal=True)
        x += 1
    graph.replay()
    assert x.item() == 2
    right(attention(q, k, v, is_causal=True), q, k, v, is_causal=True)


def test_a_new_problem_in_a_capture_works_where_its_kernel_is_loaded():
    launcher.forget()
    tile = {"block_m": 64, "block_n": 64, "backend": "portable"}
    attention(*qkv(2, 4, 128, 64), **tile)
    before = packet.loaded_kernels()
    q, k, v = qkv(2, 4, 256, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, **tile)
    assert packet.loaded_kernels() == before
    graph.replay()
    right(out, q, k, v)


@pytest.mark.parametrize("new_address", [False, True])
def test_a_thread_that_never_called_cuda(new_address):
    q, k, v = qkv()
    out = torch.empty_like(q)
    attention(q, k, v, out=out)
    if new_address:
        out = torch.empty_like(q)
    out.fill_(float("nan"))
    torch.cuda.synchronize()
    wrong = []

    def work():
        try:
            attention(q, k, v, out=out)
        except BaseException as error:
            wrong.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not wrong
    right(out, q, k, v)


def test_several_threads():
    wrong = []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for round in range(30):
                    q, k, v = qkv(1 + i % 3, 2, 64 * (1 + round % 4), 64, seed=i)
                    right(attention(q, k, v), q, k, v)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_current_device_other_than_the_tensors_own():
    for round in range(3):
        for device in ("cuda:1", "cuda:0"):
            q, k, v = qkv(seed=round, device=device)
            out = attention(q, k, v)
            assert str(out.device) == device and torch.cuda.current_device() == 0
            right(out, q, k, v)
    with torch.cuda.device(1):
        q, k, v = qkv(device="cuda:0")
        right(attention(q, k, v), q, k, v)


def test_gradients():
    q, k, v = (t.requires_grad_() for t in qkv())
    want = [t.detach().double().requires_grad_() for t in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*want).sum().backward()
    for _ in range(2):
        for t in (q, k, v):
            t.grad = None
        attention(q, k, v).sum().backward()
        for t, w in zip((q, k, v), want, strict=True):
            torch.testing.assert_close(t.grad.double(), w.grad, rtol=2e-2, atol=2e-3)
        with torch.no_grad():
            assert not attention(q, k, v).requires_grad


def test_inference_mode_and_autocast():
    q, k, v = qkv()
    with torch.inference_mode():
        for _ in range(2):
            right(attention(q, k, v), q, k, v)
    full = tuple(t.float() for t in (q, k, v))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(2):
            out = attention(*full)
            assert out.dtype == torch.bfloat16
            right(out, *(t.bfloat16() for t in full))
            assert attention(q, k, v).dtype == torch.float16
    right(attention(*full), *full)
    with pytest.raises(UnsupportedError, match="float64"):
        attention(*(t.double() for t in full))


def test_nothing_to_compute():
    q, k, v = qkv()
    out, lse = attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 4, 128, 64)
    assert attention(q[:, :, :0], k, v).shape == (2, 4, 0, 64)


def test_nothing_is_allocated_but_the_output():
    q, k, v = qkv(8, 8, 512, 64)
    out = torch.empty_like(q)
    attention(q, k, v, out=out)
    attention(q, k, v)
    gc.collect()  # what other tests left would be given back meanwhile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, out=out)
    assert torch.cuda.max_memory_allocated() == before
    fresh = attention(q, k, v)
    assert torch.cuda.max_memory_allocated() == before + fresh.numel() * 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # says torch once a process
def test_no_synchronisation_and_no_copy():
    q, k, v = qkv()
    attention(q, k, v)
    try:
        torch.cuda.set_sync_debug_mode("error")
        attention(q, k, v)
        attention(*(t[:1] for t in (q, k, v)))
        with pytest.raises(ValueError):
            attention(q, k[..., :8], v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_changed_length_compiles_nothing():
    attention(*qkv(2, 4, 128, 64), block_m=64, block_n=64, backend="portable")
    before = packet.loaded_kernels()
    for length in (256, 384, 512):
        q, k, v = qkv(2, 4, length, 64)
        right(attention(q, k, v, block_m=64, block_n=64, backend="portable"), q, k, v)
    assert packet.loaded_kernels() == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # torch's compiler uses it
def test_compiled_functions():
    torch._dynamo.reset()
    function = torch.compile(lambda q, k, v: attention(q * 1, k, v) * 2, fullgraph=True)
    for seed in (0, 1):
        q, k, v = qkv(seed=seed)
        torch.testing.assert_close(function(q, k, v), attention(q, k, v) * 2)


def test_opcheck():
    q, k, v = qkv(1, 2, 64, 32)
    opcheck(ops.attention, (q, k, v), {"return_lse": True})
    opcheck(ops.attention_out, (q, k, v, torch.empty_like(q)), {})


FORKED = """
import os, torch
from flashcore import attention
child = os.fork()
q = torch.randn(1, 2, 64, 64, device="cuda").half()
out = attention(q, q, q)
want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert (out - want).abs().max() < 1e-2
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("done")
"""

WITHOUT_A_COMPILER = """
import torch
from flashcore import attention
from flashcore.launch import shim
q = torch.randn(1, 2, 64, 64, device="cuda").half()
out = attention(q, q, q)
want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert (out - want).abs().max() < 1e-2
assert shim.status() == "off: no C compiler was found", shim.status()
print("done")
"""


def test_a_fork_before_cuda_starts():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_a_machine_without_a_compiler(tmp_path):
    """Kernels are compiled, loaded and launched without a C compiler, by the Python path."""
    environment = {**os.environ, "PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CC", None)
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
