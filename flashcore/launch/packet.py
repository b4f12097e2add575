"""A launch prepared down to the last byte, so that repeating it is one call of the driver.

A Template knows one binding's parameters in the driver's form. Filled with a stream and the tensors' addresses it
gives a Packet, which stays valid as long as the memory it names does and may be launched any number of times, by
any thread: nobody writes into it again.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from flashcore.core.errors import UnsupportedError
from flashcore.launch import compiled as triton_side
from flashcore.launch import driver
from flashcore.launch.binding import Binding, Pointer, Scalar, Tma
from flashcore.launch.compiled import Compiled

MAX_GRID_YZ = 65_535  # CUDA's limit for the second and third dimension of a grid
MAX_TENSOR_MAPS = 64  # kept for each descriptor parameter; encoding one costs half a microsecond

_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}
_ADDRESS = "*"

Encoder = Callable[[int], driver.TensorMap]


class Packet(NamedTuple):
    """What `Launch.call` takes: call(config, function, parameters, None) -> CUresult."""

    config: Any
    parameters: Any
    memory: Any  # what the two point into


class Launch:
    """One binding, loaded on one device.

    Attributes:
        call: cuLaunchKernelEx, or a stand-in that goes through Triton.
        function: the CUfunction.
        tensors: the names of the tensors that `fill` wants the addresses of, in this order.
        fill: (stream, *addresses) -> Packet.
        template: the parameters' layout, or None where `call` is the stand-in.
    """

    __slots__ = ("call", "fill", "function", "loaded", "template", "tensors")

    def __init__(
        self, binding: Binding, compiled: Compiled, loaded: driver.Loaded, expected: list[tuple[int, int]] | None
    ) -> None:
        """Raises UnsupportedError when the grid passes CUDA's limit; `expected` is what driver.parameters says."""
        if max(binding.grid[1:]) > MAX_GRID_YZ:
            grid = f"a grid of {binding.grid} blocks"
            raise UnsupportedError(f"{grid} passes CUDA's limit of {MAX_GRID_YZ} in its second or third dimension")
        self.loaded = loaded
        self.function = loaded.function
        self.tensors = tuple(a.tensor for a in runtime(binding) if not isinstance(a, Scalar))
        template = Template(binding, compiled)
        self.template: Template | None = template if template.fits(expected) else None
        self.call: Callable[..., int]
        self.fill: Callable[..., Packet]
        if self.template is not None:
            self.call, self.fill = driver.library().cuLaunchKernelEx, self._fill
        else:
            self.call, self.fill = _call_triton, partial(_fill_for_triton, binding, triton_side.runner(compiled))

    def _fill(self, stream: int, *addresses: int) -> Packet:
        assert self.template is not None
        try:
            return self.template.fill(stream, *addresses)
        except driver.CudaError:  # a descriptor's address is looked up in the thread's context
            if not driver.enter(self.loaded.context):
                raise
            return self.template.fill(stream, *addresses)

    def launch(self, packet: Packet) -> None:
        """Enqueue a packet of this launch, in a thread that may never have used CUDA before."""
        status = self.call(packet.config, self.function, packet.parameters, None)
        if status == driver.INVALID_CONTEXT and driver.enter(self.loaded.context):
            status = self.call(packet.config, self.function, packet.parameters, None)
        if status:
            driver.raise_for(status, "launching attention")


_loaded: dict[tuple[Any, ...], tuple[Compiled, driver.Loaded, list[tuple[int, int]] | None]] = {}


def load(binding: Binding, device: int, arch: int, before_compiling: Callable[[], None] = lambda: None) -> Launch:
    """`binding` compiled and loaded on CUDA device `device`, which must be the current one; one caller at a time.

    Bindings of equal `identity` share one kernel. `before_compiling` is called where something must be compiled or
    loaded, and may refuse by raising.
    """
    key = (device, triton_side.identity(binding))
    if key not in _loaded:
        before_compiling()
        compiled = triton_side.compile_for(binding, arch)
        try:
            loaded = _load(compiled, device)
        except driver.CudaError:  # the machine code on disk may be damaged
            compiled = triton_side.compile_for(binding, arch, anew=True)
            loaded = _load(compiled, device)
        _loaded[key] = (compiled, loaded, driver.parameters(loaded.function))
    return Launch(binding, *_loaded[key])


def _load(compiled: Compiled, device: int) -> driver.Loaded:
    return driver.load(compiled.cubin, compiled.name, shared=compiled.shared, threads=compiled.threads, device=device)


def loaded_kernels() -> int:
    """How many kernels this process has loaded, over all devices."""
    return len(_loaded)


class Template:
    """One block of memory with every parameter of a kernel where C would put it, but for the tensors' addresses.

    Attributes:
        block: the parameters; zero where a tensor goes.
        offsets: of each parameter in the block.
        slots: (offset, descriptor encoder or None where the address itself is passed) of each tensor, in order.
        config: the launch but for its stream.
        attributes: what `config` points to.
    """

    __slots__ = ("attributes", "block", "config", "offsets", "sizes", "slots")

    def __init__(self, binding: Binding, compiled: Compiled) -> None:
        arguments = runtime(binding)
        layout = _layout(tuple([_kind(argument) for argument in arguments]))
        self.offsets, self.sizes = layout.offsets, layout.sizes
        encodings = iter(compiled.descriptors)
        encoders: list[Encoder | None] = []
        numbers: list[int | float] = []
        for argument in arguments:
            if isinstance(argument, Scalar):
                numbers.append(argument.value)
            elif isinstance(argument, Pointer):
                encoders.append(None)
            else:
                encoders.append(_encoder(argument, next(encodings)))
                numbers += (*argument.shape, *argument.strides)
        self.slots = list(zip(layout.tensors, encoders, strict=True))
        self.block = layout.block.pack(*numbers)

        metadata = compiled.kernel.metadata
        attributes = driver.launch_attributes(
            pdl=metadata.launch_pdl, cooperative=metadata.launch_cooperative_grid, ctas=metadata.num_ctas
        )
        self.attributes = (driver.LaunchAttribute * len(attributes))(*attributes)
        gx, gy, gz = binding.grid
        self.config = driver.LaunchConfig(
            grid=(gx * metadata.num_ctas, gy, gz), block=(compiled.threads, 1, 1), shared=compiled.shared,
            attributes=ctypes.addressof(self.attributes), n_attributes=len(attributes),
        )  # fmt: skip

    def fits(self, parameters: list[tuple[int, int]] | None) -> bool:
        """Whether the loaded kernel takes just these parameters, by what the driver says of it."""
        return parameters is not None and [size for _, size in parameters] == self.sizes

    def fill(self, stream: int, *addresses: int) -> Packet:
        """The launch on `stream` for tensors at `addresses`, which are in the order of `slots`."""
        memory = ctypes.create_string_buffer(len(self.block) + driver.TENSOR_MAP_ALIGNMENT)
        start = driver.aligned(ctypes.addressof(memory))
        ctypes.memmove(start, self.block, len(self.block))
        for (offset, encode), address in zip(self.slots, addresses, strict=True):
            if encode is None:
                ctypes.c_uint64.from_address(start + offset).value = address
            else:
                found = encode(address)  # held until it is copied: other threads run meanwhile, and the cache is small
                ctypes.memmove(start + offset, found.address, driver.TENSOR_MAP_BYTES)
        parameters = (ctypes.c_void_p * len(self.offsets))(*[start + offset for offset in self.offsets])
        config = driver.LaunchConfig.from_buffer_copy(self.config)
        config.stream = stream
        return Packet(ctypes.addressof(config), ctypes.addressof(parameters), (self, config, parameters, memory))


class _Layout(NamedTuple):
    """Where the parameters of a kernel lie, which follows from their kinds alone."""

    offsets: list[int]
    sizes: list[int]
    tensors: list[int]  # of the offsets, those of tensors
    block: struct.Struct  # packs the numbers, with zeros where a tensor goes


@lru_cache(maxsize=256)
def _layout(kinds: tuple[str | int, ...]) -> _Layout:
    """`kinds` as `_kind` says; what it gives must not be changed."""
    offsets: list[int] = []
    sizes: list[int] = []
    tensors: list[int] = []
    codes, end = "<", 0

    def put(code: str, size: int, alignment: int) -> int:
        nonlocal codes, end
        padding = -end % alignment
        codes += f"{padding}x{code}"
        offsets.append(end + padding)
        sizes.append(size)
        end += padding + size
        return offsets[-1]

    for kind in kinds:
        if isinstance(kind, int):
            maps = driver.TENSOR_MAP_BYTES
            tensors.append(put(f"{maps}x", maps, driver.TENSOR_MAP_ALIGNMENT))
            for code, size in [("i", 4)] * kind + [("q", 8)] * kind:  # its shape and strides
                put(code, size, size)
        elif kind == _ADDRESS:
            tensors.append(put("8x", 8, 8))
        else:
            put(_FORMATS[kind], *[struct.calcsize("<" + _FORMATS[kind])] * 2)
    for _ in ("global scratch", "profile scratch"):  # null: `compile_for` made sure that the kernel uses none
        put("8x", 8, 8)
    return _Layout(offsets, sizes, tensors, struct.Struct(codes))


def _kind(argument: Pointer | Tma | Scalar) -> str | int:
    """A number's type, `_ADDRESS`, or a descriptor's rank."""
    if isinstance(argument, Scalar):
        return argument.type
    return _ADDRESS if isinstance(argument, Pointer) else len(argument.shape)


def runtime(binding: Binding) -> list[Pointer | Tma | Scalar]:
    """What is passed when the kernel runs, in the order of its parameters."""
    return [binding.args[name] for name in binding.fn.arg_names if name in binding.args]


def _encoder(argument: Tma, encoding: dict[str, Any]) -> Encoder:
    # A descriptor holds address, shape, strides and box only: whatever tensor is at the address, it stays right.
    @lru_cache(maxsize=MAX_TENSOR_MAPS)
    def encode(address: int) -> driver.TensorMap:
        return driver.TensorMap(
            address + argument.offset, argument.dtype, argument.shape, argument.strides, encoding["block_size"],
            encoding["swizzle"],
        )  # fmt: skip

    return encode


# -- through Triton ---------------------------------------------------------------------------------------------


def _fill_for_triton(binding: Binding, run: Callable[..., None], stream: int, *addresses: int) -> Packet:
    rest = iter(addresses)
    arguments: list[Any] = []
    for name in binding.fn.arg_names:
        argument = binding.args.get(name)
        if argument is None:
            arguments.append(binding.constexprs[name])
        elif isinstance(argument, Scalar):
            arguments.append(argument.value)
        elif isinstance(argument, Pointer):
            arguments.append(next(rest))
        else:
            arguments.append(triton_side.descriptor(argument, next(rest)))
    return Packet(partial(run, *binding.grid, stream, *arguments), None, None)


def _call_triton(run: Callable[[], None], function: int, parameters: None, extra: None) -> int:
    run()
    return 0
