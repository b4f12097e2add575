"""Contestants on one shape: prepared, held against the error gate, then timed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark import results
from flashcore.benchmark.peers import NotServedError, Peer, Prepared
from flashcore.benchmark.shapes import SEED, Shape
from flashcore.benchmark.terminal import kind_of
from flashcore.measure import clocks, machine, second_opinion, statistics
from flashcore.testing import gates

REPLAYS = 30
ATTEMPTS = 3  # to time what is left after a contestant failed while it was timed
OTHER_CLOCK = "the other clock"  # who is to blame where a cross-check ends the process; no contestant

Inputs = tuple[Tensor, ...]  # q, k, v, and the bias where the shape has one


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a contestant may be timed, and why not.

    status: "ok", "missing" (not installed), "refused" (doesn't serve the shape), "wrong" (failed the error gate),
    "failed" (raised). `errors` are the gate's figures: name -> value and limit. `memory_bytes`: the most that a call
    held at once of torch's memory beyond its inputs, the output included; None without a GPU.
    """

    status: str
    reason: str
    errors: dict[str, dict[str, float]]
    prepared: Prepared | None = None
    memory_bytes: int | None = None

    def as_json(self, peer: Peer) -> dict[str, Any]:
        return {
            "status": self.status,
            "reason": self.reason,
            "version": machine.installed(peer.distribution),
            "errors": self.errors,
            **({} if self.memory_bytes is None else {"memory_bytes": self.memory_bytes}),
        }


def admit(peer: Peer, shape: Shape, inputs: Inputs) -> Admission:
    """Prepare a contestant and hold its output against the gates.

    Raises:
        torch.AcceleratorError or RuntimeError: the CUDA context is lost; nothing in this process can be timed any more.
    """
    q, k, v, *bias = inputs
    memory = None
    try:
        peer.require(shape)
        prepared = peer.prepare(shape, *inputs)
        poison(q)
        with prepared.context():
            out = prepared.output(prepared.call())
            if q.is_cuda:
                memory = peak_memory(prepared.call)
        options = shape.gate(q.device)
        if bias:
            options["attn_mask"] = bias[0]
        verdict = gates.check(out, q, k, v, **options)
    except ImportError as missing:
        return Admission("missing", peer.install or str(missing), {})
    except NotServedError as refusal:
        return Admission("refused", str(refusal), {})
    except NotImplementedError as refusal:
        return Admission("refused", kind_of(refusal), {})
    except Exception as error:
        _require_context()
        return Admission("failed", kind_of(error), {})
    errors = {figure.name: {"value": figure.value, "limit": figure.limit} for figure in verdict.figures}
    if not verdict.passed:
        return Admission("wrong", verdict.failures, errors)
    return Admission("ok", "", errors, prepared, memory)


def _require_context() -> None:
    """Raises again where an error was one of the GPU's: those are final for the whole process."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes of torch's memory that a call holds at once, beyond what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next allocations of this size get: an output not wholly written then shows."""
    held = [torch.full_like(like, float("nan")) for _ in range(4)]
    held.clear()


def gpu_clock(
    peers: Mapping[str, Peer],
    shape: Shape,
    *,
    cold: bool,
    alone: bool = False,
    l2_bytes: int,
    replays: int = REPLAYS,
    watch: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Time admitted peers in turns or, `alone`, each by itself. Returns (name -> timing, name -> why it could not be
    timed).

    A peer that fails meanwhile is left out and the others are timed again. One that loses the CUDA context raises.
    """
    sets = clocks.sets_for_cold(shape.input_bytes, l2_bytes) if cold else 1
    inputs = [shape.inputs(seed=SEED + i) for i in range(sets)]
    failed: dict[str, str] = {}
    at = ""

    def heard(name: str) -> None:
        nonlocal at
        at = name
        watch(name)

    for _ in range(ATTEMPTS):
        contestants: dict[str, clocks.Contestant] = {}
        try:
            for name, peer in peers.items():
                if name not in failed:
                    heard(name)
                    contestants[name] = _contestant([peer.prepare(shape, *each) for each in inputs])
            if not contestants:
                break
            if alone:
                times, counts = clocks.alone_times(contestants, watch=heard)
            else:
                times, counts = clocks.gpu_times(contestants, replays=replays, watch=heard)
        except Exception as error:
            _require_context()
            failed[at] = kind_of(error)
            continue
        return {
            name: results.timing(rounds, calls=counts[name], sets=sets, over_flashcore=_ratio(times, name))
            for name, rounds in times.items()
        }, failed
    return {}, failed


def _ratio(times: Mapping[str, Sequence[float]], name: str) -> dict[str, Any] | None:
    """How many times as long as FlashCore in the same rounds, with the interval."""
    if "flashcore" not in times:
        return None
    return asdict(statistics.ratio_interval(times[name], times["flashcore"]))


def call_clock(
    admitted: Mapping[str, Prepared], *, trials: int, warmup: int, progress: Callable[[int], object] | None = None,
    ratios: bool = False,
) -> dict[str, dict[str, Any]]:
    """Time admitted contestants on the call clock. Returns name -> latency.

    `ratios`: also each one's time divided by FlashCore's, whose interval takes a tenth of a second for 1,000 trials.
    """
    contestants = {name: _contestant([prepared]) for name, prepared in admitted.items()}
    times = clocks.call_times(contestants, trials=trials, warmup=warmup, progress=progress)
    return {name: _latency(times, name, ratios) for name in times}


def host_clock(admitted: Mapping[str, Prepared], *, blocks: int = 50, calls: int = 100) -> dict[str, dict[str, Any]]:
    """Time admitted contestants on the host clock. Returns name -> latency, with its ratio to FlashCore's."""
    times = clocks.host_times({n: _contestant([p]) for n, p in admitted.items()}, blocks=blocks, calls=calls)
    return {name: _latency(times, name, ratios=True) for name in times}


def cross_check(peer: Peer, shape: Shape, watch: Callable[[str], object]) -> dict[str, Any]:
    """One contestant by our gpu clock and by another's (`measure.second_opinion.cross_check`), or the `reason` why not.

    `watch` hears whose turn it is: the contestant's, then OTHER_CLOCK's.
    """
    watch(peer.name)
    admission = admit(peer, shape, shape.inputs())
    if not admission.prepared:
        return {"reason": f"{admission.status}: {admission.reason}"}
    watch(OTHER_CLOCK)
    return second_opinion.cross_check(_contestant([admission.prepared]))


def _latency(times: Mapping[str, Sequence[float]], name: str, ratios: bool) -> dict[str, Any]:
    interval = statistics.median_interval(times[name])
    found = results.latency(statistics.summarize(times[name]), interval.low, interval.high)
    ratio = _ratio(times, name) if ratios else None
    return found if ratio is None else {**found, "over_flashcore": ratio}


def _contestant(prepared: Sequence[Prepared]) -> clocks.Contestant:
    return clocks.Contestant([each.call for each in prepared], prepared[0].context)
