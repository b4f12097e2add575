"""`flashcore audit load`: many threads and streams at once, every result compared, memory watched all the while.

Threads share problems and streams. Each writes a block of results and has the GPU compare all of their bits with the
first ones; every few blocks it also lets attention allocate, and asks for a shape that nobody asked for before. Memory
is read between slices, when nothing is under way. The controls: one bit of what is expected is wrong, which every call
of its problem must show; and a leak of a tensor every so many calls, which both figures of memory must show.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.fast.attention_production import attention
from flashcore.launch import shim
from flashcore.security import record
from flashcore.security.bitwise import bits, on, streams, synchronize
from flashcore.testing import Shape, make
from flashcore.testing.inputs import place

BLOCK = 64  # results that are compared together
HOST_LIMIT = 1 << 20  # bytes that may be gained
WARM = 2  # slices before the first reading: caches fill
SHAPES: tuple[tuple[Shape, dict[str, Any]], ...] = (
    (Shape(2, 4, 128, 64), {}),
    (Shape(1, 8, 64, 64), {"is_causal": True}),
    (Shape(2, 2, 197, 128, heads_kv=1), {}),
    (Shape(4, 2, 33, 32, seqlen_k=100), {"is_causal": True}),
)


@dataclass
class Problem:
    """One call, and the bits that it gave at first."""

    inputs: tuple[Tensor, ...]
    options: dict[str, Any]
    want: Tensor

    @staticmethod
    def all(device: str) -> list[Problem]:
        made = []
        for i, (shape, options) in enumerate(SHAPES):
            inputs: Any = tuple(place(t, device) for t in make("outliers", shape, seed=i))
            out: Any = attention(*inputs, **options)
            made.append(Problem(inputs, options, bits(out)[0].clone()))
        return made


@dataclass
class Slice:
    """What all threads did in one slice of time."""

    calls: int = 0
    mismatches: int = 0
    errors: list[str] = field(default_factory=list)


class Load:
    """Threads over problems; `leak`: keep one tensor and one string of every so many calls."""

    def __init__(self, device: str, threads: int, lanes: int, leak: int = 0) -> None:
        self.device, self.threads, self.leak = device, threads, leak
        self.problems = Problem.all(device)
        self.lanes = streams(device, lanes)
        self.kept: list[Any] = []
        self._lock = threading.Lock()
        self._number = 0
        synchronize(device)

    def run(self, seconds: float, calls: int) -> Slice:
        """Run every thread until either is reached."""
        said = Slice()
        deadline = time.monotonic() + seconds
        each = -(-calls // self.threads)
        threads = [threading.Thread(target=self._work, args=(i, deadline, each, said)) for i in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        synchronize(self.device)
        return said

    def _work(self, which: int, deadline: float, calls: int, said: Slice) -> None:
        done, turn = 0, which
        totals: list[Tensor] = []
        try:
            with torch.no_grad():
                while done < calls and time.monotonic() < deadline:
                    problem = self.problems[turn % len(self.problems)]
                    with on(self.lanes[turn % len(self.lanes)]):
                        totals.append(self._block(problem))
                        if turn % 4 == which % 4:
                            self._unseen(turn)
                    done += BLOCK
                    turn += self.threads + 1
                    if len(totals) >= 16:
                        self._add(totals, said)
            self._add(totals, said)
        except BaseException as error:
            with self._lock:
                said.errors.append(f"{type(error).__name__}: {error}"[:200])
        with self._lock:
            said.calls += done

    def _add(self, totals: list[Tensor], said: Slice) -> None:
        synchronize(self.device)  # they were made on streams that reading them here would not wait for
        found = sum(int(t) for t in totals)
        totals.clear()
        with self._lock:
            said.mismatches += found

    def _block(self, problem: Problem) -> Tensor:
        """How many of BLOCK calls gave other bits, on the device."""
        q, k, v = problem.inputs
        results = torch.empty((BLOCK, *problem.want.shape), dtype=q.dtype, device=q.device)
        for i in range(BLOCK - 1):
            attention(q, k, v, out=results[i], **problem.options)
        own: Any = attention(q, k, v, **problem.options)
        results[BLOCK - 1].copy_(own)
        if self.leak:
            with self._lock:
                self.kept += [own, "x" * self.leak]
        return (bits(results)[0] != problem.want).flatten(1).any(1).sum()

    def _unseen(self, turn: int) -> None:
        """A call of a shape and an option that are new: what is kept of calls must not grow without end."""
        with self._lock:
            self._number += 1
            number = self._number
        q, k, v = self.problems[0].inputs
        attention(q, k, v, scale=1.0 / (1 + number % 5_000))


def host_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def device_bytes(device: str) -> int:
    """Memory of tensors that are alive."""
    return int(torch.cuda.memory_allocated()) if device != "cpu" else 0


def soak(load: Load, slices: int, seconds: float, calls: int) -> tuple[Slice, list[dict[str, int]]]:
    """Run so many slices of so many seconds in all. Returns their sum, and memory (bytes) after each."""
    total, memory = Slice(), []
    for _ in range(slices):
        said = load.run(seconds / slices, -(-calls // slices))
        total.calls += said.calls
        total.mismatches += said.mismatches
        total.errors += said.errors
        gc.collect()
        memory.append({"device": device_bytes(load.device), "host": host_bytes()})
    return total, memory


def gained(memory: Sequence[dict[str, int]], what: str) -> int:
    """Bytes more at the end than at most in the first slices after the caches were full."""
    after = [reading[what] for reading in memory[WARM:]]
    half = max(1, len(after) // 2)
    return min(after[half:], default=after[-1]) - max(after[:half]) if len(after) > 1 else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one process saw: of the load, of one bit changed, and of a leak."""
    load = Load(options.device, options.threads, options.streams)
    with shim.disabled():  # the launch path that serves where there is no compiler; it also fills its caches
        python = load.run(options.seconds / 6, options.calls)
    total, memory = soak(load, options.slices, options.seconds, sys.maxsize if options.soak else options.calls)
    load.problems[0].want.view(-1)[0] ^= 1
    synchronize(options.device)
    planted = load.run(5.0, options.threads * BLOCK * len(SHAPES))
    leaky = Load(options.device, options.threads, options.streams, leak=1 << 16)
    _, leaked = soak(leaky, 8, 4.0, 40 * BLOCK * options.threads)
    return {
        "calls": total.calls + python.calls, "python_calls": python.calls,
        "mismatches": total.mismatches + python.mismatches, "errors": total.errors + python.errors, "memory": memory,
        "planted": {"calls": planted.calls, "noticed": planted.mismatches}, "memory_leaking": leaked,
    }  # fmt: skip


def at_once(options: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, Any]]:
    """What several processes saw beside each other, each on one of the visible GPUs in turn."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(options.processes):
            path = Path(folder, f"{i}.json")
            command = [sys.executable, "-m", "flashcore.security.load", *argv, "--work", str(path)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus.split(",")[i % len(gpus.split(","))]}
            running.append((path, subprocess.Popen(command, env=environment)))
        ended = [process.wait() for _, process in running]
        nothing = {"calls": 0, "python_calls": 0, "mismatches": 0, "memory": [], "planted": {"calls": 0, "noticed": 0},
                   "memory_leaking": []}  # fmt: skip
        return [
            json.loads(path.read_text()) if path.exists() else {**nothing, "errors": [f"a process ended with {status}"]}
            for (path, _), status in zip(running, ended, strict=True)
        ]


def rows(found: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[record.Row]:
    """The claims, from what every process saw."""
    calls, mismatches, errors = (
        sum(e["calls"] for e in found), sum(e["mismatches"] for e in found), sum(len(e["errors"]) for e in found)
    )  # fmt: skip
    python = sum(e["python_calls"] for e in found)
    noticed, planted = (sum(e["planted"][name] for e in found) for name in ("noticed", "calls"))
    most = {what: max(gained(e["memory"], what) for e in found) for what in ("device", "host")}
    least = {what: min(gained(e["memory_leaking"], what) for e in found) for what in ("device", "host")}
    leak_seen = least["host"] > HOST_LIMIT and (least["device"] > 0 or options.device == "cpu")
    several = f" in each of {len(found)} processes at once" if len(found) > 1 else ""
    return [
        record.Row(
            f"{options.threads} threads on {options.streams} streams get the right bits every time",
            f"{calls:,} calls, {python:,} by the Python path: {mismatches} mismatches, {errors} errors",
            f"one bit of what is expected changed: {noticed} of {planted} calls noticed",
            not mismatches and not errors and calls > 0 and all(e["planted"]["noticed"] for e in found),
        ),
        record.Row(
            "Memory does not grow: no byte on the device, at most 1 MiB on the host",
            f"{options.slices} slices in {options.seconds:.0f} s{several}: {most['device']:,} bytes gained on the"
            f" device, {most['host'] / 2**20:.2f} MiB on the host",
            f"a planted leak: {least['device']:,} bytes and {least['host'] / 2**20:.1f} MiB",
            not errors and most["device"] <= 0 and most["host"] <= HOST_LIMIT and leak_seen,
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a result differed, memory grew, or a control went unnoticed."""
    on_gpu = torch.cuda.is_available()
    parser = record.parser("load", "Threads and streams at once: every result compared, memory watched.")
    parser.add_argument("--calls", type=int, default=1_000_000 if on_gpu else 20_000, metavar="N", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="T", help="at most (%(default)s)")
    parser.add_argument("--soak", action="store_true", help="for all of --seconds, however many calls that makes")
    parser.add_argument("--processes", type=int, default=1, metavar="K", help="at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="of each (%(default)s)")
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="of each (%(default)s)")
    parser.add_argument("--slices", type=int, default=12, metavar="N", help="memory is read after each (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--work", type=Path, help="be one of the processes, which writes here")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.work is not None:
        record.write(options.work, measure(options))
        return 0
    began = time.monotonic()
    arguments = sys.argv[1:] if argv is None else argv
    found = [measure(options)] if options.processes == 1 else at_once(options, arguments)
    said = rows(found, options)
    for error in [error for each in found for error in each["errors"]][:5]:
        print(f"  {error}")
    complete = sum(each["calls"] for each in found) >= options.calls and options.device != "cpu"
    return record.finish(
        "load", said, options.json, arguments=argv, seconds=time.monotonic() - began, gpu=options.device != "cpu",
        complete=complete, processes=found,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
