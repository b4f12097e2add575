"""Compiling a bound kernel, or C++: the one module that touches Triton's private interfaces.

Compiling goes through `triton.compile` for every purpose, so that what is audited without a GPU is what runs on
one; Triton keeps the result on disk. Loading and launching do without Triton (see packet.py) unless a kernel's
parameters are not the expected ones, and then go through `CompiledKernel.run`, the same since Triton 3.6.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore.launch.binding import Binding, Pointer, Scalar, Tma


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

    @property
    def name(self) -> str:
        """The kernel's name in the machine code."""
        return str(self.kernel.metadata.name)

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 32 * int(self.kernel.metadata.num_warps)

    @property
    def descriptors(self) -> list[dict[str, Any]]:
        """How Triton wants each TMA descriptor encoded, in the order of the kernel's parameters."""
        return list(getattr(self.kernel.metadata, "tensordesc_meta", None) or ())


def compile_for(binding: Binding, arch: int, *, anew: bool = False) -> Compiled:
    """Compile `binding` for compute capability `arch` (80, 89, 90 ...); needs no GPU.

    What Triton has on disk serves, unless it cannot be read: that is compiled again, and replaced.

    Args:
        anew: compile whatever is on disk.

    Raises:
        RuntimeError: Triton was told to interpret kernels (TRITON_INTERPRET=1) when the kernel was imported, or
            to instrument them so that they want scratch memory; or it could not compile: no compiler, a full disk.
    """
    if interpreted(binding):
        raise RuntimeError("TRITON_INTERPRET=1 makes Triton run kernels on the CPU; unset it to compile them")
    kernel = None if anew else _from_disk(binding, arch)
    if kernel is None:
        try:
            kernel = _compile(binding, arch, anew=True)
        except Exception as failure:  # a compiler may raise anything
            raise RuntimeError(f"compiling attention for sm_{arch}: {type(failure).__name__}: {failure}") from failure
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(kernel.metadata, scratch, 0):
            raise RuntimeError(f"{kernel.metadata.name} wants {scratch}, which is never allocated here")
    return Compiled(kernel, arch)


def _from_disk(binding: Binding, arch: int) -> Any:
    """The kernel as Triton has it on disk, or compiles it; None where what is on disk cannot be read."""
    try:
        kernel = _compile(binding, arch, anew=False)
        return kernel if _readable(kernel) else None
    except Exception:  # whatever a damaged file leads to; an error of the compiler comes again
        return None


def _compile(binding: Binding, arch: int, anew: bool) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    with triton.knobs.compilation.scope() if anew else contextlib.nullcontext():
        if anew:
            triton.knobs.compilation.always_compile = True
        return triton.compile(_source(binding), target=GPUTarget("cuda", arch, 32), options=dict(binding.options))


def _readable(kernel: Any) -> bool:
    """Whether a kernel that may come from disk is whole, as far as its two files can tell."""
    wanted = ("name", "num_warps", "shared")
    return kernel.asm["cubin"][:4] == b"\x7fELF" and all(hasattr(kernel.metadata, name) for name in wanted)


def interpreted(binding: Binding) -> bool:
    """Whether Triton's interpreter runs this kernel, as TRITON_INTERPRET=1 asked when it was imported."""
    from triton import JITFunction  # the interpreter's own type needs numpy, which neither torch nor triton asks for

    return not isinstance(binding.fn, JITFunction)


def interpret(binding: Binding, tensors: Mapping[str, Any]) -> None:
    """Run `binding` on CPU tensors in Triton's interpreter. `tensors` holds what the binding's pointers name."""
    arguments = {n: a.value if isinstance(a, Scalar) else tensors[a.tensor] for n, a in binding.args.items()}
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


# -- launching through Triton -------------------------------------------------------------------------------------


def runner(compiled: Compiled) -> Callable[..., None]:
    """Triton's own way to launch: run(*grid, stream, *kernel arguments), constexprs included, TMA as `descriptor`.

    Loads the kernel once more, by Triton's means, on the current device.
    """
    kernel = compiled.kernel
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    nothing = (None, None, None)  # launch metadata, enter hook, exit hook

    def call(gx: int, gy: int, gz: int, stream: int, *arguments: Any) -> None:
        run(gx, gy, gz, stream, function, metadata, *nothing, *arguments)

    return call


def descriptor(argument: Tma, address: int) -> Any:
    """`argument` at `address`, as `runner` takes it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    base = _Address(address + argument.offset, argument.dtype)
    return TensorDescriptor(base, list(argument.shape), list(argument.strides), list(argument.box), argument.layout)


@dataclass(frozen=True, slots=True)
class _Address:
    """As much of a tensor as Triton's descriptors ask for."""

    address: int
    dtype: str

    def data_ptr(self) -> int:
        return self.address


# -- the compiler for the host ------------------------------------------------------------------------------------


def build_library(
    name: str, source: Path, folder: str, *, include_dirs: list[str], library_dirs: list[str], libraries: list[str],
    flags: list[str],
) -> Path:
    """Compile C or C++ into a shared library in `folder`, with the compiler that Triton builds its launcher with.

    Raises:
        RuntimeError: this Triton has no such function, or the compiler failed; what that said is on stderr.
    """  # fmt: skip
    try:
        from triton.runtime.build import _build

        return Path(_build(name, str(source), folder, library_dirs, include_dirs, libraries, flags))
    except (ImportError, TypeError) as error:
        raise RuntimeError(f"this Triton does not build libraries as others do: {error}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{error.cmd[0]} ended with status {error.returncode}") from error
