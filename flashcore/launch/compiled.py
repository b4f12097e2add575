"""Compiling a bound kernel and calling it: the one module that touches Triton's private interfaces.

Compiling goes through `triton.compile` for every purpose, so that what is audited without a GPU is what runs on
one; Triton keeps the result on disk. Launching goes through Triton's own C launcher, with addresses and encoded
TMA descriptors instead of tensors: `JITFunction.run` spends most of its time on binding and specialising
arguments whose answers a `Binding` already holds. The launcher's signature moved between Triton 3.6 and 3.7;
where neither is recognised, `CompiledKernel.run`, whose signature has not moved, serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashcore.core.errors import UnsupportedError
from flashcore.launch.binding import Binding, Pointer, Scalar, Tma

MAX_GRID_YZ = 65_535  # CUDA's limit for the second and third dimension of a grid


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel compiled for one architecture."""

    kernel: Any  # triton's CompiledKernel; since Triton 3.8 the loaded code lives only as long as this object
    arch: int  # 80, 89, 90

    @property
    def cubin(self) -> bytes:
        """The machine code, an ELF file as cuobjdump and nvdisasm read it."""
        return bytes(self.kernel.asm["cubin"])

    @property
    def ptx(self) -> str:
        return str(self.kernel.asm["ptx"])

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory that one block asks for."""
        return int(self.kernel.metadata.shared)


@dataclass(frozen=True, slots=True)
class Launch:
    """One binding, ready to run on one GPU: `call(*grid, stream, *arguments(addresses))`."""

    compiled: Compiled
    call: Callable[..., Any]  # Triton's launcher
    grid: tuple[int, int, int]
    tensors: tuple[str, ...]  # the tensors that `arguments` wants the addresses of, in this order
    arguments: Callable[[tuple[int, ...]], tuple[Any, ...]]
    style: str  # which of the launcher's signatures it uses: "packed", "flat" or "run"

    def __call__(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Enqueue the kernel. `stream` is a CUstream as a number; the current device must be the stream's."""
        self.call(*self.grid, stream, *self.arguments(addresses))


def compile_for(binding: Binding, arch: int) -> Compiled:
    """Compile `binding` for compute capability `arch` (80, 89, 90 ...); needs no GPU.

    Raises:
        RuntimeError: Triton was told to interpret kernels (TRITON_INTERPRET=1) when the kernel was imported.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if interpreted(binding):
        raise RuntimeError("TRITON_INTERPRET=1 makes Triton run kernels on the CPU; unset it to compile them")
    kernel = triton.compile(_source(binding), target=GPUTarget("cuda", arch, 32), options=dict(binding.options))
    return Compiled(kernel, arch)


def interpreted(binding: Binding) -> bool:
    """Whether Triton's interpreter runs this kernel, as TRITON_INTERPRET=1 asked when it was imported."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(binding.fn, InterpretedFunction)


def interpret(binding: Binding, tensors: Mapping[str, Any]) -> None:
    """Run `binding` on CPU tensors in Triton's interpreter. `tensors` holds what the binding's pointers name."""
    arguments = {name: a.value if isinstance(a, Scalar) else tensors[a.tensor] for name, a in _runtime(binding)}
    binding.fn[binding.grid](**arguments, **binding.constexprs)


# -- compiling --------------------------------------------------------------------------------------------------


def _source(binding: Binding) -> Any:
    if binding.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source

    names = list(binding.fn.arg_names)
    signature = {name: _type(binding.args[name]) if name in binding.args else "constexpr" for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, name in enumerate(names) if _divisible(binding.args.get(name))}
    return Source(binding.fn, signature, dict(binding.constexprs), attributes)


def _type(argument: Pointer | Tma | Scalar) -> str:
    if isinstance(argument, Tma):
        return f"tensordesc<{argument.dtype}[{', '.join(map(str, argument.box))}],{argument.layout!r}>"
    return argument.type


def _divisible(argument: Pointer | Tma | Scalar | None) -> bool:
    return (isinstance(argument, Pointer) and argument.aligned) or (isinstance(argument, Scalar) and argument.divisible)


def identity(binding: Binding) -> tuple[Any, ...]:
    """What the compiled code depends on: two bindings with equal identities share one compilation."""
    return (
        binding.fn,
        tuple((name, _type(a), _divisible(a)) for name, a in binding.args.items()),
        tuple((name, type(value), value) for name, value in binding.constexprs.items()),
        tuple(binding.options.items()),
    )


# -- loading and launching --------------------------------------------------------------------------------------

_loaded: dict[tuple[Any, ...], Compiled] = {}
_lock = threading.Lock()  # compiling from several threads at once only makes each of them wait longer


def load(binding: Binding, device: int, arch: int, before_compiling: Callable[[], None] = lambda: None) -> Launch:
    """`binding` ready to run on CUDA device `device`, which must be the current one.

    `before_compiling` is called first where something must be compiled or loaded, and may refuse by raising.

    Raises:
        UnsupportedError: the grid passes CUDA's limit.
        RuntimeError: the kernel wants scratch memory, which this path never allocates.
    """
    if max(binding.grid[1:]) > MAX_GRID_YZ:
        what = f"a grid of {binding.grid} blocks passes CUDA's limit of {MAX_GRID_YZ} in its second and third dimension"
        raise UnsupportedError(what)
    key = (device, identity(binding))
    with _lock:
        compiled = _loaded.get(key)
        if compiled is None:
            before_compiling()
            compiled = compile_for(binding, arch)
            compiled.kernel._init_handles()  # loads the code into this device's context
            for scratch in ("global_scratch_size", "profile_scratch_size"):
                if getattr(compiled.kernel.metadata, scratch, 0):
                    raise RuntimeError(f"{compiled.kernel.name} wants {scratch}; set no Triton instrumentation")
            _loaded[key] = compiled
    return _launch(binding, compiled)


def _launch(binding: Binding, compiled: Compiled) -> Launch:
    kernel = compiled.kernel
    style, call, head = _launcher(kernel)
    build = _described if style == "run" else _addressed
    make = build(binding, kernel)
    if style == "packed":  # the kernel's arguments are one sequence
        def arguments(addresses: tuple[int, ...]) -> tuple[Any, ...]:
            return (*head, make(addresses))
    else:
        def arguments(addresses: tuple[int, ...]) -> tuple[Any, ...]:
            return (*head, *make(addresses))
    tensors = tuple(a.tensor for _, a in _runtime(binding) if not isinstance(a, Scalar))
    return Launch(compiled, call, binding.grid, tensors, arguments, style)


def _launcher(kernel: Any) -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """(style, function, what it wants between the stream and the kernel's own arguments)."""
    run = kernel.run
    function, metadata = kernel.function, kernel.packed_metadata
    raw = _unwrapped(getattr(run, "launch", None))
    if raw is not None:
        flags = (run.launch_cooperative_grid, run.launch_pdl)
        if hasattr(run, "arg_annotations") and hasattr(run, "kernel_signature"):  # Triton 3.7 and later
            hooks_and_scratch = (None,) * 5
            head = (function, *flags, metadata, *hooks_and_scratch, run.arg_annotations, run.kernel_signature)
            return "packed", raw, head
        if _flat_format() == "iiiKKppOOOOOO":  # Triton 3.6
            return "flat", raw, (function, *flags, None, None, metadata, None, None, None)
    return "run", run, (function, metadata, None, None, None)


def _unwrapped(launch: Any) -> Any:
    """The C function itself: Triton wraps it for kernels with descriptors, to encode each of them on every call."""
    for cell in getattr(launch, "__closure__", None) or ():
        if callable(cell.cell_contents) and not hasattr(cell.cell_contents, "__code__"):
            return cell.cell_contents
    return None if hasattr(launch, "__code__") else launch


def _flat_format() -> str | None:
    from triton.backends.nvidia import driver

    return getattr(driver, "_BASE_ARGS_FORMAT", None)


def _runtime(binding: Binding) -> list[tuple[str, Pointer | Tma | Scalar]]:
    return [(name, binding.args[name]) for name in binding.fn.arg_names if name in binding.args]


def _addressed(binding: Binding, kernel: Any) -> Callable[[tuple[int, ...]], tuple[Any, ...]]:
    """addresses -> the kernel's arguments as the C launcher takes them."""
    template: list[Any] = []
    slots: list[tuple[int, Callable[[int], Any] | None]] = []
    encodings = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    for name in binding.fn.arg_names:
        argument = binding.args.get(name)
        if argument is None:
            template.append(binding.constexprs[name])
        elif isinstance(argument, Scalar):
            template.append(argument.value)
        elif isinstance(argument, Pointer):
            slots.append((len(template), None))
            template.append(0)
        else:
            slots.append((len(template), _encoder(argument, next(encodings))))
            template += [None, *argument.shape, *argument.strides]

    def make(addresses: tuple[int, ...]) -> tuple[Any, ...]:
        filled = template.copy()
        for (slot, encode), address in zip(slots, addresses, strict=True):
            filled[slot] = address if encode is None else encode(address)
        return tuple(filled)

    return make


def _encoder(argument: Tma, encoding: Mapping[str, Any]) -> Callable[[int], Any]:
    from triton.backends.nvidia import driver
    from triton.runtime import driver as active

    utils = active.active.utils
    encode = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    element = driver.TMA_DTYPE_DEVICE_TO_HOST[encoding["elem_type"]]
    shape, strides = list(argument.shape), list(argument.strides)
    swizzle, size, box = encoding["swizzle"], encoding["elem_size"], encoding["block_size"]
    out_of_bounds_is_zero = 0
    return lambda address: encode(address, swizzle, size, element, box, shape, strides, out_of_bounds_is_zero)


def _described(binding: Binding, kernel: Any) -> Callable[[tuple[int, ...]], tuple[Any, ...]]:
    """addresses -> the kernel's arguments as `CompiledKernel.run` takes them."""

    def make(addresses: tuple[int, ...]) -> tuple[Any, ...]:
        rest = iter(addresses)
        filled = []
        for name in binding.fn.arg_names:
            argument = binding.args.get(name)
            if argument is None:
                filled.append(binding.constexprs[name])
            elif isinstance(argument, Scalar):
                filled.append(argument.value)
            elif isinstance(argument, Pointer):
                filled.append(next(rest))
            else:
                filled.append(_descriptor(argument, next(rest)))
        return tuple(filled)

    return make


def _descriptor(argument: Tma, address: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    base = _Address(address, argument.dtype)
    return TensorDescriptor(base, list(argument.shape), list(argument.strides), list(argument.box), argument.layout)


@dataclass(frozen=True, slots=True)
class _Address:
    """As much of a tensor as Triton's descriptors ask for."""

    address: int
    dtype: str

    def data_ptr(self) -> int:
        return self.address
