"""CUDA's driver through ctypes: loading and launching a kernel, encoding TMA descriptors.

One call of cuLaunchKernelEx with everything prepared costs a third of a microsecond on top of the driver's own
time; Triton's launcher, which parses every argument anew, costs about three times that, and like Triton's loader
has to be built by a C compiler first. Only documented driver functions are used, with the structures of cuda.h for
64-bit machines.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

INVALID_CONTEXT = 201  # CUresult
TENSOR_MAP_BYTES = 128  # sizeof(CUtensorMap)
TENSOR_MAP_ALIGNMENT = 64

_DEFAULT_DYNAMIC_SHARED = 48 * 1024  # bytes a block may have without asking for more
_MAX_THREADS_PER_BLOCK = 0  # CUfunction_attribute
_LOCAL_SIZE_BYTES = 3
_NUM_REGS = 4
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_CACHE_PREFER_SHARED = 1  # CUfunc_cache
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_COOPERATIVE = 2
_CLUSTER_DIMENSION = 4
_CLUSTER_SCHEDULING_POLICY = 5
_CLUSTER_POLICY_SPREAD = 1
_ELEMENT_TYPES = {"i8": 0, "fp16": 6, "fp32": 7, "bf16": 9}  # CUtensorMapDataType
_ELEMENT_BYTES = {"i8": 1, "fp16": 2, "fp32": 4, "bf16": 2}
_L2_PROMOTION_128B = 2


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padded to 8 bytes, and a union of 64."""

    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("n_attributes", ctypes.c_uint),
    ]  # fmt: skip


class CudaError(RuntimeError):
    """The driver refused; carries its own description."""


@lru_cache(maxsize=1)
def library() -> Any:
    """libcuda, with the signatures of what is used of it.

    Raises:
        OSError: there is no NVIDIA driver.
    """
    lib = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    lib.cuLaunchKernelEx.argtypes = [pointer] * 4
    lib.cuTensorMapEncodeTiled.argtypes = [pointer, number, ctypes.c_uint, *[pointer] * 5, *[number] * 4]
    lib.cuGetErrorString.argtypes = [number, pointer]
    lib.cuDriverGetVersion.argtypes = [pointer]
    lib.cuCtxGetCurrent.argtypes = [pointer]
    lib.cuCtxSetCurrent.argtypes = [pointer]
    lib.cuDevicePrimaryCtxRetain.argtypes = [pointer, number]
    lib.cuModuleLoadData.argtypes = [pointer, pointer]
    lib.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    lib.cuFuncGetAttribute.argtypes = [pointer, number, pointer]
    lib.cuFuncSetAttribute.argtypes = [pointer, number, number]
    lib.cuFuncSetCacheConfig.argtypes = [pointer, number]
    if hasattr(lib, "cuFuncLoad"):  # CUDA 12.4
        lib.cuFuncLoad.argtypes = [pointer]
    if hasattr(lib, "cuFuncGetParamInfo"):  # CUDA 12.4
        lib.cuFuncGetParamInfo.argtypes = [pointer, ctypes.c_size_t, pointer, pointer]
    return lib


def raise_for(status: int, what: str) -> NoReturn:
    """Raise what a CUresult other than 0 means."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(status, ctypes.byref(text))
    raise CudaError(f"{what}: {(text.value or b'unknown error').decode()} (CUresult {status})")


def current_context() -> int | None:
    """The CUDA context that this thread works in, or None: a thread that never called CUDA has none yet."""
    context = ctypes.c_void_p()
    _expect(library().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    return context.value


def set_context(context: int) -> None:
    """Make this thread work in `context`."""
    _expect(library().cuCtxSetCurrent(context), "cuCtxSetCurrent")


def enter(context: int) -> bool:
    """Make this thread, where it has no context, work in `context`. Returns whether it had none."""
    had_none = current_context() is None
    if had_none:
        set_context(context)
    return had_none


@dataclass(frozen=True, slots=True)
class Loaded:
    """A kernel in a device's memory. It stays there until the process ends."""

    function: int  # CUfunction
    context: int  # CUcontext that it belongs to
    registers: int  # per thread
    local_bytes: int  # per thread: spills and arrays


def load(image: bytes, name: str, *, shared: int, threads: int, device: int) -> Loaded:
    """Load kernel `name` of a cubin on CUDA device `device`, for blocks of `threads` with `shared` dynamic bytes.

    Raises:
        CudaError: the image is for another architecture, or a block needs more than the device has.
    """
    lib = library()
    context = current_context()
    if context is None:
        handle = ctypes.c_void_p()
        _expect(lib.cuDevicePrimaryCtxRetain(ctypes.byref(handle), device), "cuDevicePrimaryCtxRetain")
        context = handle.value or 0
        set_context(context)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _expect(lib.cuModuleLoadData(ctypes.byref(module), image), f"loading {name}")
    _expect(lib.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    if shared > _DEFAULT_DYNAMIC_SHARED:
        _expect(lib.cuFuncSetCacheConfig(function, _CACHE_PREFER_SHARED), f"preferring shared memory for {name}")
        status = lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        _expect(status, f"{shared} bytes of shared memory for a block of {name}")
    if hasattr(lib, "cuFuncLoad"):  # now, not lazily at the first launch, which a graph capture would refuse
        _expect(lib.cuFuncLoad(function), f"loading {name}")
    most = _attribute_of(function, _MAX_THREADS_PER_BLOCK)
    if threads > most:
        raise CudaError(f"{name} with its registers allows {most} threads a block, not {threads}")
    registers, local_bytes = (_attribute_of(function, which) for which in (_NUM_REGS, _LOCAL_SIZE_BYTES))
    return Loaded(function.value or 0, context, registers, local_bytes)


def launch_attributes(*, pdl: bool, cooperative: bool, ctas: int) -> list[LaunchAttribute]:
    """The attributes of a launch: programmatic dependent launch, cooperative grid, cluster of `ctas` blocks in x."""
    attributes = []
    if pdl:
        attributes.append(_attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 1))
    if cooperative:
        attributes.append(_attribute(_COOPERATIVE, 1))
    if ctas != 1:
        attributes.append(_attribute(_CLUSTER_DIMENSION, ctas, 1, 1))
        attributes.append(_attribute(_CLUSTER_SCHEDULING_POLICY, _CLUSTER_POLICY_SPREAD))
    return attributes


def parameters(function: int) -> list[tuple[int, int]] | None:
    """(offset, size) in bytes of each parameter of a loaded kernel, or None where the driver can't tell."""
    lib = library()
    if not hasattr(lib, "cuFuncGetParamInfo"):
        return None
    found: list[tuple[int, int]] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while lib.cuFuncGetParamInfo(function, len(found), ctypes.byref(offset), ctypes.byref(size)) == 0:
        found.append((offset.value, size.value))
    return found


class TensorMap:
    """A CUtensorMap for one address, in memory that it owns."""

    __slots__ = ("_memory", "address")

    def __init__(
        self, base: int, dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
    ) -> None:
        """Encode a tensor of `shape` and `strides` (elements, the last stride is 1) at address `base`.

        Reads outside of the tensor give 0. `swizzle` is a CUtensorMapSwizzle.

        Raises:
            CudaError: the hardware can't describe it.
        """
        rank, element_bytes = len(shape), _ELEMENT_BYTES[dtype]
        self._memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
        self.address = aligned(ctypes.addressof(self._memory))
        # The driver counts dimensions from the innermost one, whose stride is implied.
        sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
        pitches = (ctypes.c_uint64 * rank)(*(element_bytes * stride for stride in reversed(strides[:-1])))
        boxes = (ctypes.c_uint32 * rank)(*reversed(box))
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        status = library().cuTensorMapEncodeTiled(
            self.address, _ELEMENT_TYPES[dtype], rank, base, sizes, pitches, boxes, steps,
            0, swizzle, _L2_PROMOTION_128B, 0,
        )  # fmt: skip
        _expect(status, f"TMA descriptor of shape {list(shape)}, strides {list(strides)}, box {list(box)}")
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) * element_bytes
        if reach < 128 * 1024 and _driver_version() <= 13010:
            # Drivers up to 13.1 set a bit that is wrong for tensors below 128 KiB; CUTLASS clears it too.
            word = ctypes.c_uint64.from_address(self.address + 8)
            word.value &= ~(1 << 21)


def aligned(address: int) -> int:
    """The first address from here on where a CUtensorMap may be."""
    return -(-address // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT


@lru_cache(maxsize=1)
def _driver_version() -> int:
    version = ctypes.c_int()
    library().cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _expect(status: int, what: str) -> None:
    if status:
        raise_for(status, what)


def _attribute_of(function: ctypes.c_void_p, which: int) -> int:
    value = ctypes.c_int()
    _expect(library().cuFuncGetAttribute(ctypes.byref(value), which, function), "cuFuncGetAttribute")
    return value.value


def _attribute(kind: int, *values: int) -> LaunchAttribute:
    attribute = LaunchAttribute(id=kind)
    for i, value in enumerate(values):
        attribute.value[i] = value
    return attribute
