"""`flashcore audit timing`: does the time that a kernel takes depend on the values it computes with?

dudect's method (leakage.py) on a GPU, with two clocks:

cycles  Each block's own, read from its SM's clock inside an instrumented copy of the kernel (instrument.py). One block
        computes one (batch, head), whose class is drawn anew for every launch: every launch gives measurements of both
        classes, one block on each SM.
wall    Of the shipped kernel: replays of a CUDA graph of calls that all compute one class, in random order. The clock
        is read inside the graph, since a host that is held up lets the GPU idle. Probes in the same graph (probe.py)
        tell whether a difference lies in the cycles or in the clock (elapsed.py).

What the data draw moves the clock of a busy GPU, within microseconds, by far more than the limit: there wall time tells
of the clock and not of the kernel. So it is compared twice. On few blocks, behind calls that are the same for either
class, so that neither the current nor what went before depends on the class: that is gated. And over the whole GPU,
behind calls of the same class, which shows what the clock gives away: that is published.

The class is no address: for either one the same memory is read and written before the kernel runs (classes.Either), so
that a time can't depend on where the values came from.

In the same run a conditional rescale planted in what is timed has to show, by either clock, what a leak looks like. At
last the time of a whole batch is compared by the content of one of its sequences, and by its length, which is public.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Problem
from flashcore.core.target import Target
from flashcore.launch import select
from flashcore.launch.binding import Binding
from flashcore.measure import clocks, machine
from flashcore.security import elapsed, leakage
from flashcore.security.classes import PAIRS, Draw, Either, Inputs, Sizes
from flashcore.security.elapsed import Reading, Reads
from flashcore.security.leakage import Leak

# A block for each (batch, head), four or more tiles of keys each. No more blocks than an H100 has SMs: beside others a
# block's left-out step hides, since theirs fill the gap (the planted rescale then moved the mean by 0.04%). Three times
# its 9 MB, for what is shown and the two classes, stay within half of an H100's L2.
INSIDE = Sizes(8, 8, 64, 512, 64)
# The fewest blocks: of two items, as one input for all is no class of its own where there is but one. A block for each,
# as inside: in what is chosen for so few, of 16 rows, a skipped rescale is too short for a branch, and was no control.
QUIET = Sizes(1, 2, 64, 512, 64)
WHOLE = Sizes(8, 8, 256, 512, 64)  # two blocks an SM, which draw less power than a full one
BATCHES = (1, 8, 32)
IN_BATCH = Sizes(32, 8, 512, 512, 64)
SHORT = 64  # keys of the sequence whose length is compared with a full one's

REFRESH = 64  # launches on the same drawn values, in one graph
GROUP = 32  # wall times in a row, half of them of each class, whose median is taken off as a drift
WARM_UP = 5  # such groups before the first that counts: an idle GPU takes a while to reach its clock
LEAD = 5  # calls in front of those that are timed: they bring the kernel in and the current up
CALLS = 10  # in a graph that are timed
PAUSE = 0.8e-3  # seconds of rest behind a graph of about 0.1 ms: back to back they held an H100 at its 700 W
CYCLES_A_WALL, CYCLES_A_BATCH = 640, 1000  # measurements of cycles for each of wall time, which take far longer
WALLS_A_FULL = 2  # measurements of wall time for each at full load, whose differences are large
DEVICE = "cuda"
CONTROLLED = {"": tuple(PAIRS), "rescale": ("rising/falling",)}  # what is planted -> the pairs it is measured on

Record = dict[str, Any]


class Samples(NamedTuple):
    """Measurements [launches, places], and which of them are of class 1."""

    values: Any
    classes: Any


class Walls(NamedTuple):
    """Wall times in microseconds a call, [groups, places], which of them are of class 1, and what a probe read."""

    times: list[list[float]]
    classes: list[list[bool]]
    readings: list[list[Reading | None]]  # empty without a probe


def inside(
    run: Callable[[], Tensor], shown: Inputs, draw: Draw, sizes: Sizes, measurements: int, generator: torch.Generator,
    device: clocks.Device | None = None, *, each: Callable[[int], object] = lambda turn: None,
) -> Samples:
    """The cycles of at least `measurements` blocks of each class.

    Args:
        run: launches the kernel on `shown`; int64 [batch * heads] cycles.
        shown: the kernel's inputs, into which the values of either class are written.
        each: called in front of every graph of launches with its number, negative where it does not count.
    """
    device = device or clocks.Cuda()
    places = sizes.batch * sizes.heads
    wanted = 2 * measurements + 5 * math.sqrt(2 * measurements)  # drawn, a class falls short once in millions of runs
    graphs = math.ceil(wanted / (REFRESH * places))
    chosen = torch.zeros((REFRESH, places), dtype=torch.int64, device=generator.device)
    cycles = torch.zeros_like(chosen)
    values = torch.empty((graphs, REFRESH, places), dtype=torch.int64, device=generator.device)
    classes = torch.empty_like(values, dtype=torch.bool)
    either = Either(shown)

    def launch(index: int) -> None:
        either.show(chosen[index].view(sizes.batch, sizes.heads, 1, 1))
        cycles[index].copy_(run())

    launch(0)  # loads torch's kernels, which belongs before a capture
    device.synchronize()
    replay = device.capture([partial(launch, index) for index in range(REFRESH)])
    for graph in range(-1, graphs):
        each(graph)
        either.hold(*draw(sizes, generator))
        is_one = torch.rand(chosen.shape, generator=generator, device=generator.device) < 0.5
        torch.neg(is_one.long(), out=chosen)
        replay()
        if graph >= 0:
            values[graph].copy_(cycles)
            classes[graph].copy_(is_one)
    return Samples(values.flatten(0, 1).cpu().numpy(), classes.flatten(0, 1).cpu().numpy())


def wall(
    show: Callable[[bool], object], call: Callable[[], object], measurements: int, generator: torch.Generator,
    device: clocks.Device | None = None, *, lead: Callable[[], object] | None = None, probe: Reads | None = None,
    each: Callable[[int], object] = lambda turn: None, pause: Callable[[float], object] = time.sleep,
) -> Walls:
    """At least `measurements` of each class of the time of `call`; `show` sets the class.

    Args:
        lead: called in front of what is timed; without it `call`, of the same class.
        probe: launched right behind the first reading of the time and right in front of the last: both are timed too.
        each: called in front of every group with its number, negative where it does not count.
    """
    device = device or clocks.Cuda()
    start, end = device.event(in_graph=True), device.event(in_graph=True)
    timed: list[Callable[[], object]] = [call] * CALLS
    if probe:
        timed = [probe.before, *timed, probe.after]
    lead = lead or call
    for each_call in dict.fromkeys((lead, *timed)):  # loads every kernel, which belongs before a capture
        each_call()
    device.synchronize()
    replay = device.capture([*[lead] * LEAD, start.record, *timed, end.record])
    walls = Walls([], [], [])
    for group in range(-WARM_UP, math.ceil(2 * measurements / GROUP)):
        each(group)
        order = (torch.randperm(GROUP, generator=generator) < GROUP // 2).tolist()
        times, readings = [], []
        for is_one in order:
            show(is_one)
            replay()
            device.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / CALLS)
            if probe:
                readings.append(probe.reading())
            pause(PAUSE)
        if group >= 0:
            walls.times.append(times)
            walls.classes.append(order)
            walls.readings.append(readings)
    return walls


class Kernel:
    """A bound kernel, loaded on the current device, with tensors of its own to read and to write."""

    def __init__(self, binding: Binding, target: Target, sizes: Sizes, **more: Tensor) -> None:
        from flashcore.launch import packet

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=torch.float16, device=DEVICE)

        self.inputs: Inputs = zeros(sizes.query), zeros(sizes.key), zeros(sizes.key)
        self._tensors = dict(zip("qkv", self.inputs, strict=True)) | {"o": zeros(sizes.query)} | more
        self._launch = packet.load(binding, torch.cuda.current_device(), target.arch)

    def __call__(self) -> None:
        """Launch it on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        addresses = [self._tensors[name].data_ptr() for name in self._launch.tensors]
        self._launch.launch(self._launch.fill(stream, *addresses))


def problem_of(sizes: Sizes, *, seqused_k: bool = False) -> Problem:
    """What is computed of these sizes."""

    def strides(shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        _, heads, rows, columns = shape
        return heads * rows * columns, rows * columns, columns

    q, k = strides(sizes.query), strides(sizes.key)
    return Problem(
        torch.float16, sizes.batch, sizes.heads, sizes.heads, sizes.seqlen_q, sizes.seqlen_k, sizes.head_dim,
        sizes.head_dim, q, k, k, q, seqused_k=seqused_k,
    )  # fmt: skip


def one_block_an_item(kernel: str, problem: Problem, target: Target) -> Config | None:
    """The first configuration of `kernel` that gives each (batch, head) one block, and that block several tiles of
    keys; None where there is none.
    """
    try:
        allowed = select.candidates(problem, target)
    except UnsupportedError:
        return None
    fitting = (
        c for c in allowed if c.kernel == kernel and c.block_m == problem.seqlen_q
        and c.block_n < problem.seqlen_k and c.schedule != "persistent"
    )  # fmt: skip
    return next(fitting, None)


# -- on a GPU -----------------------------------------------------------------------------------------------------


class Run:
    """One run of the command on the current GPU, which fills a record."""

    def __init__(self, measurements: int, walls: int, batch_walls: int, seconds: float, seed: int) -> None:
        self._deadline = time.monotonic() + seconds
        self._measurements, self._walls, self._batch_walls = measurements, walls, batch_walls
        self._target = targets.current(torch.cuda.current_device())
        self._generator = torch.Generator(device=DEVICE).manual_seed(seed)
        self._order = torch.Generator().manual_seed(seed)
        self.record: Record = {
            "schema": 1, "kind": "audit-timing", "complete": False, "environment": machine.environment(),
            "protocol": {
                "measurements": measurements, "wall_measurements": walls, "batch_measurements": batch_walls,
                "seed": seed, "inside": INSIDE.query[:2],
                "seqlen_q": INSIDE.seqlen_q, "seqlen_k": INSIDE.seqlen_k, "head_dim": INSIDE.head_dim,
                "whole": [WHOLE.batch, WHOLE.heads, WHOLE.seqlen_q, WHOLE.seqlen_k],
                "quiet": [QUIET.batch, QUIET.heads, QUIET.seqlen_q, QUIET.seqlen_k],
                "full_measurements": walls // WALLS_A_FULL, "slow": leakage.SLOW,
                "disturbed_limit": leakage.DISTURBED,
                "in_batch": list(IN_BATCH.query[1:]), "short": SHORT, "refresh": REFRESH, "lead": LEAD, "calls": CALLS,
                "pause_us": PAUSE * 1e6, "t_limit": leakage.T_LIMIT, "t_control": leakage.T_CONTROL,
                "relative_limit": leakage.RELATIVE_LIMIT, "confidence": leakage.CONFIDENCE,
                "moved_limit": elapsed.MOVED, "explaining_share": elapsed.SHARE,
            },
            "gpu_states": [machine.gpu_state()], "cases": [], "controls": [], "full": [], "batch": [],
        }  # fmt: skip

    def everything(self, *, batch: bool) -> Record:
        """Both clocks for every kernel, the controls, and the batches where asked."""
        for kernel in select.KERNELS:
            self._cycles(kernel)
        for quiet in (True, False):
            for kernel in select.KERNELS:
                self._wall(kernel, quiet=quiet)
        if batch:
            for size in BATCHES:
                self._batch(replace(IN_BATCH, batch=size))
        self.record["gpu_states"].append(machine.gpu_state())
        self.record["complete"] = True
        return self.record

    def _in_time(self, turn: int = 0) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError("the time limit was reached")

    def _cycles(self, kernel: str) -> None:
        from flashcore.launch import launcher
        from flashcore.security import instrument

        problem = problem_of(INSIDE)
        config = one_block_an_item(kernel, problem, self._target)
        if config is None:
            return
        binding = launcher.bind(problem, config, INSIDE.head_dim**-0.5, self._target)
        for control, names in CONTROLLED.items():
            blocks = math.prod(binding.grid)
            assert blocks == INSIDE.batch * INSIDE.heads, binding.grid
            cycles = torch.zeros(blocks, dtype=torch.int64, device=DEVICE)
            timed = Kernel(
                instrument.timed(binding, kernel, control), self._target, INSIDE, **{instrument.CYCLES: cycles}
            )

            def run(timed: Kernel = timed, cycles: Tensor = cycles) -> Tensor:
                timed()
                return cycles

            for name in names:
                samples = inside(
                    run, timed.inputs, PAIRS[name], INSIDE, self._measurements, self._generator, each=self._in_time
                )
                leak = leakage.compare(*samples)
                entry = {"kernel": kernel, "config": _named(config), "clock": "cycles", "pair": name}
                if control:
                    self._control({**entry, "control": control}, leak)
                else:
                    self._add("cases", {**entry, **leak.as_json(), "gated": True, "ok": leak.even})

    def _wall(self, kernel: str, *, quiet: bool) -> None:
        from flashcore.launch import launcher
        from flashcore.security import controls, probe

        sizes = QUIET if quiet else WHOLE
        problem = problem_of(sizes)
        try:
            whole = select.select(problem, self._target, backend=kernel)
        except UnsupportedError:
            return
        config = one_block_an_item(kernel, problem, self._target) if quiet else whole
        if config is None:
            return
        shipped = launcher.bind(problem, config, sizes.head_dim**-0.5, self._target)
        for control, names in CONTROLLED.items() if quiet else [("", tuple(PAIRS))]:
            binding = controls.planted(shipped, kernel, control) if control else shipped
            timed, reads = Kernel(binding, self._target, sizes), probe.Probe(DEVICE)
            lead = Kernel(binding, self._target, sizes) if quiet else timed
            either, both = Either(timed.inputs), Either(lead.inputs)
            for name in names:
                walls, states = self._timed(
                    _values(either), timed, self._walls if quiet else self._walls // WALLS_A_FULL,
                    lead=lead, probe=reads, fresh=partial(self._fresh, PAIRS[name], sizes, either, both),
                )  # fmt: skip
                leak = leakage.compare(walls.times, walls.classes, replays=True)
                entry = {"kernel": kernel, "config": _named(config), "pair": name, "blocks": math.prod(binding.grid)}
                told: Record = {"clock": "wall", "gpu_states": states}
                if control:
                    self._control({**entry, **told, "control": control}, leak)
                    continue
                found = elapsed.compare(walls.readings, walls.classes, CALLS)
                told |= {
                    "explained": elapsed.explained(leak, found),
                    "dropped": elapsed.dropped(walls.readings, walls.classes),
                    "moved": elapsed.moved(walls.readings) > elapsed.MOVED,
                }
                part = "cases" if quiet else "full"
                self._add(part, {**entry, **told, **leak.as_json(), "gated": quiet, "ok": leak.even or not quiet})
                if found is None:
                    continue
                cycles, rate = ({**entry, "clock": clock, **each.as_json()} for clock, each in found._asdict().items())
                self._add(part, {**cycles, "gated": quiet, "ok": found.elapsed.even or not quiet})
                self._add(part, {**rate, "step_ns": elapsed.step(walls.readings), "gated": False, "ok": True})

    def _fresh(self, draw: Draw, sizes: Sizes, either: Either, both: Either) -> None:
        """Draw new values for either class; `both` shows heads of each class by turns."""
        drawn = draw(sizes, self._generator)
        for each in (either, both):
            each.hold(*drawn)
        both.show(-(torch.arange(sizes.heads, device=DEVICE) % 2).view(1, -1, 1, 1))

    def _timed(
        self, show: Callable[[bool], object], kernel: Kernel, measurements: int, *, lead: Kernel | None = None,
        probe: Reads | None = None, fresh: Callable[[], object] = lambda: None,
    ) -> tuple[Walls, list[Record]]:  # fmt: skip
        """Wall times; and what the GPU's clock did, before the first time that counts and behind the last.

        Args:
            fresh: draws new values, in front of every group of times.
        """
        states = []

        def each(group: int) -> None:
            self._in_time()
            fresh()
            if group == 0:
                states.append(machine.gpu_state())

        walls = wall(show, kernel, measurements, self._order, lead=lead, probe=probe, each=each)
        states.append(machine.gpu_state())
        return walls, states

    def _batch(self, sizes: Sizes) -> None:
        """How the time of a batch depends on its first sequence: on values, then on its number of keys."""
        from flashcore.launch import launcher

        for name in ("zeros/random", "rising/falling", "keys"):
            by_length = name == "keys"
            problem = problem_of(sizes, seqused_k=by_length)
            config = select.select(problem, self._target)
            binding = launcher.bind(problem, config, sizes.head_dim**-0.5, self._target)
            used = torch.full((sizes.batch,), sizes.seqlen_k, dtype=torch.int32, device=DEVICE)
            kernel = Kernel(binding, self._target, sizes, seqused_k=used)
            _, others = PAIRS["zeros/random"](sizes, self._generator)
            for place, drawn in zip(kernel.inputs, others, strict=True):
                place.copy_(drawn)
            if by_length:
                show = _length(used[:1], SHORT, sizes.seqlen_k)
            else:
                either = Either([place[:1] for place in kernel.inputs])
                either.hold(*PAIRS[name](replace(sizes, batch=1), self._generator))
                show = _values(either)
            walls, states = self._timed(show, kernel, self._batch_walls)
            leak = leakage.compare(walls.times, walls.classes, replays=True)
            label = f"{SHORT}/{sizes.seqlen_k} keys" if by_length else name
            entry = {"kernel": config.kernel, "config": _named(config), "clock": "wall", "batch": sizes.batch}
            entry |= {"pair": label, "public": by_length, "gpu_states": states}
            self._add("batch", {**entry, **leak.as_json()})

    def _control(self, entry: Record, leak: Leak) -> None:
        self._add("controls", {**entry, **leak.as_json(), "ok": leak.largest_t > leakage.T_CONTROL})

    def _add(self, part: str, entry: Record) -> None:
        self.record[part].append(entry)
        print(row(part, entry), flush=True)


def _values(either: Either) -> Callable[[bool], object]:
    """Shows all of class 0, or of class 1."""
    chosen = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return lambda is_one: either.show(chosen.fill_(-int(is_one)))


def _length(used: Tensor, zero: int, one: int) -> Callable[[bool], object]:
    """Gives a sequence the number of keys of class 0, or of class 1."""
    return lambda is_one: used.fill_(one if is_one else zero)


def _named(config: Config) -> str:
    return " ".join(filter(None, (config.schedule, f"{config.block_m}x{config.block_n}", f"{config.num_warps}w")))


def row(part: str, entry: Record) -> str:
    """One comparison as a line."""
    subject = {"batch": "batch of {batch}", "full": "{clock}, full"}.get(part, "{clock}").format(**entry)
    if part == "controls":
        verdict = "caught" if entry["ok"] else "MISSED"
    elif part == "batch":
        verdict = "no difference seen" if entry["even"] else "differs"
    elif entry.get("explained"):
        verdict = elapsed.VERDICT
    else:
        verdict = "even" if entry["even"] else "DIFFERS" if entry["gated"] else "differs (no gate)"
    name = f"{entry['kernel']} {entry['config']}" + (f" + {entry['control']}" if part == "controls" else "")
    percent = [f"{100 * entry[key]:+.4f}" for key in ("relative", "relative_low", "relative_high")]
    return (
        f"{name:34} {subject:15} {entry['pair']:17} n {min(entry['measurements']):>9,}  mean {entry['mean']:>10.2f}"
        f"  {percent[0]:>8}% ({percent[1]} to {percent[2]})  |t| {entry['largest_t']:8.2f}  {verdict}"
        f"{_clock(entry.get('gpu_states', ()))}"
    )


def _clock(states: Sequence[Record]) -> str:
    """What the SMs' clock was, and what held it back."""
    seen = [f"{state['sm_mhz']}" for state in states if "sm_mhz" in state]
    held = machine.throttled(states)
    said = [f"{' and '.join(dict.fromkeys(seen))} MHz"] * bool(seen) + [f"held back by {', '.join(held)}"] * bool(held)
    return f"  [{', '.join(said)}]" if said else ""


def passed(record: Record) -> bool:
    """Whether the run is whole, every gate holds, every control was caught and the probes stayed on an SM."""
    checked = [entry["ok"] for part in ("cases", "controls") for entry in record[part]]
    stayed = not any(entry.get("moved") for entry in record["cases"])
    return bool(record["complete"] and record["controls"] and all(checked) and stayed)


def summary(record: Record) -> list[str]:
    """The closing lines."""
    every, held, explained = elapsed.gates(record)
    every_part = [entry for part in ("cases", "controls", "full", "batch") for entry in record[part]]
    timed = [entry for entry in every_part if "gpu_states" in entry]
    slowed = sum(bool(machine.throttled(entry["gpu_states"])) for entry in timed)
    probed = [entry for entry in every_part if "dropped" in entry]
    slow, times = (sum(sum(entry[name]) for entry in timed) for name in ("slow", "measurements"))
    of_time, of_clock = elapsed.given_away(record["full"])
    gone, read = (sum(sum(entry[name]) for entry in probed) for name in ("dropped", "measurements"))
    moved = sum(entry["moved"] for entry in probed)
    return [
        f"{held} of {every} gates hold: |t| < {leakage.T_LIMIT}, the interval within ±0.1%",
        f"{explained} of the {every - held} others differ by the clock: as many cycles, at another frequency",
        f"{sum(e['ok'] for e in record['controls'])} of {len(record['controls'])} controls caught: |t| > 10",
        f"over the whole GPU, no gate: wall time differs by up to {of_time:.2%}, the frequency by up to {of_clock:.2%}",
        f"{slow:,} of {times:,} wall times were disturbed: to t they count, to the interval they do not",
        f"{slowed} of {len(timed)} comparisons by wall time on a GPU that something held back",
        f"{gone:,} of {read:,} elapsed cycles dropped, as the probes ran on two SMs; "
        f"in {moved} comparisons more than {elapsed.MOVED:.0%}",
    ]


def _work(options: argparse.Namespace, into: str) -> None:
    """The measurements, in a process of their own: a GPU that hangs can be left behind."""
    walls, batch_walls = (max(options.measurements // each, 2 * GROUP) for each in (CYCLES_A_WALL, CYCLES_A_BATCH))
    run = Run(options.measurements, walls, batch_walls, options.seconds, options.seed)
    try:
        run.everything(batch=options.batch)
    except TimeoutError as late:
        print(f"stopped: {late}", flush=True)
    Path(into).write_text(json.dumps(run.record))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a gate failed, a control was missed or the run did not end, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="flashcore audit timing", description="Does a kernel's time depend on the values it computes with?"
    )
    parser.add_argument("--measurements", type=int, default=1_000_000, metavar="N", help="of each class (1,000,000)")
    parser.add_argument("--quick", action="store_true", help="100,000 measurements of each class")
    parser.add_argument("--no-batch", dest="batch", action="store_false", help="without the batches")
    parser.add_argument("--seconds", type=float, default=240, help="time limit of the measurements (240)")
    parser.add_argument("--seed", type=int, default=int(datetime.now(timezone.utc).strftime("%Y%m%d")))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it here too")
    options = parser.parse_args(argv)
    if options.quick:
        options.measurements = min(options.measurements, 100_000)
    if not torch.cuda.is_available():
        print("flashcore audit timing: it measures a GPU, and there is none here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "record.json"
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(options, str(into)))
        process.start()
        process.join(options.seconds + 60)
        if process.is_alive():
            process.kill()
            process.join()
            print("flashcore audit timing: the GPU did not answer in time", file=sys.stderr)
            return 1
        if not into.exists():
            print(f"flashcore audit timing: the measurements ended with status {process.exitcode}", file=sys.stderr)
            return 1
        record = json.loads(into.read_text())
    print("", *summary(record), sep="\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passed(record) else 1


if __name__ == "__main__":
    sys.exit(main())
