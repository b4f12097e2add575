"""The hot path: from tensors to a kernel on the right stream of the right device.

Three levels, each a bounded cache in front of the next, and before them the compiled shim where there is one:
  recent    options -> the Entry that served them last: a guard over the tensors and a function that runs the call
  _entries  options and shapes -> the entries of every call seen lately
  _plans    device, problem and options -> the kernel, loaded and with its parameters laid out
Whatever passes an entry's guard is the call that the entry was made for, in the same state of the dispatcher; only
addresses, stream and current device remain to be looked at. Reading takes no lock, each write replaces one item of
a dict.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import Target
from flashcore.launch import cpu, packet, shim
from flashcore.launch.arguments import (
    ALIGNMENT,
    Options,
    check,
    check_overlap,
    lse_shape,
    output_shape,
    problem_of,
)
from flashcore.launch.binding import Binding
from flashcore.launch.packet import Launch, Packet
from flashcore.launch.select import select
from flashcore.launch.torch_private import Guard, current_device, empty_strided_cuda, guard, raw_stream

MAX_PLANS = 256
MAX_GUARDS = 8  # entries for one set of options and shapes: strides, dtypes, devices, grad and autocast states
MAX_PACKETS = 1024  # combinations of stream and addresses kept for one plan; about 1 KiB each

Result = Tensor | tuple[Tensor, Tensor] | None
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Result]
Key = tuple[Any, ...]  # the options of a call, as the caller wrote them


class Entry(NamedTuple):
    """A call seen before."""

    guard: Guard  # over q, k, v and, where it was given, out
    run: Run  # gives None where the call needs another look after all


class Kernel(NamedTuple):
    """What runs a call by launching a kernel, with all that does not depend on the tensors' addresses."""

    plan: Plan
    device: int
    aligned: bool  # whether q, k, v and out start at multiples of 16 bytes
    shape: tuple[int, ...]  # the output's
    dtype: torch.dtype
    rows: tuple[int, int, int] | None  # the lse's shape, None = none is asked for


class Plan(NamedTuple):
    """One problem on one device, ready to launch."""

    config: Config
    launch: Launch
    packets: dict[tuple[int, ...], Packet]  # by stream and the addresses of q, k, v, out and lse


recent: dict[Key, Entry] = {}
recent_into: dict[Key, Entry] = {}  # the same for calls with `out`
_entries: OrderedDict[tuple[Any, ...], list[Entry]] = OrderedDict()
_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_lock = threading.RLock()


# -- calls seen before ------------------------------------------------------------------------------------------


def find(key: Key, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Entry | None:
    """The entry for a call that `recent` has lost to another one, which it replaces there."""
    tensors = (q, k, v) if out is None else (q, k, v, out)
    for entry in _entries.get((key, out is None, q.shape, k.shape), ()):
        if entry.guard(*tensors):
            _latest(key, out, entry)
            return entry
    return None


def remember(
    key: Key, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, run: Run, kernel: Kernel | None = None
) -> None:
    """Let `run`, which launches `kernel`, serve calls that look like this one from now on."""
    tensors = (q, k, v) if out is None else (q, k, v, out)
    if kernel is not None and shim.load():
        shim.add(
            tensors, key, kernel.plan.launch, aligned=kernel.aligned,
            shape=kernel.shape, strides=_contiguous(kernel.shape), dtype=kernel.dtype,
            rows=kernel.rows, row_strides=_contiguous(kernel.rows or ()),
        )  # fmt: skip
    entry = Entry(guard(*tensors), run)
    if not entry.guard(*tensors):
        return  # nothing would ever pass it
    with _lock:
        others = _entries.pop((key, out is None, q.shape, k.shape), [])
        _entries[key, out is None, q.shape, k.shape] = [entry, *others[: MAX_GUARDS - 1]]
        while len(_entries) > MAX_PLANS:
            _entries.popitem(last=False)
        _latest(key, out, entry)


def _latest(key: Key, out: Tensor | None, entry: Entry) -> None:
    table = recent if out is None else recent_into
    if len(table) >= MAX_PLANS and key not in table:
        table.clear()
    table[key] = entry


def forget() -> None:
    """Drop every entry and plan; compiled kernels stay."""
    with _lock:
        shim.forget()
        for cache in (recent, recent_into, _entries, _plans):
            cache.clear()


# -- calls seen for the first time ------------------------------------------------------------------------------


def prepare(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options
) -> tuple[Run, Kernel | None]:
    """Check a call on CUDA tensors and make what runs it, for tensors that look like these.

    Returns what runs it, and the kernel that it launches, if any.

    Raises:
        As `attention` does.
    """
    check(q, k, v, options, out)
    if options.backend == "reference":
        return _reference(options), None
    shape = output_shape(q, v)
    rows = lse_shape(q, options.layout) if options.return_lse else None
    if 0 in shape or k.numel() == 0:
        return _no_keys(shape, rows, q.dtype, q.device), None
    problem = problem_of(q, k, v, out, options)
    device = q.get_device()
    with torch.cuda.device(device):
        plan = plan_for(device, problem, options)
    kernel = Kernel(plan, device, problem.aligned, shape, q.dtype, rows)
    return _runner(kernel, options), kernel


def plan_for(device: int, problem: Problem, options: Options) -> Plan:
    """The plan for `problem` on CUDA device `device`, made now if need be; the device must be the current one.

    Raises:
        UnsupportedError: no kernel serves the problem.
        ValueError: `block_m` or `block_n` that no kernel has.
        RuntimeError: a kernel must be compiled or loaded while this stream is being captured into a CUDA graph.
    """
    key = (device, problem, options)
    with _lock:
        plan = _plans.get(key)
        if plan is None:
            target = targets.current(device)
            config = select(problem, target, backend=options.backend, block_m=options.block_m, block_n=options.block_n)
            binding = bind(problem, config, options.scale_for(problem.head_dim), target)
            plan = _plans[key] = Plan(config, packet.load(binding, device, target.arch, _refuse_in_capture), {})
        _plans.move_to_end(key)
        while len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
        return plan


def bind(problem: Problem, config: Config, scale: float, target: Target) -> Binding:
    """The kernel that `config` names, bound to `problem`."""
    # Imported here: each brings Triton with it.
    if config.kernel == "portable":
        from flashcore.launch import portable

        return portable.bind(problem, config, scale)
    if config.kernel == "hopper":
        from flashcore.launch import hopper

        return hopper.bind(problem, config, scale, target)
    raise ValueError(f"config.kernel: expected 'portable' or 'hopper', got {config.kernel!r}")


def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention() meets this problem for the first time while a CUDA graph is being captured, where no kernel"
            " can be compiled or loaded; call it once, or flashcore.warmup, before the capture"
        )


# -- what runs a call -------------------------------------------------------------------------------------------


def _runner(kernel: Kernel, options: Options) -> Run:
    plan, device, aligned, shape, dtype, rows = kernel
    launch, packets = plan.launch, plan.packets
    call, function, start = launch.call, launch.function, launch.launch
    strides, row_strides = _contiguous(shape), _contiguous(rows or ())
    order = [("q", "k", "v", "o", "lse").index(name) for name in launch.tensors]
    fp32 = torch.float32

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Result:
        if current_device() != device:
            with torch.cuda.device(device):
                return run(q, k, v, out)
        o = empty_strided_cuda(shape, strides, dtype) if out is None else out
        key: tuple[int, ...]
        if rows is None:
            key = (raw_stream(device), q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr())
        else:
            lse = empty_strided_cuda(rows, row_strides, fp32)
            key = (raw_stream(device), q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr())
        prepared = packets.get(key)
        if prepared is None:
            if all(address % ALIGNMENT == 0 for address in key[1:5]) != aligned:
                return other_alignment(q, k, v, out)
            prepared = fill(key, q, k, v, out)
        config, parameters, _ = prepared
        if call(config, function, parameters, None):
            start(prepared)
        return o if rows is None else (o, lse)

    def fill(key: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Packet:
        if out is not None:
            check_overlap(q, k, v, out)
        stream, *addresses = key
        prepared = launch.fill(stream, *[addresses[i] for i in order])
        if len(packets) >= MAX_PACKETS:
            packets.clear()
        packets[key] = prepared
        return prepared

    others: list[Run] = []  # what runs tensors like these of the other alignment, once there were some

    def other_alignment(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Result:
        if not others:
            others.append(prepare(q, k, v, out, options)[0])
        return others[0](q, k, v, out)

    return run


def _no_keys(
    shape: tuple[int, ...], rows: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> Run:
    """Runs calls that read nothing: every row there is gives 0 and lse -inf."""

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Result:
        o = torch.zeros(shape, dtype=dtype, device=device) if out is None else out.zero_()
        return o if rows is None else (o, torch.full(rows, -torch.inf, dtype=torch.float32, device=device))

    return run


def _reference(options: Options) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Result:
        if out is not None:
            check_overlap(q, k, v, out)
        o, lse = cpu.reference(q, k, v, out, options)
        return (o, lse) if options.return_lse else o

    return run


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
