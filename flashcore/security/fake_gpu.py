"""A GPU made of ctypes: CPU tensors go through the launch path as CUDA tensors do, down to the driver's call.

The stand-in for cuLaunchKernelEx reads the launch and its parameters from memory, as the hardware would, and computes
attention from them, in the place of every kernel that is chosen. So stale plans, wrong addresses, wrong strides and
wrong streams give wrong results here as they would there; only compiling and the GPU's own behaviour are left out.

What may fail on a GPU fails here when told to: allocating, compiling, loading, launching.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from flashcore import reference
from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import A100
from flashcore.fast import attention_production
from flashcore.launch import compiled, driver, launcher, node, packet, shim, torch_private
from flashcore.launch.binding import Binding, Pointer, Scalar

CONTEXT = 0x77
C_TYPES: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*u8"
}  # fmt: skip
_REAL_LIBRARY = driver.library


class Function(NamedTuple):
    """As much of a kernel as a Binding is asked for."""

    arg_names: tuple[str, ...]


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
        self.failing: dict[str, BaseException] = {}  # "empty", "compile", "load" -> what it raises from now on
        self.lock = threading.Lock()
        kernel = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
        context = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        self.cuLaunchKernelEx = kernel(self._launch)
        self.cuCtxGetCurrent = context(self._get_context)

    # -- what the modules under test call

    def compile_for(self, binding: Binding, arch: int, *, anew: bool = False) -> compiled.Compiled:
        self._fail("compile")
        self.bindings.append(binding)
        metadata = SimpleNamespace(
            name="attention", num_warps=binding.options["num_warps"], num_ctas=1, launch_pdl=False,
            launch_cooperative_grid=False, shared=1024,
        )  # fmt: skip
        return compiled.Compiled(SimpleNamespace(metadata=metadata, asm={"cubin": b"", "ptx": ""}), arch)

    def load(self, image: bytes, name: str, *, shared: int, threads: int, device: int) -> driver.Loaded:
        self._fail("load")
        return driver.Loaded(len(self.bindings), CONTEXT, 128, 0)

    def parameters(self, function: int) -> list[tuple[int, int]]:
        sizes = [8 if isinstance(a, Pointer) else ctypes.sizeof(C_TYPES[a.type]) for a in self._arguments(function)]
        return [(0, size) for size in [*sizes, 8, 8]]

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self._fail("empty")
        tensor = torch.empty_strided(size, stride, dtype=dtype).fill_(float("nan"))
        self.allocated.append(tensor)  # keeps addresses apart
        return tensor

    def _fail(self, what: str) -> None:
        if what in self.failing:
            raise self.failing[what]

    def cuGetErrorString(self, status: int, text: Any) -> int:
        return 1

    def cuCtxSetCurrent(self, context: int) -> int:
        self.context = context
        return 0

    # -- the driver

    def _arguments(self, function: int) -> list[Any]:
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
            argument: Any = binding.args[name]
            kind: Any = ctypes.c_uint64 if isinstance(argument, Pointer) else C_TYPES[argument.type]
            values[name] = kind.from_address(address).value
        self._compute(binding, values)
        tensors = {a.tensor: values[name] for name, a in binding.args.items() if isinstance(a, Pointer)}
        with self.lock:
            self.launches.append(Launched(
                function=function, stream=launch.stream or 0, grid=tuple(launch.grid), threads=launch.block[0],
                tensors=tensors,
            ))  # fmt: skip
        return 0

    def _compute(self, binding: Binding, values: dict[str, Any]) -> None:
        c, n = binding.constexprs, SimpleNamespace(**values)
        sizes = {"q": n.seqlen_q, "k": n.seqlen_k, "v": n.seqlen_k, "o": n.seqlen_q}
        tensors = {}
        for name, length in sizes.items():
            shape = (n.batch, n.heads_q if name in "qo" else n.heads_kv, length, n.dim if name in "qk" else n.dim_v)
            if c["PACKED"]:
                shape = (1, shape[1], n.total_q if name in "qo" else n.total_k, shape[3])
            stride = [values[f"stride_{name}{axis}"] for axis in "bhs"] + [1]
            tensors[name] = at(values[name], shape, stride, c["DTYPE"])
        q, k, v, o = tensors.values()
        options: dict[str, Any] = {
            "is_causal": c["CAUSAL"], "scale": n.scale, "window": (n.left, n.right), "softcap": n.softcap,
            "return_lse": True,
        }  # fmt: skip
        scores = (n.batch, n.heads_q, n.seqlen_q, n.seqlen_k)
        if "mask" in values:
            strides = [values[f"stride_mask{axis}"] for axis in "bhqk"]
            assert all(s == 0 or size > 1 for s, size in zip(strides, scores, strict=True))
            options["attn_mask"] = at(values["mask"], scores, strides, c["MASK"])
        if "seqused_k" in values:
            options["seqused_k"] = at(values["seqused_k"], (n.batch,), (1,), torch.int32)
        lse = at(values["lse"], scores[:3], contiguous(scores[:3]), torch.float32) if "lse" in values else None
        if not c["PACKED"]:
            self._attend(q, k, v, o, lse, options)
            return
        if lse is not None:
            lse = at(values["lse"], (1, n.heads_q, n.total_q), (0, n.total_q, 1), torch.float32)
        cu_q, cu_k = (at(values[f"cu_seqlens_{x}"], (n.batch + 1,), (1,), torch.int32).tolist() for x in "qk")
        for b in range(n.batch):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            assert rows.stop - rows.start <= n.seqlen_q and keys.stop - keys.start <= n.seqlen_k
            part = None if lse is None else lse[:, :, rows]
            self._attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows], part, options)

    def _attend(self, q: Any, k: Any, v: Any, o: Any, lse: Any, options: dict[str, Any]) -> None:
        out, found = reference.cpu(q, k, v, **options)
        o.copy_(out)
        if lse is not None:
            lse.copy_(found)


def bind(problem: Problem, config: Config, scale: float, target: Any) -> Binding:
    """The fake GPU's only kernel: it takes every number of a problem at run time."""
    p = problem
    args: dict[str, Any] = {name: Pointer(name, POINTERS[p.dtype], p.aligned) for name in "qkvo"}
    if p.return_lse:
        args["lse"] = Pointer("lse", "*fp32", True)
    if p.mask is not None:
        args["mask"] = Pointer("mask", POINTERS[p.mask.dtype], p.mask.aligned)
        args |= {f"stride_mask{x}": Scalar("i64", s) for x, s in zip("bhqk", p.mask.strides, strict=True)}
    if p.seqused_k:
        args["seqused_k"] = Pointer("seqused_k", "*i32", False)
    if p.packed:
        args |= {name: Pointer(name, "*i32", False) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        args |= {"total_q": Scalar("i32", p.packed[0]), "total_k": Scalar("i32", p.packed[1])}
    for name, strides in zip("qkvo", (p.stride_q, p.stride_k, p.stride_v, p.stride_o), strict=True):
        args |= {f"stride_{name}{axis}": Scalar("i64", s) for axis, s in zip("bhs", strides, strict=True)}
    numbers = {
        "batch": p.batch, "heads_q": p.heads_q, "heads_kv": p.heads_kv, "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k, "dim": p.head_dim, "dim_v": p.head_dim_v, "left": p.window[0], "right": p.window[1],
    }  # fmt: skip
    args |= {name: Scalar("i32", number) for name, number in numbers.items()}
    args |= {"scale": Scalar("fp32", scale), "softcap": Scalar("fp32", p.softcap)}
    constexprs = {
        "CAUSAL": p.is_causal, "PACKED": p.packed is not None, "DTYPE": p.dtype,
        "MASK": None if p.mask is None else p.mask.dtype,
    }  # fmt: skip
    options = {"num_warps": config.num_warps}
    return Binding(Function((*args, *constexprs)), False, (config.block_m, 1, 1), args, constexprs, options)


def contiguous(shape: Any) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def at(address: int, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over memory that something else keeps alive."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@contextlib.contextmanager
def installed(native: Any = None, attach: Any = None) -> Iterator[FakeGpu]:
    """Let attention of CPU tensors run on a fake GPU: through the compiled shim `native`, or the Python path.

    `attach` is what makes the shim's graph nodes, as _node.cpp gives it; None = autograd.Functions do.
    """
    fake = FakeGpu()
    if native is not None:
        shim._set_up(
            native, fake.empty, get_context=shim._address(fake.cuCtxGetCurrent),
            launch_kernel=shim._address(fake.cuLaunchKernelEx),
        )  # fmt: skip
        native.use_node(attach)
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (attention_production, "KERNEL_DEVICES", ("cuda", "cpu")),
            (targets, "current", lambda device: A100),
            (launcher, "bind", bind),
            (launcher, "current_device", lambda: fake.device),
            (launcher, "raw_stream", lambda device: fake.stream),
            (launcher, "empty_strided_cuda", fake.empty),
            (packet, "_loaded", {}),
            (compiled, "compile_for", fake.compile_for),
            (driver, "load", fake.load),
            (driver, "parameters", fake.parameters),
            (driver, "library", lambda: fake),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "is_current_stream_capturing", lambda: fake.capturing),
            (shim, "start", lambda: None),
            (shim, "load", lambda: native is not None),
            (node, "load", lambda: attach is not None),
            (shim, "attend", None if native is None else native.attend),
            (shim, "_module", native if native is not None else shim._module),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        launcher.forget()
        try:
            yield fake
        finally:
            launcher.forget()


@contextlib.contextmanager
def native() -> Iterator[Any]:
    """The shim's C module, to be given other functions to call; None where this machine cannot build it."""
    if shim._missing() is not None:
        yield None
        return
    module = shim._build()
    try:
        yield module
    finally:
        module.forget()
        module.use_node(None)
        if torch.cuda.is_available():  # the process may have but one copy of the module: hand it back as it was
            real = _REAL_LIBRARY()
            shim._set_up(
                module, torch_private.empty_strided_cuda, get_context=shim._address(real.cuCtxGetCurrent),
                launch_kernel=shim._address(real.cuLaunchKernelEx),
            )  # fmt: skip
            module.use_node(node._attach)
