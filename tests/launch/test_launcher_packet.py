"""Prepared launches: the parameter block against the compiler's, the driver's structures, the shim's descriptors."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
import warnings
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Mask, Problem
from flashcore.core.target import H100
from flashcore.launch import compiled, driver, launcher, packet, shim
from flashcore.launch.binding import Binding, Pointer, Scalar, Tma
from flashcore.launch.capability import reasons
from flashcore.launch.select import KERNELS, candidates


def problem(**changes) -> Problem:
    strides = (4 * 128 * 64, 128 * 64, 64)
    facts = {
        "dtype": torch.float16, "batch": 2, "heads_q": 4, "heads_kv": 4, "seqlen_q": 128, "seqlen_k": 128,
        "head_dim": 64, "head_dim_v": 64, "stride_q": strides, "stride_k": strides, "stride_v": strides,
        "stride_o": strides,
    }  # fmt: skip
    return Problem(**{**facts, **changes})


def parameters_of(ptx: str) -> list[tuple[int, int]]:
    """(offset, size) of each parameter of a PTX entry, laid out as C does."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    assert entry
    found, end = [], 0
    for line in filter(None, (part.strip() for part in entry[1].split(","))):
        array = re.search(r"\.align (\d+) \.b8 \w+\[(\d+)\]", line)
        if array:
            alignment, size = int(array[1]), int(array[2])
        else:
            size = alignment = int(re.match(r"\.param \.[a-z](\d+)", line)[1]) // 8
        end = -(-end // alignment) * alignment
        found.append((end, size))
        end += size
    return found


SCORED = {"window": (40, 20), "softcap": 5.0, "return_lse": True}
VARIATIONS = {
    "plain": {},
    "lse": {"return_lse": True},
    "all of a rectangle": {**SCORED, "mask": Mask(torch.float16, (65536, 16384, 128, 1)), "seqused_k": True},
    "all of packed sequences": {
        **SCORED, "packed": (200, 220), **{f"stride_{name}": (0, 64, 4 * 64) for name in "qkvo"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_block_is_laid_out_as_the_compiled_kernel_reads_it(kernel, variation):
    asked = problem(**VARIATIONS[variation])
    assert not reasons(kernel, asked, H100)
    config = next(c for c in candidates(asked, H100) if c.kernel == kernel)
    binding = launcher.bind(asked, config, 0.125, H100)
    made = compiled.compile_for(binding, 90)
    template = packet.Template(binding, made)
    expected = parameters_of(made.ptx)
    assert list(zip(template.offsets, template.sizes, strict=True)) == expected
    assert template.fits(expected) and not template.fits(expected[:-1]) and not template.fits(None)
    assert len(template.offsets) <= bound("MAX_PARAMETERS") and len(template.block) <= bound("MAX_BLOCK")


def bound(name: str) -> int:
    """A number of the shim's."""
    found = re.search(rf"\b{name} = (\d+),", (Path(shim.__file__).parent / "_shim.c").read_text())
    assert found
    return int(found[1])


def test_two_lengths_share_one_compilation_and_two_flags_do_not():
    def identity(**changes):
        return compiled.identity(launcher.bind(problem(**changes), Config("portable", 64, 64, 4, 2), 0.125, H100))

    assert identity() == identity(seqlen_q=256, seqlen_k=256, batch=7)
    assert identity() != identity(is_causal=True)
    assert identity() != identity(aligned=False)
    assert identity() != identity(dtype=torch.bfloat16)


def test_a_descriptor_is_there_until_it_was_copied(monkeypatch):
    """Copying lets other threads run, which may push it out of the cache of descriptors."""

    class Map:
        def __init__(self, address: int) -> None:
            self.memory = ctypes.create_string_buffer(address.to_bytes(8, "little") * 16, 128)
            self.address = ctypes.addressof(self.memory)

        def __del__(self) -> None:
            ctypes.memset(self.address, 0xEE, 128)

    encode = lru_cache(maxsize=1)(Map)

    def memmove(*what: int) -> None:
        encode(7)  # by another thread
        ctypes.memmove(*what)

    monkeypatch.setattr(packet, "ctypes", SimpleNamespace(**{**vars(ctypes), "memmove": memmove}))
    binding = launcher.bind(problem(), Config("hopper", 64, 64, 4, 1, "", 96), 0.125, H100)
    template = packet.Template(binding, compiled.compile_for(binding, 90))
    template.slots = [(offset, encode) for offset, _ in template.slots]
    addresses = [1 << 9, 2 << 9, 3 << 9, 4 << 9]
    made = template.fill(0, *addresses)
    start = ctypes.c_void_p.from_address(made.parameters).value - template.offsets[0]
    for (offset, _), address in zip(template.slots, addresses, strict=True):
        assert ctypes.string_at(start + offset, 128) == address.to_bytes(8, "little") * 16


def test_a_grid_that_cuda_refuses_is_refused_before():
    binding = Binding(SimpleNamespace(arg_names=[]), False, (1, 70_000, 1), {}, {}, {})
    with pytest.raises(UnsupportedError, match="70000"):
        packet.Launch(binding, SimpleNamespace(), driver.Loaded(1, 2, 3, 4), None)


class Driver:
    """libcuda of a thread that has no context, or has one: a descriptor can be encoded in a context only."""

    def __init__(self, context: int | None, encoded: int = 0) -> None:
        self.context, self.encoded, self.asked = context, encoded, 0

    def cuCtxGetCurrent(self, into):
        into._obj.value = self.context
        return 0

    def cuCtxSetCurrent(self, context):
        self.context = context
        return 0

    def cuTensorMapEncodeTiled(self, *_):
        self.asked += 1
        return self.encoded if self.context else driver.INVALID_CONTEXT

    def cuGetErrorString(self, status, text):
        return 1

    def cuDriverGetVersion(self, into):
        return 0

    cuLaunchKernelEx = None


@pytest.mark.parametrize(
    ("context", "encoded", "raises"), [(None, 0, False), (7, 0, False), (None, 1, True), (7, 1, True)]
)
def test_a_thread_without_a_context_can_encode_descriptors(monkeypatch, context, encoded, raises):
    library = Driver(context, encoded)
    monkeypatch.setattr(driver, "library", lambda: library)
    driver._driver_version.cache_clear()
    metadata = SimpleNamespace(
        launch_pdl=False, launch_cooperative_grid=False, num_ctas=1, num_warps=4, shared=0,
        tensordesc_meta=[{"swizzle": 3, "block_size": [2, 8]}],
    )  # fmt: skip
    made = compiled.Compiled(SimpleNamespace(metadata=metadata), 90)
    tma = Tma("k", "fp16", (2, 8), (8, 1), (2, 8), None)
    binding = Binding(SimpleNamespace(arg_names=["b"]), True, (1, 1, 1), {"b": tma}, {}, {})
    sizes = [(0, size) for size in packet.Template(binding, made).sizes]
    launch = packet.Launch(binding, made, driver.Loaded(1, 7, 3, 4), sizes)
    if raises:
        with pytest.raises(driver.CudaError, match="TMA descriptor"):
            launch.fill(0, 4096)
    else:
        launch.fill(0, 4096)
    assert library.context == 7
    driver._driver_version.cache_clear()


def test_the_driver_structures_have_the_sizes_of_cuda_h():
    assert ctypes.sizeof(driver.LaunchConfig) == 56
    assert driver.LaunchConfig.stream.offset == 32
    assert ctypes.sizeof(driver.LaunchAttribute) == 72
    (pdl,) = driver.launch_attributes(pdl=True, cooperative=False, ctas=1)
    assert (pdl.id, pdl.value[0]) == (6, 1)
    cluster, policy = driver.launch_attributes(pdl=False, cooperative=False, ctas=2)
    assert (cluster.id, list(cluster.value[:3]), policy.id) == (4, [2, 1, 1], 5)


# -- the shim and TMA descriptors -------------------------------------------------------------------------------


def test_the_shim_caches_descriptors_by_address_and_passes_them_by_value(native, monkeypatch):
    """q goes by descriptor, the others by address; the "kernel" reports what it was given."""
    seen: list[tuple[bytes, int, int, int]] = []
    encoded: list[int] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    def kernel(config, function, parameters, extra):
        where = (ctypes.c_void_p * 5).from_address(parameters)
        assert where[0] % 64 == 0  # of a CUtensorMap
        pointers = [ctypes.c_uint64.from_address(at).value for at in where[1:4]]
        seen.append((ctypes.string_at(where[0], 128), *pointers))
        launch = driver.LaunchConfig.from_address(config)
        assert list(launch.grid) == [3, 2, 1] and launch.block[0] == 128 and launch.shared == 77
        attribute = driver.LaunchAttribute.from_address(launch.attributes)
        assert launch.n_attributes == 1 and attribute.id == 6 and attribute.value[0] == 1
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def context(into):
        ctypes.c_void_p.from_address(into).value = 0x77
        return 0

    class Map:
        def __init__(self, address):
            encoded.append(address)
            self.memory = ctypes.create_string_buffer(address.to_bytes(8, "little") * 16, 128)
            self.address = ctypes.addressof(self.memory)

    def empty(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype)

    shim._set_up(native, empty, get_context=shim._address(context), launch_kernel=shim._address(kernel))
    monkeypatch.setattr(shim, "_module", native)
    monkeypatch.setattr(shim, "attend", native.attend)
    template = SimpleNamespace(
        block=bytes(168), offsets=[0, 128, 136, 144, 152], slots=[(0, Map), (128, None), (136, None), (144, None)],
        attributes=(driver.LaunchAttribute * 1)(*driver.launch_attributes(pdl=True, cooperative=False, ctas=1)),
        config=driver.LaunchConfig(grid=(3, 2, 1), block=(128, 1, 1), shared=77),
    )  # fmt: skip
    launch = SimpleNamespace(
        template=template, tensors=("q", "k", "v", "o"), function=5, loaded=driver.Loaded(5, 0x77, 0, 0)
    )
    options = (None, None, False, None, False, "bhsd", None, (-1, -1), 0.0, None, None)
    q, k, v = (torch.zeros(1, 2, 16, 8, dtype=torch.float16) for _ in range(3))
    none = (None, None, None)  # out and the two more tensors
    shim.add(
        (q, k, v, *none), options, launch, problem(), shape=(1, 2, 16, 8), strides=(256, 128, 8, 1), rows=None,
        row_strides=(),
    )  # fmt: skip
    try:
        many = [torch.zeros_like(q) for _ in range(200)]  # more than the cache holds
        for tensor in [q, q, *many, *many[-3:], q]:
            out = native.attend(tensor, k, v, *none, *options)
            map_bytes, k_at, v_at, o_at = seen[-1]
            assert map_bytes == tensor.data_ptr().to_bytes(8, "little") * 16
            assert (k_at, v_at, o_at) == (k.data_ptr(), v.data_ptr(), out.data_ptr())
        assert encoded.count(q.data_ptr()) <= 2 < len(seen)
        assert native.attend(q.bfloat16(), k, v, *none, *options) is None
        assert native.attend(q, k, v, *none, *options[:3], 0.5, *options[4:]) is None
        assert native.attend(q, k, None, *none, *options) is None
        assert native.attend(q, k, v, None, q, None, *options) is None
        assert native.attend(q, k, v, *none, *options[:7], tuple([-1, -1]), *options[8:]) is not None
        with torch.inference_mode():
            assert native.attend(q, k, v, *none, *options) is None
    finally:
        native.forget()
    assert native.attend(q, k, v, *none, *options) is None


def test_the_shim_raises_what_an_encoder_raises(native, monkeypatch):
    def refuse(address):
        raise ValueError("no descriptor")

    zero = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda into: 0)
    shim._set_up(native, torch.empty_strided, get_context=shim._address(zero), launch_kernel=shim._address(zero))
    options = (None,) * 11
    q, k, v = (torch.zeros(1, 1, 8, 8, dtype=torch.float16) for _ in range(3))
    out = torch.empty_like(q)
    slots = ((0, refuse), *[(-1, None)] * 6)
    outputs = ((1, 1, 8, 8), (64, 64, 8, 1), torch.float16, None, (), torch.float32)
    tensors = (q, k, v, out, None, None)
    launch = (0, 1, (1, 1, 1, 32, 0), b"", bytes(128), (0,), slots)
    assert native.add(tensors, options, True, -1, outputs, *launch)
    try:
        with pytest.raises(ValueError, match="no descriptor"):
            native.attend(*tensors, *options)
    finally:
        native.forget()


def test_a_shim_that_is_switched_off_says_so(monkeypatch):
    monkeypatch.setattr(shim, "attend", None)
    monkeypatch.setattr(shim, "_module", None)
    monkeypatch.setattr(shim, "_failure", None)
    monkeypatch.setenv("FLASHCORE_SHIM", "0")
    assert shim.status() == "off: FLASHCORE_SHIM=0"
    assert shim.load() is False


@pytest.fixture
def unbuilt(monkeypatch) -> None:
    """The shim as a new process has it, on a machine that lacks nothing for it."""
    for name in ("attend", "_module", "_failure", "_building"):
        monkeypatch.setattr(shim, name, None)
    monkeypatch.setattr(shim, "_missing", lambda: None)
    monkeypatch.setattr(shim, "_set_up", lambda module: None)


def test_a_shim_that_does_not_build_warns_once_and_stays_off(monkeypatch, unbuilt):
    def fail():
        raise RuntimeError("the compiler is out to lunch")

    monkeypatch.setattr(shim, "_build", fail)
    with pytest.warns(RuntimeWarning, match="out to lunch"):
        assert shim.load() is False
    assert shim.load() is False
    assert "out to lunch" in shim.status()


def test_a_build_that_was_started_is_waited_for_and_happens_once(monkeypatch, unbuilt):
    module, built, go = SimpleNamespace(attend=lambda *arguments: None), [], threading.Event()

    def build() -> Any:
        built.append(threading.current_thread())
        assert go.wait(60)
        return module

    monkeypatch.setattr(shim, "_build", build)
    shim.start()
    shim.start()
    assert shim.attend is None
    loaders = [threading.Thread(target=shim.load) for _ in range(4)]
    for loader in loaders:
        loader.start()
    go.set()
    for loader in loaders:
        loader.join()
    assert shim.load() and shim.attend is module.attend
    assert len(built) == 1 and built[0] is not threading.current_thread()
    shim.start()
    assert shim._building is None


def test_a_build_that_was_started_and_fails_warns_whoever_waits_for_it(monkeypatch, unbuilt):
    monkeypatch.setattr(shim, "_build", lambda: exec("raise OSError('no space left')"))
    shim.start()
    with pytest.warns(RuntimeWarning, match="no space left"):
        assert shim.load() is False
    shim.start()
    assert shim._building is None and shim.load() is False


def test_a_child_that_was_forked_during_a_build_builds_for_itself(monkeypatch, unbuilt):
    module, here, go = SimpleNamespace(attend=lambda *arguments: None), os.getpid(), threading.Event()
    monkeypatch.setattr(shim, "_build", lambda: module if os.getpid() != here or go.wait(60) else None)
    shim.start()
    loader = threading.Thread(target=shim.load)  # holds the lock until the build is done
    loader.start()
    while shim._building is not None:
        time.sleep(0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        served = False
        try:
            served = shim.load() and shim.attend is module.attend
        finally:
            os._exit(0 if served else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go.set()
    loader.join()
    assert shim.load()


@pytest.mark.parametrize("loaded_before", [False, True])
def test_a_disabled_shim_stays_off_when_calls_are_seen_for_the_first_time(monkeypatch, unbuilt, loaded_before):
    """Each of those asks `load` for it."""
    module = SimpleNamespace(attend=lambda *arguments: None)
    monkeypatch.setattr(shim, "_build", lambda: module)
    if loaded_before:
        assert shim.load() and shim.attend is module.attend
    with shim.disabled():
        with shim.disabled():
            assert shim.load() and shim.attend is None
        assert shim.load() and shim.attend is None
        assert shim.status() == "off: disabled for now"
    assert shim.attend is module.attend and shim.status() == "active"


def test_code_is_not_loaded_from_a_folder_that_others_can_write_to(monkeypatch, tmp_path):

    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))  # a knob that was set once no longer reads it
    assert shim._unsafe_cache() is None
    folder.mkdir(mode=0o700)
    assert shim._unsafe_cache() is None
    folder.chmod(0o777)
    assert "others can write" in shim._unsafe_cache()


def test_arguments_of_every_kind_are_bound_by_the_order_of_the_kernel():
    fn = SimpleNamespace(arg_names=["a", "N", "b", "c"])
    tma = Tma("k", "fp16", (2, 8), (8, 1), (2, 8), None)
    args = {"c": Scalar("i32", 3), "a": Pointer("q", "*fp16", True), "b": tma}
    binding = Binding(fn, True, (1, 1, 1), args, {"N": 4}, {})
    assert [type(a).__name__ for a in packet.runtime(binding)] == ["Pointer", "Tma", "Scalar"]
    metadata = SimpleNamespace(
        launch_pdl=False, launch_cooperative_grid=False, num_ctas=1, num_warps=4, shared=0,
        tensordesc_meta=[{"swizzle": 3, "block_size": [2, 8]}],
    )  # fmt: skip
    template = packet.Template(binding, compiled.Compiled(SimpleNamespace(metadata=metadata), 90))
    assert template.sizes == [8, 128, 4, 4, 8, 8, 4, 8, 8]
    assert template.offsets == [0, 64, 192, 196, 200, 208, 216, 224, 232]
    assert [offset for offset, _ in template.slots] == [0, 64]
