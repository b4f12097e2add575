"""The hot path: from tensors to a kernel on the right stream of the right device.

A Plan holds what a problem needs on one device: the loaded kernel, its grid, the shapes to allocate. Plans are
made once per problem, under a lock, and kept in a bounded cache, least recently used first out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.launch import compiled, cpu
from flashcore.launch.arguments import (
    Options,
    check,
    check_overlap,
    lse_shape,
    output_shape,
    problem_of,
)
from flashcore.launch.binding import Binding
from flashcore.launch.select import select

MAX_PLANS = 256


class Plan:
    """One problem on one device, ready to launch."""

    __slots__ = ("config", "launch")

    def __init__(self, config: Config, launch: compiled.Launch) -> None:
        self.config = config
        self.launch = launch


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_lock = threading.RLock()


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Compute attention of CUDA tensors; what the operators run.

    Returns (out, lse), where lse is empty unless `options.return_lse`.
    """
    check(q, k, v, options, out)
    if out is not None:
        check_overlap(q, k, v, out)
    if options.backend == "reference":
        out, lse = cpu.reference(q, k, v, out, options)
        return out, lse if options.return_lse else lse.new_empty(0)
    with torch.cuda.device(q.device):
        shape = output_shape(q, v)
        problem = problem_of(q, k, v, out, options)
        nothing = 0 in shape
        plan = None if nothing or problem.seqlen_k == 0 else plan_for(q.device.index, problem, options)
        if out is None:
            out = torch.empty(shape, dtype=q.dtype, device=q.device)
        rows = lse_shape(q, options.layout) if options.return_lse else (0,)
        lse = torch.empty(rows, dtype=torch.float32, device=q.device)
        if plan is not None:
            by_name = {"q": q, "k": k, "v": v, "o": out, "lse": lse}
            addresses = tuple(by_name[name].data_ptr() for name in plan.launch.tensors)
            plan.launch(torch._C._cuda_getCurrentRawStream(q.device.index), addresses)
        elif not nothing:  # no keys: every row attends to nothing
            out.zero_()
            lse.fill_(-torch.inf)
    return out, lse


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
        if plan is not None:
            _plans.move_to_end(key)
            return plan
        target = targets.current(device)
        config = select(problem, target, backend=options.backend, block_m=options.block_m, block_n=options.block_n)
        binding = bind(problem, config, _scale(problem, options))
        plan = Plan(config, compiled.load(binding, device, target.arch, _refuse_in_capture))
        _plans[key] = plan
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
    return problem.head_dim**-0.5 if options.scale is None else options.scale


def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention() meets this problem for the first time while a CUDA graph is being captured, where no kernel"
            " can be compiled or loaded; call it once, or flashcore.warmup, before the capture"
        )
