"""`flashcore audit fuzz`: random problems through every gate, by each kernel that serves them.

    flashcore audit fuzz --problems 100000 --seconds 240
    flashcore audit fuzz --only 8589934595 --backend portable

A problem is one integer, from which flashcore/testing/problems.py draws the call: its low 32 bits are its kind, all
that a kernel is compiled for, the others its sizes and values, so that one compilation serves hundreds. Outputs lie in
guard bands and hold NaN before the call. Several processes share the GPU, which does nothing but the calls: each judges
on a core of its own, by one reference for all backends. One that hangs, crashes or loses the GPU costs the problem it
was at, which is on record with its number, and goes on behind it. Failing problems are made smaller for as long as they
fail. The control is a process whose portable kernel has a fault planted in it. Without a GPU the portable kernel runs
in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashcore.core import target as targets
from flashcore.core.errors import UnsupportedError
from flashcore.security import record
from flashcore.testing import problems

KIND_BITS = 32
PER_KIND = 450  # problems of a kind, one after the other
FEW_PER_KIND = 10  # where nothing is compiled, and of the control: a kind may have nothing of its fault in it
KERNELS = 6  # compiled for a kind; problems that need a further one are passed over
CONTROL = "base e for base 2"  # of flashcore/testing/mutants.py
CONTROL_PROBLEMS = 100
PATIENCE_S = 90.0  # without a word of a worker: the longest compilation takes a third of it
ON_CPU = 40  # rows of a sequence: the interpreter takes a second for some hundred
SHRINK = (4, 8, 16, 32, 64, 128)  # longest sequences that a failing problem is tried with
MOST_SHRUNK = 5
ONE_S = 90.0  # for one problem in a process of its own
# What glibc gives back to the system when a reference's temporaries are freed, the next ones fault in page by page.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
_POLL_S = 0.2
LOST_GPU = 3  # a worker's exit status


def number(kind: int, detail: int) -> int:
    """A problem's number."""
    return detail << KIND_BITS | kind


def kind_of(seed: int) -> int:
    """The kind of problem number `seed`."""
    return seed & (1 << KIND_BITS) - 1


def draw(seed: int, longest: int = problems.LONGEST) -> problems.Call:
    """Problem number `seed`, on the CPU; nearly always with an output that is guarded."""
    kind, detail = kind_of(seed), seed >> KIND_BITS
    call = problems.draw(random.Random(kind), random.Random(f"{detail} of {kind}"), longest)
    if not call.options["out"] and detail % 4:
        call.options["out"] = "contiguous"
    return call


def run(seed: int, backend: str | None, device: str, longest: int = problems.LONGEST) -> str:
    """What is wrong with a problem by a backend, "" = nothing.

    Raises:
        UnsupportedError: the backend does not serve it.
    """
    return problems.run(draw(seed, longest), backend, device)


def repro(seed: int, backend: str | None, longest: int = problems.LONGEST) -> str:
    """The command that runs one problem again."""
    chosen = f" --backend {backend}" if backend else ""
    return f"flashcore audit fuzz --only {seed}{chosen} --longest {longest}"


def kinds(seed: int, shard: int) -> Iterator[int]:
    """The kinds of a shard, without end; no two shards and no two seeds below 1,000 share one."""
    for i in range(1 << 12):
        yield ((seed % 1_000) * 1_000 + shard) << 12 | i


# -- one process --------------------------------------------------------------------------------------------------


class _Journal:
    """A worker's word: what it is at, at the start of one file, and what it has done, line by line in another."""

    def __init__(self, path: Path) -> None:
        self._at = os.open(path.with_suffix(".at"), os.O_RDWR | os.O_CREAT)
        self._lines = path.open("a")
        self._counts: Counter[str] = Counter()
        self._last = time.monotonic()

    def at(self, seed: int, index: int, backend: str | None) -> None:
        os.pwrite(self._at, f"{seed} {index} {backend or 'chosen'}".ljust(80).encode(), 0)

    def count(self, **what: int) -> None:
        self._counts.update(what)
        if time.monotonic() - self._last > 0.5:
            self.flush()

    def note(self, **entry: Any) -> None:
        self._lines.write(json.dumps(entry) + "\n")
        self._lines.flush()

    def flush(self) -> None:
        self.note(counts=dict(self._counts))
        self._counts.clear()
        self._last = time.monotonic()


def work(
    journal: Path, seed: int, shard: int, count: int, seconds: float, device: str, longest: int, *, index: int = 0,
    detail: int = 0, per_kind: int = PER_KIND,
) -> int:
    """Run a shard's problems from kind number `index` and `detail` on; the exit status of its process."""
    torch.set_num_threads(1)
    said = _Journal(journal)
    deadline = time.monotonic() + seconds
    backends: tuple[str | None, ...] = ("portable",) if device == "cpu" else ("portable", None)
    budget = _Budget(device)
    done = 0
    for place, kind in enumerate(kinds(seed, shard)):
        if place < index:
            continue
        budget.renew()
        for step in range(detail if place == index else 0, per_kind):
            if done >= count or time.monotonic() > deadline:
                said.flush()
                return 0
            problem = number(kind, step)
            said.at(problem, place, None)
            trial = problems.Trial(draw(problem, longest), device)
            ran = 0
            for backend in backends:
                said.at(problem, place, backend)
                try:
                    if not budget.serves(trial.call, backend):
                        said.count(passed_over=1)
                        continue
                    wrong = trial.run(backend)
                except UnsupportedError:
                    said.count(refused=1)
                    continue
                except Exception as error:  # a kernel may fail in any way
                    wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                ran += 1
                said.count(**{backend or "chosen": 1})
                if wrong:
                    said.note(failure=[problem, backend, wrong[:500]])
                    if device != "cpu" and _gpu_is_lost():
                        said.flush()
                        return LOST_GPU
            done += ran > 0
            said.count(problems=int(ran > 0), skipped=int(ran == 0))
    return 0


class _Budget:
    """Which problems a kind may still run: those whose kernel is there, and a few that have to be compiled."""

    def __init__(self, device: str) -> None:
        self._target = targets.current(torch.cuda.current_device()) if device != "cpu" else None
        self._left = KERNELS

    def renew(self) -> None:
        self._left = KERNELS

    def serves(self, call: problems.Call, backend: str | None) -> bool:
        """Raises UnsupportedError where no kernel does."""
        if self._target is None:
            return True
        from flashcore.fast.planning import explain
        from flashcore.launch import compiled, launcher, packet

        options: dict[str, Any] = {n: v for n, v in call.options.items() if n != "out"}
        arguments: dict[str, Any] = {**call.tensors, **options}
        found = explain(**arguments, backend=backend, target=self._target)
        if found.config is None:
            raise UnsupportedError("no kernel", found.refused)
        scale = options.get("scale")
        scale = found.problem.head_dim**-0.5 if scale is None else scale
        binding = launcher.bind(found.problem, found.config, scale, self._target)
        if (torch.cuda.current_device(), compiled.identity(binding)) in packet._loaded:
            return True
        self._left -= 1
        return self._left >= 0


def _gpu_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def _plant(name: str) -> None:
    """Let the portable kernel of this process have a fault."""
    from flashcore.launch import portable
    from flashcore.testing.mutants import MUTANTS, plant

    vars(portable)["attention_forward"] = plant(MUTANTS[name]).attention_forward


# -- all of them --------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """A worker process, and what is known of it."""

    name: int
    count: int
    planted: bool = False
    process: subprocess.Popen[bytes] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    at: str = ""
    heard: float = 0.0
    read_to: int = 0
    index: int = 0
    detail: int = 0
    restarts: int = 0


class Fuzz:
    """The workers of one run, watched."""

    def __init__(self, folder: Path, seed: int, device: str, seconds: float, longest: int) -> None:
        self.folder, self.seed, self.device, self.longest = folder, seed, device, longest
        self.deadline = time.monotonic() + seconds

    def run(self, shards: Sequence[Shard]) -> None:
        """Start every shard, and each again behind what ended it, until all have finished or time is up."""
        for shard in shards:
            self._start(shard)
        running = list(shards)
        while running:
            time.sleep(_POLL_S)
            running = [shard for shard in running if not self._finished(shard)]

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"shard{shard.name}.jsonl"

    def _start(self, shard: Shard) -> None:
        left = max(1.0, self.deadline - time.monotonic())
        command = _worker(self.device) + [
            "--work", str(self._path(shard)), "--seed", str(self.seed), "--shards", str(shard.name),
            "--problems", str(shard.count - shard.counts["problems"]), "--seconds", f"{left:.1f}",
            "--device", self.device, "--longest", str(self.longest), "--from", f"{shard.index}:{shard.detail}",
        ]  # fmt: skip
        command += ["--plant", CONTROL] if shard.planted else []
        with (self.folder / f"shard{shard.name}.log").open("ab") as log:
            shard.process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(self.device))
        shard.heard = time.monotonic()

    def _finished(self, shard: Shard) -> bool:
        assert shard.process is not None
        status = shard.process.poll()
        self._hear(shard)
        now = time.monotonic()
        why = "" if status is not None else "hung" if now - shard.heard > PATIENCE_S else ""
        if now > self.deadline + 20:  # a worker looks at the clock itself, between problems
            why = "over time"
        if status is None and not why:
            return False
        if status is None:
            shard.process.kill()
            shard.process.wait()
        if status == 0 or why == "over time":
            return True
        if status != LOST_GPU:  # that one has said itself what it was at
            seed, backend = self._place(shard)
            ended = why or f"its process ended with status {status}: {self._tail(shard)}"
            shard.failures.append({"seed": seed, "backend": backend, "wrong": ended})
        else:
            self._place(shard)
        shard.restarts += 1
        if shard.restarts > 20 or now > self.deadline:
            return True
        self._start(shard)
        return False

    def _hear(self, shard: Shard) -> None:
        path = self._path(shard)
        at = path.with_suffix(".at").read_text() if path.with_suffix(".at").exists() else ""
        if at != shard.at:
            shard.at, shard.heard = at, time.monotonic()
        if not path.exists():
            return
        with path.open() as file:
            file.seek(shard.read_to)
            news = file.read()
        whole = news[: news.rfind("\n") + 1]
        shard.read_to += len(whole.encode())
        for line in whole.splitlines():
            entry = json.loads(line)
            shard.counts.update(entry.get("counts", {}))
            if "failure" in entry:
                seed, backend, wrong = entry["failure"]
                shard.failures.append({"seed": seed, "backend": backend, "wrong": wrong})

    def _place(self, shard: Shard) -> tuple[int, str | None]:
        """The problem that a worker was at; it goes on behind it."""
        seed, index, backend = shard.at.split() if shard.at.strip() else ("0", "0", "chosen")
        shard.index, shard.detail = int(index), (int(seed) >> KIND_BITS) + 1
        return int(seed), None if backend == "chosen" else backend

    def _tail(self, shard: Shard) -> str:
        lines = (self.folder / f"shard{shard.name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no output"


def _worker(device: str) -> list[str]:
    return [sys.executable, "-m", "flashcore.security.fuzz"]


def _environment(device: str) -> dict[str, str]:
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    return {**MALLOC, **os.environ, **interpreted}


def shrink(failure: dict[str, Any], device: str, most: int, until: float) -> dict[str, Any]:
    """A failure with the smallest `longest` at which its problem still fails, and the command that repeats it.

    It is tried until time.monotonic() is `until`.
    """
    note = "not again by itself"
    for longest in (*[n for n in SHRINK if n < most], most):
        left = min(ONE_S, until - time.monotonic())
        if left <= 0:
            note = "not made smaller: out of time"
            break
        command = _worker(device) + ["--only", str(failure["seed"]), "--longest", str(longest), "--device", device]
        command += ["--backend", failure["backend"]] if failure["backend"] else []
        try:
            done = subprocess.run(command, timeout=left, capture_output=True, text=True, env=_environment(device))
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            failed = left == ONE_S  # else it was not given the time
        if failed:
            return {**failure, "longest": longest, "repro": repro(failure["seed"], failure["backend"], longest)}
    again = repro(failure["seed"], failure["backend"], most)
    return {**failure, "longest": most, "repro": again, "note": note}


def only(seed: int, backend: str | None, device: str, longest: int) -> int:
    """Run one problem in this process and say what came of it."""
    print(draw(seed, longest))
    try:
        wrong = run(seed, backend, device, longest)
    except UnsupportedError as refusal:
        print(f"refused: {refusal}")
        return 0
    print(wrong or "right")
    return int(bool(wrong))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a problem failed or the control did not."""
    options = _options(argv)
    if options.plant:
        _plant(options.plant)
    if options.work is not None:
        index, detail = (int(n) for n in options.start.split(":"))
        return work(
            options.work, options.seed, options.shards, options.problems, options.seconds, options.device,
            options.longest, index=index, detail=detail,
            per_kind=FEW_PER_KIND if options.plant or options.device == "cpu" else PER_KIND,
        )  # fmt: skip
    if options.only is not None:
        torch.set_num_threads(1)
        return only(options.only, options.backend, options.device, options.longest)
    began = time.monotonic()
    each = -(-options.problems // options.shards)
    shards = [Shard(i, each) for i in range(options.shards)]
    planted = Shard(options.shards, min(CONTROL_PROBLEMS, each), planted=True)
    with tempfile.TemporaryDirectory() as name:
        Fuzz(Path(name), options.seed, options.device, options.seconds, options.longest).run([*shards, planted])
    ran = time.monotonic() - began
    counts = sum((shard.counts for shard in shards), Counter[str]())
    failures = [failure for shard in shards for failure in shard.failures]
    for failure in failures:  # at once: to shrink them takes a while
        print(f"seed {failure['seed']}, {failure['backend'] or 'chosen'}: {failure['wrong']}", flush=True)
    until = time.monotonic() + options.shrink
    shown = [shrink(failure, options.device, options.longest, until) for failure in failures[:MOST_SHRUNK]]
    for failure in shown:
        print(f"  {failure['repro']}\n    {failure['wrong']}")
    kernels = ", ".join(f"{counts[b]:,} by {n}" for b, n in (("portable", "the portable kernel"), ("chosen", "choice")))
    row = record.Row(
        "Random problems over every option pass every gate, and nothing is written beside an output",
        f"{counts['problems']:,} problems ({kernels}; {counts['problems'] / ran:.0f}/s): {len(failures)} failed",
        f"“{CONTROL}” planted: {len(planted.failures)} of {planted.counts['problems']} problems failed",
        not failures and counts["problems"] > 0 and bool(planted.failures),
    )
    return record.finish(
        "fuzz", [row], options.json, arguments=argv, seconds=ran, gpu=options.device != "cpu",
        complete=counts["problems"] >= 0.95 * options.problems, seed=options.seed, device=options.device,
        counts=dict(counts), failures=[*shown, *failures[MOST_SHRUNK:]], restarts=sum(s.restarts for s in shards),
        shards=[dict(shard.counts) for shard in shards],
    )  # fmt: skip


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = record.parser("fuzz", "Random problems through every gate, in processes that may crash.")
    parser.add_argument("--problems", type=int, default=100_000 if on_gpu else 200, metavar="N", help="(%(default)s)")
    parser.add_argument("--shards", type=int, default=14 if on_gpu else 1, metavar="K", help="processes (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=300.0, metavar="T",
        help="at most (%(default)s), but for what is under way then",
    )  # fmt: skip
    parser.add_argument(
        "--shrink", type=float, default=120.0, metavar="T", help="at most, to make failures smaller (%(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--only", type=int, metavar="SEED", help="run this problem alone, in this process")
    parser.add_argument("--backend", choices=("portable", "hopper"), help="with --only; chosen when left out")
    longest = problems.LONGEST if on_gpu else ON_CPU
    parser.add_argument("--longest", type=int, default=longest, help="rows, and keys, of a sequence (%(default)s)")
    parser.add_argument("--plant", metavar="FAULT", help="a fault of flashcore/testing/mutants.py in the kernel")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # a worker's journal
    parser.add_argument("--from", dest="start", default="0:0", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
