"""The clocks that every speed is stated on; docs/design.md says what each one means.

call      CUDA events around one eager call, synchronised each time: what a caller sees, the launch path included.
gpu       device time: N calls captured in one CUDA graph, the replay's time divided by N.
alone     the same of each contestant by itself for a while, at the clock that its own power leaves the GPU.
rested    gpu with a pause before each replay, at a clock that nothing holds back.
host      CPU time of a call, back to back without synchronisation.

All but `alone` take every contestant at once and interleave them, so that a drift of the clocks, of the temperature or
of a noisy host hits all alike. All results are in microseconds per call, one value per trial, replay or block, and
value i of every contestant comes from the same round.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from flashcore.measure.statistics import median

Call = Callable[[], Any]

WARMUP_US = 200_000  # of GPU time before gpu timings: an idle H100 takes tens of milliseconds to reach its clock
REST_S = 0.012  # behind which calls that a power limit held back took up to a fifth less (results/trials/76)
SETTLE_US, ALONE_US = 300_000, 200_000  # the power limit is enforced within some 100 ms
COLD_FOOTPRINT = 3  # inputs rotate through more than this many times the L2, so that none survives until its turn


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to time.

    `calls` do the same work on different inputs; a clock that wants warm inputs uses the first. `context` is entered
    around a timed region, never inside it: a peer chosen by a global switch isn't charged for turning it.
    """

    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Event(Protocol):
    """A point in a stream, as torch.cuda.Event."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any, /) -> float: ...  # milliseconds


class Device(Protocol):
    """What the clocks need of a GPU; the tests use one whose time is scripted."""

    def event(self, *, in_graph: bool = False) -> Event: ...
    def synchronize(self) -> None: ...
    def capture(self, calls: Sequence[Call]) -> Call: ...


class Cuda:
    """The current CUDA device."""

    def event(self, *, in_graph: bool = False) -> Event:
        """One that is recorded from the host or, `in_graph`, by every replay of a graph that its record is a call of.

        What stands in a graph is not delayed by the host. Such events are waited for with `synchronize` of the device.
        """
        import torch

        event: Event = torch.cuda.Event(enable_timing=True, external=in_graph)
        return event

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> Call:
        """A graph of these calls, one after another; returns its replay.

        As many results are kept alive as there are different calls, so that rotated inputs also write to rotated
        outputs, and one repeated call writes to one place.
        """
        import torch

        live: deque[Any] = deque(maxlen=len(set(map(id, calls))) - 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                live.append(call())
            live.clear()
        replay: Call = graph.replay
        return replay


def rotation(names: Sequence[str], turn: int) -> Sequence[str]:
    """The order of one round. Over 2n rounds of n contestants each one stands in every position twice, and the reversed
    rounds keep it from always following the same neighbour."""
    shift = turn % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned if turn // len(names) % 2 == 0 else turned[::-1]


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def call_times(
    contestants: Mapping[str, Contestant],
    *,
    trials: int = 1000,
    warmup: int = 100,
    device: Device | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[float]]:
    """The call clock: `trials` values per contestant after `warmup` calls of each, interleaved call by call.

    Python's garbage collector rests meanwhile, as in timeit. `progress` is told after every round, outside of what is
    timed, how many rounds were done since it last heard (warm-up rounds included).
    """
    device = device or Cuda()
    names = list(contestants)
    start, end = device.event(), device.event()
    times: dict[str, list[float]] = {name: [] for name in names}
    device.synchronize()
    with _no_collection():
        for turn in range(-warmup, trials):
            for name in rotation(names, turn):
                contestant = contestants[name]
                with contestant.context():
                    call = contestant.calls[0]
                    start.record()
                    call()
                    end.record()
                    end.synchronize()
                if turn >= 0:
                    times[name].append(start.elapsed_time(end) * 1e3)
            if progress:
                progress(1)
    return times


def event_floor(*, trials: int = 1000, device: Device | None = None) -> list[float]:
    """What the call clock reads around nothing, in microseconds: no call on this machine can read less."""
    return call_times({"floor": Contestant([lambda: None])}, trials=trials, device=device)["floor"]


def gpu_times(
    contestants: Mapping[str, Contestant],
    *,
    replays: int = 30,
    replay_us: float = 1000.0,
    most_calls: int = 400,
    warmup_us: float = WARMUP_US,
    rest_s: float = 0.0,
    device: Device | None = None,
    sleep: Callable[[float], object] = time.sleep,
    watch: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The gpu clock: `replays` values per contestant, interleaved replay by replay, and the calls in each one's graph.

    Inputs are as warm as `calls` make them: one call repeats on the same input, several take turns. A graph holds as
    many calls as fill `replay_us`, so that the microsecond between two replays doesn't count, but at most `most_calls`,
    and always whole turns. With `rest_s`, REST_S say, the GPU is idle for so long before each replay: the rested clock,
    what a call takes where requests leave a GPU pauses. `watch` hears whose turn it is, for whoever wants to know where
    a GPU hung.
    """
    device = device or Cuda()
    timed = _replay_timer(device)
    graphs, counts = _capture(contestants, timed, replay_us, most_calls, device, watch)
    names = list(contestants)
    spent, turn = 0.0, 0
    while spent < warmup_us:
        for name in rotation(names, turn):
            watch(name)
            spent += max(timed(graphs[name]), 1.0)
        turn += 1
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(replays):
        for name in rotation(names, turn):
            watch(name)
            if rest_s:  # nothing is under way: the replay before was waited for
                sleep(rest_s)
            times[name].append(timed(graphs[name]) / counts[name])
    return times, counts


def alone_times(
    contestants: Mapping[str, Contestant],
    *,
    turns: int = 4,
    settle_us: float = SETTLE_US,
    measure_us: float = ALONE_US,
    replay_us: float = 1000.0,
    most_calls: int = 400,
    device: Device | None = None,
    watch: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The alone clock: `turns` values per contestant, each the median over `measure_us` behind `settle_us` of GPU time
    with nothing else in between, and the calls in each one's graph.

    Beside others a contestant runs at the clock that the power of all of them leaves a GPU at its limit, alone at the
    one that its own does: what wastes energy is slower alone, what saves it faster.
    """
    device = device or Cuda()
    timed = _replay_timer(device)
    graphs, counts = _capture(contestants, timed, replay_us, most_calls, device, watch)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns):
        for name in rotation(list(contestants), turn):
            watch(name)
            spent, values = 0.0, list[float]()
            while spent < settle_us + measure_us or not values:
                us = max(timed(graphs[name]), 1.0)
                if spent >= settle_us:
                    values.append(us / counts[name])
                spent += 2 * us  # one replay is timed, one runs ahead of it
            times[name].append(median(values))
    return times, counts


def _replay_timer(device: Device) -> Callable[[Call], float]:
    """Times a replay, in microseconds, behind one that is not timed."""
    start, end = device.event(), device.event()

    def timed(replay: Call) -> float:
        replay()  # brings its own data in, and runs while the host submits the rest: no submission is timed
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return timed


def _capture(
    contestants: Mapping[str, Contestant], timed: Callable[[Call], float], replay_us: float, most_calls: int,
    device: Device, watch: Callable[[str], object],
) -> tuple[dict[str, Call], dict[str, int]]:  # fmt: skip
    """Each contestant's graph, of whole turns of its calls that take `replay_us`, and how many calls are in it."""
    graphs: dict[str, Call] = {}
    counts: dict[str, int] = {}
    for name, contestant in contestants.items():
        watch(name)
        turns = len(contestant.calls)
        with contestant.context():
            for call in contestant.calls:  # compiling, loading and workspaces belong before a capture
                call()
            device.synchronize()
            trial_calls = max(turns, 10)
            one = timed(device.capture([contestant.calls[i % turns] for i in range(trial_calls)])) / trial_calls
            wanted = min(math.ceil(replay_us / one), most_calls) if one > 0 else most_calls
            counts[name] = max(1, math.ceil(wanted / turns)) * turns
            graphs[name] = device.capture([contestant.calls[i % turns] for i in range(counts[name])])
    return graphs, counts


def host_times(
    contestants: Mapping[str, Contestant],
    *,
    blocks: int = 100,
    calls: int = 200,
    warmup: int = 100,
    device: Device | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """The host clock: `blocks` values per contestant, each the mean over `calls` calls, interleaved block by block.

    The GPU is idle when a block starts and must keep up with it (a tiny problem, and fewer calls than the launch queue
    holds), or the block would measure the GPU.
    """
    device = device or Cuda()
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        with contestants[name].context():
            for _ in range(warmup):
                contestants[name].calls[0]()
    with _no_collection():
        for turn in range(blocks):
            for name in rotation(names, turn):
                call = contestants[name].calls[0]
                with contestants[name].context():
                    device.synchronize()
                    before = clock()
                    for _ in range(calls):
                        call()
                    after = clock()
                device.synchronize()
                times[name].append((after - before) / 1e3 / calls)
    return times


def sets_for_cold(bytes_per_set: int, l2_bytes: int) -> int:
    """How many input sets a rotation needs for each to have left the L2 before its next turn."""
    return COLD_FOOTPRINT * l2_bytes // max(bytes_per_set, 1) + 1
