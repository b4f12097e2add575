"""The hot path: from tensors to a kernel on the right stream of the right device.

Three levels, each a bounded cache in front of the next:
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
from flashcore.launch import compiled, cpu
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
    run: Run  # gives None where the call turns out to differ after all


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


def remember(key: Key, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, run: Run) -> None:
    """Let `run` serve calls that look like this one from now on."""
    tensors = (q, k, v) if out is None else (q, k, v, out)
    entry = Entry(guard(*tensors), run)
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
        for cache in (recent, recent_into, _entries, _plans):
            cache.clear()


# -- calls seen for the first time ------------------------------------------------------------------------------


def prepare(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options) -> Run:
    """Check a call on CUDA tensors and make what runs it, for tensors that look like these.

    Raises:
        As `attention` does.
    """
    check(q, k, v, options, out)
    if options.backend == "reference":
        return _reference(options)
    shape = output_shape(q, v)
    rows = lse_shape(q, options.layout) if options.return_lse else None
    if 0 in shape or k.numel() == 0:
        return _no_keys(shape, rows, q.dtype, q.device)
    problem = problem_of(q, k, v, out, options)
    device = q.get_device()
    with torch.cuda.device(device):
        plan = plan_for(device, problem, options)
    return _runner(plan, device, problem.aligned, shape, rows, q.dtype)


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
            binding = bind(problem, config, _scale(problem, options))
            loaded = compiled.load(binding, device, target.arch, _refuse_in_capture)
            plan = _plans[key] = Plan(config, Launch(binding, loaded), {})
        _plans.move_to_end(key)
        while len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
        return plan


def bind(problem: Problem, config: Config, scale: float) -> Binding:
    """The kernel that `config` names, bound to `problem`."""
    if config.kernel == "portable":
        from flashcore.launch import portable

        return portable.bind(problem, config, scale)
    if config.kernel == "hopper":
        from flashcore.launch import hopper

        return hopper.bind(problem, config, scale)
    raise ValueError(f"config.kernel: expected 'portable' or 'hopper', got {config.kernel!r}")


def _scale(problem: Problem, options: Options) -> float:
    return float(problem.head_dim) ** -0.5 if options.scale is None else float(options.scale)


def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention() meets this problem for the first time while a CUDA graph is being captured, where no kernel"
            " can be compiled or loaded; call it once, or flashcore.warmup, before the capture"
        )


# -- what runs a call -------------------------------------------------------------------------------------------


def _runner(
    plan: Plan, device: int, aligned: bool, shape: tuple[int, ...], rows: tuple[int, ...] | None, dtype: torch.dtype
) -> Run:
    launch, packets = plan.launch, plan.packets
    call, function, start = launch.call, launch.function, launch.launch
    strides = _contiguous(shape)
    row_strides = _contiguous(rows or ())
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
        packet = packets.get(key)
        if packet is None:
            packet = fill(key, q, k, v, out)
            if packet is None:
                return None
        config, parameters, _ = packet
        if call(config, function, parameters, None):
            start(packet)
        return o if rows is None else (o, lse)

    def fill(key: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Packet | None:
        stream, *addresses = key
        if all(address % ALIGNMENT == 0 for address in addresses[:4]) != aligned:
            return None
        if out is not None:
            check_overlap(q, k, v, out)
        packet = launch.fill(stream, *[addresses[i] for i in order])
        if len(packets) >= MAX_PACKETS:
            packets.clear()
        packets[key] = packet
        return packet

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
