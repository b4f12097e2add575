"""A GPU made of ctypes: CPU tensors go through the launch path as CUDA tensors do, down to the driver's call.

The stand-in for cuLaunchKernelEx reads the launch and its parameters from memory, as the hardware would, and computes
what the portable kernel computes, the only one of the A100 that it stands for. So stale plans, wrong addresses, wrong
strides and wrong streams give wrong results here as they would there; only compiling and the GPU's own behaviour are
left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore import reference
from flashcore.core.target import A100
from flashcore.fast import attention_production
from flashcore.launch import compiled, driver, launcher, shim, torch_private
from flashcore.launch.binding import Binding, Pointer, Scalar

CONTEXT = 0x77
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
DTYPES = {"*fp16": torch.float16, "*bf16": torch.bfloat16, "*fp32": torch.float32}
LOG2E = 1.4426950408889634
REAL_LIBRARY = driver.library


class Launched(SimpleNamespace):
    """What one launch was given: function, stream, grid, threads, tensors (name -> address)."""


class FakeGpu:
    """Functions that were "compiled", launches that were made, and the state that a driver keeps."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []  # by function number, which starts at 1
        self.launches: list[Launched] = []
        self.stream = 0
        self.device = -1  # torch's index of CPU tensors
        self.context: int | None = CONTEXT
        self.capturing = False
        self.allocated: list[torch.Tensor] = []
        self.status = 0  # what the next launches return
        self.lock = threading.Lock()
        kernel = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
        context = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        self.cuLaunchKernelEx = kernel(self._launch)
        self.cuCtxGetCurrent = context(self._get_context)

    # -- what the modules under test call

    def compile_for(self, binding: Binding, arch: int) -> compiled.Compiled:
        self.bindings.append(binding)
        metadata = SimpleNamespace(
            name="attention", num_warps=binding.options["num_warps"], num_ctas=1, launch_pdl=False,
            launch_cooperative_grid=False, shared=1024,
        )  # fmt: skip
        return compiled.Compiled(SimpleNamespace(metadata=metadata, asm={"cubin": b"", "ptx": ""}), arch)

    def load(self, image: bytes, name: str, *, shared: int, threads: int, device: int) -> driver.Loaded:
        return driver.Loaded(len(self.bindings), CONTEXT, 128, 0)

    def parameters(self, function: int) -> list[tuple[int, int]]:
        sizes = [8 if isinstance(a, Pointer) else ctypes.sizeof(C_TYPES[a.type]) for a in self._arguments(function)]
        return [(0, size) for size in [*sizes, 8, 8]]

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty_strided(size, stride, dtype=dtype).fill_(float("nan"))
        self.allocated.append(tensor)  # keeps addresses apart
        return tensor

    def cuGetErrorString(self, status: int, text: Any) -> int:
        return 1

    def cuCtxSetCurrent(self, context: int) -> int:
        self.context = context
        return 0

    # -- the driver

    def _arguments(self, function: int) -> list[Pointer | Scalar]:
        binding = self.bindings[function - 1]
        return [binding.args[name] for name in binding.fn.arg_names if name in binding.args]

    def _get_context(self, into: int) -> int:
        ctypes.c_void_p.from_address(into).value = self.context
        return 0

    def _launch(self, config: int, function: int, parameters: int, extra: int) -> int:
        if self.context is None:
            return driver.INVALID_CONTEXT
        if self.status:
            return self.status
        launch = driver.LaunchConfig.from_address(config)
        binding = self.bindings[function - 1]
        where = (ctypes.c_void_p * len(binding.args)).from_address(parameters)
        names = [name for name in binding.fn.arg_names if name in binding.args]
        values: dict[str, Any] = {}
        for name, address in zip(names, where, strict=True):
            argument = binding.args[name]
            kind = ctypes.c_uint64 if isinstance(argument, Pointer) else C_TYPES[argument.type]
            values[name] = kind.from_address(address).value
        self._compute(binding, values, tuple(launch.grid))
        tensors = {a.tensor: values[name] for name, a in binding.args.items() if isinstance(a, Pointer)}
        with self.lock:
            self.launches.append(Launched(
                function=function, stream=launch.stream or 0, grid=tuple(launch.grid), threads=launch.block[0],
                tensors=tensors,
            ))  # fmt: skip
        return 0

    def _compute(self, binding: Binding, values: dict[str, Any], grid: tuple[int, ...]) -> None:
        c = binding.constexprs
        heads_q, batch = (grid[0], grid[2]) if c["CAUSAL"] else (grid[1], grid[2])
        lengths = {"q": values["seqlen_q"], "k": values["seqlen_k"], "v": values["seqlen_k"], "o": values["seqlen_q"]}
        tensors = {}
        for name, length in lengths.items():
            heads = heads_q if name in "qo" else heads_q // c["GROUP"]
            axis = "n" if name in "kv" else "m"
            stride = [c["STRIDE_UNIT"] * values[f"stride_{name}{a}"] for a in ("b", "h", axis)] + [1]
            shape = (batch, heads, length, c["HEAD_DIM"] if name in "qk" else c["HEAD_DIM_V"])
            tensors[name] = at(values[name], shape, stride, DTYPES[binding.args[name].type])
        out, lse = reference.cpu(
            tensors["q"], tensors["k"], tensors["v"], is_causal=c["CAUSAL"], scale=values["qk_scale"] / LOG2E,
            return_lse=True,
        )  # fmt: skip
        tensors["o"].copy_(out)
        if "lse" in values:
            at(values["lse"], lse.shape, lse.stride(), torch.float32).copy_(lse)


def at(address: int, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over memory that something else keeps alive."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@pytest.fixture(params=["python", "shim"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The fake GPU, once for each of the two paths."""
    fake = FakeGpu()
    monkeypatch.setattr(attention_production, "_KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(launcher.targets, "current", lambda device: A100)
    monkeypatch.setattr(launcher, "current_device", lambda: fake.device)
    monkeypatch.setattr(launcher, "raw_stream", lambda device: fake.stream)
    monkeypatch.setattr(launcher, "empty_strided_cuda", fake.empty)
    monkeypatch.setattr(launcher.packet, "_loaded", {})
    monkeypatch.setattr(compiled, "compile_for", fake.compile_for)
    monkeypatch.setattr(driver, "load", fake.load)
    monkeypatch.setattr(driver, "parameters", fake.parameters)
    monkeypatch.setattr(driver, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    launcher.forget()
    if request.param == "python":
        monkeypatch.setattr(shim, "load", lambda: False)
        monkeypatch.setattr(shim, "attend", None)
    else:
        module = request.getfixturevalue("native")
        shim._set_up(
            module, fake.empty, get_context=shim._address(fake.cuCtxGetCurrent),
            launch_kernel=shim._address(fake.cuLaunchKernelEx),
        )  # fmt: skip
        monkeypatch.setattr(shim, "_module", module)
        monkeypatch.setattr(shim, "load", lambda: True)
        monkeypatch.setattr(shim, "attend", module.attend)
    yield fake
    launcher.forget()


@pytest.fixture
def native() -> Iterator[Any]:
    """The C module, or a skip that says what this machine lacks. Tests give it their own functions to call."""
    why = shim._missing()
    if why is not None:
        pytest.skip(f"no compiled path: {why}")
    module = shim._build()
    yield module
    module.forget()
    if torch.cuda.is_available():  # the process may have but one copy of the module: hand it back as it was
        real = REAL_LIBRARY()
        shim._set_up(
            module, torch_private.empty_strided_cuda, get_context=shim._address(real.cuCtxGetCurrent),
            launch_kernel=shim._address(real.cuLaunchKernelEx),
        )  # fmt: skip


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch without the private functions that the launch path prefers."""
    monkeypatch.setattr(torch_private, "_dynamo", None)
    monkeypatch.setattr(launcher, "guard", torch_private.documented_guard)
