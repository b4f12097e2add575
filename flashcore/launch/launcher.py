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
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import Target
from flashcore.launch import cpu, packet, shim
from flashcore.launch.arguments import (
    ALIGNMENT,
    Options,
    check_overlap,
    lse_shape,
    output_shape,
    packed_problem_of,
    problem_of,
)
from flashcore.launch.binding import TENSORS, Binding
from flashcore.launch.packet import Launch, Packet
from flashcore.launch.select import select
from flashcore.launch.torch_private import (
    Guard,
    current_device,
    dispatch_modes,
    empty_strided_cuda,
    guard,
    raw_stream,
)

MAX_PLANS = 256
MAX_GUARDS = 8  # entries for one set of options and shapes: strides, dtypes, devices, grad and autocast states
MAX_PACKETS = 1024  # combinations of stream and addresses kept for one plan; about 1 KiB each

Result = Tensor | tuple[Tensor, Tensor] | None
# (q, k, v, out or None, *the other tensors of the call in the order of binding.TENSORS, those that were left out too)
Run = Callable[..., Result]
Given = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # q, k, v, out and two more
Key = tuple[Any, ...]  # the options of a call, as the caller wrote them, and which of its tensors were left out


class Entry(NamedTuple):
    """A call seen before."""

    guard: Guard  # over its tensors in the order in which a Run takes them, without those that were left out
    run: Run  # gives None where the call needs another look after all


class Kernel(NamedTuple):
    """What runs a call by launching a kernel, with all that does not depend on the tensors' addresses."""

    plan: Plan
    device: int
    problem: Problem
    shape: tuple[int, ...]  # the output's
    rows: tuple[int, ...] | None  # the lse's shape, None = none is asked for


class Plan(NamedTuple):
    """One problem on one device, ready to launch."""

    config: Config
    launch: Launch
    packets: dict[tuple[int, ...], Packet]  # by stream and the tensors' addresses, in the order of binding.TENSORS


recent: dict[Key, Entry] = {}
recent_into: dict[Key, Entry] = {}  # the same for calls with `out`
_entries: OrderedDict[tuple[Any, ...], list[Entry]] = OrderedDict()
_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_lock = threading.RLock()


# -- calls seen before ------------------------------------------------------------------------------------------


def find(key: Key, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *extras: Tensor | None) -> Entry | None:
    """The entry for a call that `recent` has lost to another one, which it replaces there."""
    tensors = present(q, k, v, out, *extras)
    for entry in _entries.get((key, out is None, q.shape, k.shape), ()):
        if entry.guard(*tensors):
            _latest(key, out, entry)
            return entry
    return None


def recall(
    key: Key, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Result:
    """What a call with more tensors than q, k, v and out gives; None where it was not seen before, or others have to
    see it.
    """
    if dispatch_modes() or forward_ad._current_level >= 0:
        return None
    try:
        entry = recent.get(key) if out is None else recent_into.get(key)
        if entry is None or not entry.guard(*present(q, k, v, out, a, b)):
            entry = find(key, q, k, v, out, a, b)
    except (TypeError, AttributeError):  # an option without a hash, as a list; an argument that is no tensor
        return None
    return None if entry is None else entry.run(q, k, v, out, a, b)


def present(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors that were not left out."""
    return [t for t in tensors if t is not None]


def remember(key: Key, tensors: Given, run: Run) -> None:
    """Let `run` serve calls that look like this one from now on."""
    q, k, _, out, *_ = tensors
    given = present(*tensors)
    entry = Entry(guard(*given), run)
    if not entry.guard(*given):
        return  # nothing would ever pass it
    with _lock:
        others = _entries.pop((key, out is None, q.shape, k.shape), [])
        _entries[key, out is None, q.shape, k.shape] = [entry, *others[: MAX_GUARDS - 1]]
        while len(_entries) > MAX_PLANS:
            _entries.popitem(last=False)
        _latest(key, out, entry)


def remember_compiled(tensors: Given, options: Key, kernel: Kernel | None) -> shim.Entry | None:
    """Let the compiled shim, where there is one, launch `kernel` for calls that look like this one.

    `options` are what the shim is called with after the tensors.
    """
    if kernel is None or not shim.load():
        return None
    return shim.add(
        tensors, options, kernel.plan.launch, kernel.problem, shape=kernel.shape, strides=_contiguous(kernel.shape),
        rows=kernel.rows, row_strides=_contiguous(kernel.rows or ()),
    )  # fmt: skip


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
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Run, Kernel | None]:
    """Make what runs a call on CUDA tensors that `check` passed, for tensors that look like these.

    Returns what runs it, and the kernel that it launches, if any.

    Raises:
        As `attention` does.
    """
    if options.backend == "reference":
        return _reference(options), None
    shape = output_shape(q, v)
    rows = lse_shape(q, options.layout) if options.return_lse else None
    if 0 in shape or k.numel() == 0:
        return _no_keys(shape, rows, q.dtype, q.device), None
    problem = problem_of(q, k, v, out, options, attn_mask, seqused_k)
    kernel = _kernel(q.get_device(), problem, options, shape, rows)

    def again(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *extra: Tensor | None) -> Run:
        return prepare(q, k, v, out, options, *extra)[0]

    return _runner(kernel, again), kernel


def prepare_packed(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, options: Options,
) -> tuple[Run, Kernel | None]:
    """`prepare` for packed sequences, which `check_packed` has passed."""
    if options.backend == "reference":
        return _packed_reference(options, max_seqlen_q, max_seqlen_k), None
    shape = output_shape(q, v)
    rows = (shape[1], shape[0]) if options.return_lse else None
    sequences = cu_seqlens_q.shape[0] - 1
    if 0 in shape or k.numel() == 0 or 0 in (sequences, max_seqlen_q, max_seqlen_k):
        return _no_keys(shape, rows, q.dtype, q.device, max_seqlen_q), None
    problem = packed_problem_of(q, k, v, out, sequences, max_seqlen_q, max_seqlen_k, options)
    kernel = _kernel(q.get_device(), problem, options, shape, rows)

    def again(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *lengths: Tensor) -> Run:
        return prepare_packed(q, k, v, out, lengths[0], lengths[1], max_seqlen_q, max_seqlen_k, options)[0]

    return _runner(kernel, again), kernel


def _kernel(
    device: int, problem: Problem, options: Options, shape: tuple[int, ...], rows: tuple[int, ...] | None
) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(plan_for(device, problem, options), device, problem, shape, rows)


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
            config = choose(problem, target, options)
            binding = bind(problem, config, options.scale_for(problem.head_dim), target)
            plan = _plans[key] = Plan(config, packet.load(binding, device, target.arch, _before_compiling), {})
        _plans.move_to_end(key)
        while len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
        return plan


def choose(problem: Problem, target: Target, options: Options) -> Config:
    """`select` for a call of these options.

    Packed sequences come in ever new totals, so theirs is the choice for the sizes rounded up: totals and number of
    sequences to powers of two, lengths to whole tiles. It is made once for each and costs nothing afterwards.

    Raises:
        As `select` does.
    """
    if problem.packed is None:
        return select(problem, target, backend=options.backend, block_m=options.block_m, block_n=options.block_n)
    total_q, total_k = problem.packed
    rounded = replace(
        problem, packed=(_power_of_two(total_q), _power_of_two(total_k)), batch=_power_of_two(problem.batch),
        seqlen_q=-(-problem.seqlen_q // 64) * 64, seqlen_k=-(-problem.seqlen_k // 64) * 64,
    )  # fmt: skip
    return _select_once(rounded, target, options.backend, options.block_m, options.block_n)


@lru_cache(maxsize=MAX_PLANS)
def _select_once(
    problem: Problem, target: Target, backend: str | None, block_m: int | None, block_n: int | None
) -> Config:
    return select(problem, target, backend=backend, block_m=block_m, block_n=block_n)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


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


def _before_compiling() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention() meets this problem for the first time while a CUDA graph is being captured, where no kernel"
            " can be compiled or loaded; call it once, or flashcore.warmup, before the capture"
        )
    shim.start()  # two compilers at once: the first call of a process waits for the slower one


# -- what runs a call -------------------------------------------------------------------------------------------


def _runner(kernel: Kernel, again: Callable[..., Run]) -> Run:
    """What runs `kernel`; `again` makes what runs tensors like its own of another alignment."""
    plan, device, problem, shape, rows = kernel
    launch, packets = plan.launch, plan.packets
    call, function, start = launch.call, launch.function, launch.launch
    dtype, aligned = problem.dtype, problem.aligned
    mask_aligned = None if problem.mask is None else problem.mask.aligned
    strides, row_strides = _contiguous(shape), _contiguous(rows or ())
    fp32 = torch.float32
    names = [n for n in TENSORS if n != "lse" or rows is not None]
    if problem.packed is None:
        names = [n for n in names if n in ("q", "k", "v", "o", "lse") or getattr(problem, n, None)]
    else:
        names = [n for n in names if n not in ("mask", "seqused_k")]
    order = [names.index(name) for name in launch.tensors]
    assert len(order) == len(names), f"{plan.config.kernel} does not read all of {names}"

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *extras: Tensor | None) -> Result:
        if current_device() != device:
            with torch.cuda.device(device):
                return run(q, k, v, out, *extras)
        o = empty_strided_cuda(shape, strides, dtype) if out is None else out
        key: tuple[int, ...]
        if rows is None:
            key = (raw_stream(device), q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr())
        else:
            lse = empty_strided_cuda(rows, row_strides, fp32)
            key = (raw_stream(device), q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr())
        if extras:
            key += tuple([t.data_ptr() for t in extras if t is not None])
        prepared = packets.get(key)
        if prepared is None:
            if not fits(key):
                return other_alignment(q, k, v, out, *extras)
            prepared = fill(key, q, k, v, out, *extras)
        config, parameters, _ = prepared
        if call(config, function, parameters, None):
            start(prepared)
        return o if rows is None else (o, lse)

    def fits(key: tuple[int, ...]) -> bool:
        if all(address % ALIGNMENT == 0 for address in key[1:5]) != aligned:
            return False
        return mask_aligned is None or (key[1 + names.index("mask")] % ALIGNMENT == 0) == mask_aligned

    def fill(
        key: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *extras: Tensor | None
    ) -> Packet:
        if out is not None:
            check_overlap(out, q=q, k=k, v=v, attn_mask=extras[0] if mask_aligned is not None else None)
        stream, *addresses = key
        prepared = launch.fill(stream, *[addresses[i] for i in order])
        if len(packets) >= MAX_PACKETS:
            packets.clear()
        packets[key] = prepared
        return prepared

    others: dict[tuple[bool, ...], Run] = {}  # what runs tensors like these of another alignment, once there were some

    def other_alignment(*tensors: Tensor | None) -> Result:
        alignment = tuple(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)
        if alignment not in others:
            others[alignment] = again(*tensors)
        return others[alignment](*tensors)

    return run


def _no_keys(
    shape: tuple[int, ...], rows: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device,
    longest: int | None = None,
) -> Run:
    """Runs calls that read nothing: every row gives 0 and lse -inf. `longest`, given where sequences are packed: their
    rows at most; rows of no sequence are not written.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *extras: Tensor | None) -> Result:
        if out is None:
            o = torch.zeros(shape, dtype=dtype, device=device)
        elif longest is None:
            o = out.zero_()
        else:
            cu_seqlens_q: Any = extras[0]
            o = out.masked_fill_(_rows_of_sequences(cu_seqlens_q, out.shape[0], longest)[:, None, None], 0)
        return o if rows is None else (o, torch.full(rows, -torch.inf, dtype=torch.float32, device=device))

    return run


def _rows_of_sequences(cu_seqlens: Tensor, total: int, longest: int) -> Tensor:
    """bool [total], which rows belong to a sequence: what the kernels make of any cu_seqlens, without a look at it."""
    bounds = cu_seqlens.long()
    first = bounds[:-1].clamp(0, total)
    end = torch.minimum(torch.maximum(bounds[1:].clamp(max=total), first), first + longest)
    edges = torch.zeros(total + 1, dtype=torch.int32, device=cu_seqlens.device)
    one = torch.ones_like(first, dtype=torch.int32)
    return edges.index_add_(0, first, one).index_add_(0, end, -one).cumsum(0)[:total] > 0


def _reference(options: Options) -> Run:
    def run(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, mask: Tensor | None = None, used: Tensor | None = None
    ) -> Result:
        if out is not None:
            check_overlap(out, q=q, k=k, v=v, attn_mask=mask)
        o, lse = cpu.reference(q, k, v, out, options, mask, used)
        return (o, lse) if options.return_lse else o

    return run


def _packed_reference(options: Options, max_seqlen_q: int, max_seqlen_k: int) -> Run:
    def run(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
    ) -> Result:
        if out is not None:
            check_overlap(out, q=q, k=k, v=v)
        o, lse = cpu.packed_reference(
            q, k, v, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options
        )
        return (o, lse) if options.return_lse else o

    return run


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
