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

_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}


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
        context: the CUDA context that the function lives in.
        direct: whether `call` is the driver's.
    """

    __slots__ = ("call", "compiled", "context", "direct", "fill", "function", "tensors")

    def __init__(self, binding: Binding, compiled: Compiled) -> None:
        """Raises UnsupportedError when the grid passes CUDA's limit."""
        if max(binding.grid[1:]) > MAX_GRID_YZ:
            grid = f"a grid of {binding.grid} blocks"
            raise UnsupportedError(f"{grid} passes CUDA's limit of {MAX_GRID_YZ} in its second or third dimension")
        self.compiled = compiled
        self.function = compiled.function
        self.context = driver.current_context()
        self.tensors = tuple(a.tensor for a in runtime(binding) if not isinstance(a, Scalar))
        template = Template(binding, compiled)
        self.direct = template.fits(driver.parameters(compiled.function))
        self.call: Callable[..., int]
        self.fill: Callable[..., Packet]
        if self.direct:
            self.call, self.fill = driver.library().cuLaunchKernelEx, template.fill
        else:
            self.call, self.fill = _call_triton, partial(_fill_for_triton, binding, triton_side.runner(compiled))

    def __call__(self, stream: int, *addresses: int) -> None:
        """Enqueue the kernel; for callers that launch once."""
        self.launch(self.fill(stream, *addresses))

    def launch(self, packet: Packet) -> None:
        """Enqueue a packet of this launch, in a thread that may never have used CUDA before."""
        status = self.call(packet.config, self.function, packet.parameters, None)
        if status == driver.INVALID_CONTEXT and driver.current_context() is None and self.context is not None:
            driver.set_context(self.context)
            status = self.call(packet.config, self.function, packet.parameters, None)
        if status:
            driver.raise_for(status, "launching attention")


class Template:
    """The parameters of a kernel as cuLaunchKernelEx takes them, all but the stream and the tensors' addresses."""

    def __init__(self, binding: Binding, compiled: Compiled) -> None:
        self.sizes: list[int] = []  # bytes of each parameter
        self.tensors: list[tuple[int, Callable[[int], driver.TensorMap] | None]] = []  # (parameter, descriptor encoder)
        constants: list[tuple[int, bytes]] = []  # (parameter, value)

        def constant(type: str, value: int | float) -> None:
            packed = struct.pack(_FORMATS[type], value)
            constants.append((len(self.sizes), packed))
            self.sizes.append(len(packed))

        encodings = iter(compiled.descriptors)
        for argument in runtime(binding):
            if isinstance(argument, Scalar):
                constant(argument.type, argument.value)
            elif isinstance(argument, Pointer):
                self.tensors.append((len(self.sizes), None))
                self.sizes.append(8)
            else:
                self.tensors.append((len(self.sizes), _encoder(argument, next(encodings))))
                self.sizes.append(driver.TENSOR_MAP_BYTES)
                for size in argument.shape:
                    constant("i32", size)
                for stride in argument.strides:
                    constant("i64", stride)
        for _ in ("global scratch", "profile scratch"):  # null: `load` made sure that the kernel uses none
            constant("i64", 0)

        metadata = compiled.kernel.metadata
        self._attributes = driver.launch_attributes(
            pdl=metadata.launch_pdl, cooperative=metadata.launch_cooperative_grid, ctas=metadata.num_ctas
        )
        self._attribute_array = (driver.LaunchAttribute * len(self._attributes))(*self._attributes)
        gx, gy, gz = binding.grid
        self._config = driver.LaunchConfig(
            grid=(gx * metadata.num_ctas, gy, gz), block=(32 * metadata.num_warps, 1, 1), shared=compiled.shared,
            attributes=ctypes.addressof(self._attribute_array), n_attributes=len(self._attributes),
        )  # fmt: skip
        self._constants = ctypes.create_string_buffer(b"".join(value.ljust(8, b"\0") for _, value in constants))
        self._parameters = [0] * len(self.sizes)
        for i, (parameter, _) in enumerate(constants):
            self._parameters[parameter] = ctypes.addressof(self._constants) + 8 * i

    def fits(self, parameters: list[tuple[int, int]] | None) -> bool:
        """Whether the loaded kernel takes just these parameters, by what the driver says of it."""
        return parameters is not None and [size for _, size in parameters] == self.sizes

    def fill(self, stream: int, *addresses: int) -> Packet:
        """The launch on `stream` for tensors at `addresses`."""
        values = (ctypes.c_uint64 * len(addresses))(*addresses)
        parameters = (ctypes.c_void_p * len(self._parameters))(*self._parameters)
        maps = []
        for i, ((parameter, encode), address) in enumerate(zip(self.tensors, addresses, strict=True)):
            if encode is None:
                parameters[parameter] = ctypes.addressof(values) + 8 * i
            else:
                tensor_map = encode(address)
                parameters[parameter] = tensor_map.address
                maps.append(tensor_map)
        config = driver.LaunchConfig.from_buffer_copy(self._config)
        config.stream = stream
        return Packet(ctypes.addressof(config), ctypes.addressof(parameters), (self, config, parameters, values, maps))


def runtime(binding: Binding) -> list[Pointer | Tma | Scalar]:
    """What is passed when the kernel runs, in the order of its parameters."""
    return [binding.args[name] for name in binding.fn.arg_names if name in binding.args]


def _encoder(argument: Tma, encoding: dict[str, Any]) -> Callable[[int], driver.TensorMap]:
    # A descriptor holds address, shape, strides and box only: whatever tensor is at the address, it stays right.
    @lru_cache(maxsize=MAX_TENSOR_MAPS)
    def encode(address: int) -> driver.TensorMap:
        return driver.TensorMap(
            address, argument.dtype, argument.shape, argument.strides, encoding["block_size"], encoding["swizzle"]
        )

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
