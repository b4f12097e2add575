"""`flashcore audit timing`: does the time that a kernel takes depend on the values it computes with?

dudect's method (leakage.py) on a GPU, with two clocks:

cycles  Each block's own, read from its SM's clock inside an instrumented copy of the kernel (instrument.py). One block
        computes one (batch, head), whose class is drawn anew for every launch, at the same address whatever the class
        is: every launch gives measurements of both classes, one block on each SM.
wall    Of the shipped kernel: replays of a CUDA graph of calls that all compute one class, in random order.

In the same run the copy with a conditional rescale planted in it has to show what a leak looks like. At last the time
of a whole batch is compared by the content of one of its sequences, and by its length, which is public.
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
from flashcore.security import leakage
from flashcore.security.classes import PAIRS, Draw, Inputs, Sizes
from flashcore.security.leakage import Leak

# A block for each (batch, head), four or more tiles of keys each. No more blocks than an H100 has SMs: beside others a
# block's left-out step hides, since theirs fill the gap (the planted rescale then moved the mean by 0.04%).
INSIDE = Sizes(16, 8, 64, 512, 64)
WHOLE = Sizes(32, 8, 256, 256, 64)
BATCHES = (1, 8, 32)
IN_BATCH = Sizes(32, 8, 512, 512, 64)
SHORT = 64  # keys of the sequence whose length is compared with a full one's

REFRESH = 64  # launches on the same drawn values
GROUP = 32  # wall times between two waits for the GPU, half of them of each class
WARM_UP = 10  # such groups before the first that counts: an idle GPU takes a while to reach its clock
CALLS = 10  # in a graph
DEVICE = "cuda"
UNGATED = {("wall", "zeros/random")}  # what they differ by comes from power, and is published

Record = dict[str, Any]


class Samples(NamedTuple):
    """Measurements [launches, places], and which of them are of class 1."""

    values: Any
    classes: Any


def inside(
    run: Callable[[], Tensor], shown: Inputs, draw: Draw, sizes: Sizes, measurements: int, generator: torch.Generator
) -> Samples:
    """The cycles of about `measurements` blocks of each class.

    Args:
        run: launches the kernel on `shown`; int64 [batch * heads] cycles.
        shown: the kernel's inputs, into which the values of either class are written.
    """
    device, places = generator.device, sizes.batch * sizes.heads
    launches = max(math.ceil(2 * measurements / places), 2)
    classes = torch.rand((launches, places), generator=generator, device=device) < 0.5
    values = torch.empty((launches, places), dtype=torch.int64, device=device)
    zero = one = shown
    for launch in range(-REFRESH, launches):  # the first ones warm up
        if launch % REFRESH == 0:
            zero, one = draw(sizes, generator)
        is_one = classes[launch % launches].view(sizes.batch, sizes.heads, 1, 1)
        for place, of_zero, of_one in zip(shown, zero, one, strict=True):
            torch.where(is_one, of_one, of_zero, out=place)
        cycles = run()
        if launch >= 0:
            values[launch].copy_(cycles)
    return Samples(values.cpu().numpy(), classes.cpu().numpy())


def wall(
    show: Callable[[bool], object], replay: Callable[[], object], measurements: int, generator: torch.Generator,
    device: clocks.Device | None = None, *, calls: int = CALLS,
) -> Samples:
    """At least `measurements` of each class of the time of `replay`, which makes `calls` calls, in microseconds a call;
    `show` sets the class.
    """
    device = device or clocks.Cuda()
    events = [(device.event(), device.event()) for _ in range(GROUP)]
    values, classes = [], []
    for group in range(-WARM_UP, math.ceil(2 * measurements / GROUP)):
        order = (torch.randperm(GROUP, generator=generator) < GROUP // 2).tolist()
        for is_one, (start, end) in zip(order, events, strict=True):
            show(is_one)
            replay()  # runs while the host submits the rest: no submission is timed
            start.record()
            replay()
            end.record()
        device.synchronize()
        if group >= 0:
            values.append([start.elapsed_time(end) * 1e3 / calls for start, end in events])
            classes.append(order)
    return Samples(values, classes)


class Kernel:
    """A bound kernel, loaded on the current device, with tensors of its own to read and to write."""

    def __init__(self, binding: Binding, target: Target, sizes: Sizes, **more: Tensor) -> None:
        from flashcore.launch import packet

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=torch.float16, device=DEVICE)

        self.inputs: Inputs = zeros(sizes.query), zeros(sizes.key), zeros(sizes.key)
        self._tensors = dict(zip("qkv", self.inputs, strict=True)) | {"o": zeros(sizes.query)} | more
        self._launch = packet.load(binding, torch.cuda.current_device(), target.arch)

    def show(self, inputs: Inputs) -> None:
        """Let it read these, or as many sequences as there are of them in place of its first."""
        for place, given in zip(self.inputs, inputs, strict=True):
            place[: given.shape[0]].copy_(given)

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

    def __init__(self, measurements: int, walls: int, seconds: float, seed: int) -> None:
        self._deadline = time.monotonic() + seconds
        self._measurements, self._walls = measurements, walls
        self._target = targets.current(torch.cuda.current_device())
        self._generator = torch.Generator(device=DEVICE).manual_seed(seed)
        self._order = torch.Generator().manual_seed(seed)
        self.record: Record = {
            "schema": 1, "kind": "audit-timing", "complete": False, "environment": machine.environment(),
            "protocol": {
                "measurements": measurements, "wall_measurements": walls, "seed": seed, "inside": INSIDE.query[:2],
                "seqlen_q": INSIDE.seqlen_q, "seqlen_k": INSIDE.seqlen_k, "head_dim": INSIDE.head_dim,
                "whole": [WHOLE.batch, WHOLE.heads, WHOLE.seqlen_q], "in_batch": list(IN_BATCH.query[1:]),
                "short": SHORT, "calls": CALLS, "t_limit": leakage.T_LIMIT, "t_control": leakage.T_CONTROL,
                "relative_limit": leakage.RELATIVE_LIMIT, "confidence": leakage.CONFIDENCE,
            },
            "gpu_states": [machine.gpu_state()], "cases": [], "controls": [], "batch": [],
        }  # fmt: skip

    def everything(self, *, batch: bool) -> Record:
        """Both clocks for every kernel, the controls, and the batches where asked."""
        for kernel in select.KERNELS:
            self._cycles(kernel)
        for kernel in select.KERNELS:
            self._wall(kernel)
        if batch:
            for size in BATCHES:
                self._batch(replace(IN_BATCH, batch=size))
        self.record["gpu_states"].append(machine.gpu_state())
        self.record["complete"] = True
        return self.record

    def _in_time(self) -> None:
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
        for control, names in (("", tuple(PAIRS)), ("rescale", ("rising/falling",))):
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
                self._in_time()
                samples = inside(run, timed.inputs, PAIRS[name], INSIDE, self._measurements, self._generator)
                leak = leakage.compare(*samples)
                entry = {"kernel": kernel, "config": _named(config), "clock": "cycles", "pair": name}
                if control:
                    caught = abs(leak.t) > leakage.T_CONTROL
                    self._add("controls", {**entry, "control": control, **leak.as_json(), "ok": caught}, leak)
                else:
                    self._add("cases", {**entry, **leak.as_json(), "gated": True, "ok": leak.even}, leak)

    def _wall(self, kernel: str) -> None:
        from flashcore.launch import launcher

        problem = problem_of(WHOLE)
        try:
            config = select.select(problem, self._target, backend=kernel)
        except UnsupportedError:
            return
        shipped = Kernel(launcher.bind(problem, config, WHOLE.head_dim**-0.5, self._target), self._target, WHOLE)
        replay = self._graph(shipped)
        for name, draw in PAIRS.items():
            self._in_time()
            both = draw(WHOLE, self._generator)

            def show(one: bool, both: tuple[Inputs, Inputs] = both) -> None:
                shipped.show(both[one])

            leak = leakage.compare(*wall(show, replay, self._walls, self._order))
            gated = ("wall", name) not in UNGATED
            entry = {"kernel": kernel, "config": _named(config), "clock": "wall", "pair": name}
            self._add("cases", {**entry, **leak.as_json(), "gated": gated, "ok": leak.even or not gated}, leak)

    def _batch(self, sizes: Sizes) -> None:
        """How the time of a batch depends on its first sequence: on values, then on its number of keys."""
        from flashcore.launch import launcher

        for name in ("zeros/random", "rising/falling", "keys"):
            self._in_time()
            by_length = name == "keys"
            problem = problem_of(sizes, seqused_k=by_length)
            config = select.select(problem, self._target)
            binding = launcher.bind(problem, config, sizes.head_dim**-0.5, self._target)
            used = torch.full((sizes.batch,), sizes.seqlen_k, dtype=torch.int32, device=DEVICE)
            kernel = Kernel(binding, self._target, sizes, seqused_k=used)
            _, others = PAIRS["zeros/random"](sizes, self._generator)
            kernel.show(others)
            lengths = torch.tensor([SHORT, sizes.seqlen_k], dtype=torch.int32, device=DEVICE)
            first = replace(sizes, batch=1)
            both = None if by_length else PAIRS[name](first, self._generator)

            def show(
                one: bool, kernel: Kernel = kernel, used: Tensor = used, lengths: Tensor = lengths,
                both: tuple[Inputs, Inputs] | None = both,
            ) -> None:
                if both is None:
                    used[0].copy_(lengths[int(one)])
                else:
                    kernel.show(both[one])

            leak = leakage.compare(*wall(show, self._graph(kernel), self._walls, self._order))
            label = f"{SHORT}/{sizes.seqlen_k} keys" if by_length else name
            entry = {"kernel": config.kernel, "config": _named(config), "clock": "wall", "batch": sizes.batch}
            self._add("batch", {**entry, "pair": label, "public": by_length, **leak.as_json()}, leak)

    def _graph(self, kernel: Kernel) -> Callable[[], object]:
        kernel()
        torch.cuda.synchronize()
        return clocks.Cuda().capture([kernel] * CALLS)

    def _add(self, part: str, entry: Record, leak: Leak) -> None:
        self.record[part].append(entry)
        print(row(part, entry), flush=True)


def _named(config: Config) -> str:
    return " ".join(filter(None, (config.schedule, f"{config.block_m}x{config.block_n}", f"{config.num_warps}w")))


def row(part: str, entry: Record) -> str:
    """One comparison as a line."""
    subject = f"batch of {entry['batch']}" if part == "batch" else entry["clock"]
    if part == "controls":
        verdict = "caught" if entry["ok"] else "MISSED"
    elif part == "batch":
        verdict = "no difference seen" if entry["even"] else "differs"
    else:
        verdict = "even" if entry["even"] else "DIFFERS" if entry["gated"] else "differs (no gate)"
    name = f"{entry['kernel']} {entry['config']}" + (f" + {entry['control']}" if part == "controls" else "")
    percent = [f"{100 * entry[key]:+.4f}" for key in ("relative", "relative_low", "relative_high")]
    return (
        f"{name:34} {subject:12} {entry['pair']:17} n {min(entry['measurements']):>9,}  mean {entry['mean']:>10.2f}"
        f"  {percent[0]:>8}% ({percent[1]} to {percent[2]})  |t| {entry['largest_t']:8.2f}  {verdict}"
    )


def passed(record: Record) -> bool:
    """Whether the run is whole, every gate holds and every control was caught."""
    checked = [entry["ok"] for part in ("cases", "controls") for entry in record[part]]
    return bool(record["complete"] and record["controls"] and all(checked))


def _work(options: argparse.Namespace, into: str) -> None:
    """The measurements, in a process of their own: a GPU that hangs can be left behind."""
    walls = max(options.measurements // 1000, 2 * GROUP)
    run = Run(options.measurements, walls, options.seconds, options.seed)
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
    parser.add_argument("--seconds", type=float, default=120, help="time limit of the measurements (120)")
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
    gates = [entry["ok"] for entry in record["cases"] if entry["gated"]]
    print(f"\n{sum(gates)} of {len(gates)} gates hold: |t| < {leakage.T_LIMIT}, the interval within ±0.1%")
    print(f"{sum(e['ok'] for e in record['controls'])} of {len(record['controls'])} controls caught: |t| > 10")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passed(record) else 1


if __name__ == "__main__":
    sys.exit(main())
