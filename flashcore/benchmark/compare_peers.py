"""FlashCore beside every peer on the same inputs: device time, warm and cold, in one process with the order rotated.

    python -m flashcore.benchmark.compare_peers --suite nine --cold --json results/peers-nine.json

A peer that isn't installed, refuses a shape, fails the error gate, raises, hangs or takes the GPU down loses its own
figures and nothing else: the measuring runs in a process of its own (isolation.py), which is started again where it
stopped. With --json, an interrupted run is taken up again by the same command. Several suites make one record, in which
each case names its suites; with --jobs, what is compiled for them is compiled by so many processes beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashcore.benchmark import peers_text, results
from flashcore.benchmark.isolation import Journal, Writer, supervise
from flashcore.benchmark.shapes import SEED, SUITES, Shape
from flashcore.benchmark.terminal import Terminal
from flashcore.measure import machine

# torch's default is one of its backends below, and its math path takes memory quadratic in the length
BESIDE = ("sdpa-flash", "sdpa-cudnn", "triton-plain", "fa4", "fa3", "fa2", "flex", "varlen", "flashinfer",
          "xformers", "sdpa-efficient")  # fmt: skip
COMPILED = ("flashcore", "flashcore-portable", "flashcore-hopper", "triton-plain", "fa4", "flex")  # for each shape
OURS = ("flashcore", "flashcore-portable", "flashcore-hopper")
NAMES = (*OURS, "sdpa", *BESIDE, "sdpa-math")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when FlashCore was wrong or failed somewhere, or not everything was measured."""
    options = _options(argv)
    shapes = _shapes(options)
    if options.worker:
        measure(shapes, options, options.worker)
        return 0
    if options.compile:
        compile_ahead(shapes[options.compile[0] :: options.compile[1]], options.peers)
        return 0
    if not torch.cuda.is_available():
        print("compare_peers: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        journal = options.json.with_suffix(".journal") if options.json else Path(folder) / "journal"
        record = supervised(shapes, options, journal, list(sys.argv[1:] if argv is None else argv))
        for text in peers_text.rest(record):
            print(text)
        if options.json:
            results.write(options.json, record)
            print(f"Measurements written to {options.json}")
            if record["complete"]:
                for leftover in (journal, journal.with_suffix(".log")):
                    leftover.unlink(missing_ok=True)
    return 0 if record["complete"] and peers_text.passed(record) else 1


def supervised(
    shapes: Sequence[Shape], options: argparse.Namespace, path: Path, arguments: Sequence[str]
) -> dict[str, Any]:
    """Measure in a worker process, print rows as they come, and return the record."""
    protocol = {
        "name": "gpu warm + gpu cold" if options.cold else "gpu warm",
        "seed": SEED,
        "replays": options.replays,
        "contestants": ["flashcore", *options.peers],
    }
    header = {"source": machine.source(), "protocol": protocol, "shapes": [shape.as_json() for shape in shapes]}
    if Journal.read(path).header != header:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        Writer(path)(header=header)
    command = [sys.executable, "-m", "flashcore.benchmark.compare_peers", *arguments]
    deadline = time.monotonic() + options.budget
    compiling_s = _compile_in_processes(command, options.jobs, options.patience, deadline)
    with Terminal(len(shapes), "measuring") as terminal:
        for text in peers_text.head(protocol):
            terminal.line(text)

        def heard(entry: dict[str, Any]) -> None:
            if "fault" in entry:
                terminal.line("  {}: {}: {}".format(*entry["fault"]))
                return
            for text in peers_text.rows(entry, protocol):
                terminal.line(text)
            terminal.advance()

        for case in Journal.read(path).cases.values():
            heard(case)
        finished = supervise(
            [*command, "--worker", str(path)], path, patience_s=options.patience,
            budget_s=deadline - time.monotonic(), heard=heard,
        )  # fmt: skip
    journal = Journal.read(path)
    suites = {} if options.shape else {name: [s.label for s in SUITES[name]] for name in options.suite}
    for label, case in journal.cases.items():
        case["suites"] = [name for name, labels in suites.items() if label in labels]
    return {
        "kind": "peers",
        "suite": " ".join(suites) or "own",
        "suites": {name: all(label in journal.cases for label in labels) for name, labels in suites.items()},
        "complete": finished and len(journal.cases) == len(shapes),
        "environment": journal.facts.get("environment") or machine.environment(),
        "protocol": protocol,
        "compiling_s": compiling_s,
        "ceilings": journal.facts.get("ceilings"),
        "faults": [[case, who, why] for (case, who), why in journal.faults.items()],
        "cases": list(journal.cases.values()),
    }


def _compile_in_processes(command: Sequence[str], jobs: int, patience_s: float, deadline: float) -> float:
    """Have `jobs` processes compile before anything is timed. Returns the seconds that it took.

    Compilers keep what they made on disk, where the measuring process finds it. What goes wrong here goes wrong again
    there, and is reported there.
    """
    started = time.monotonic()
    deadline = min(deadline, started + patience_s)
    processes = [
        subprocess.Popen([*command, "--compile", f"{i}/{jobs}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(jobs)
    ]
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - started


def compile_ahead(shapes: Sequence[Shape], names: Sequence[str]) -> None:
    """Call every contestant that compiles for a shape once, without a look at what it says."""
    from flashcore.benchmark import peers

    for shape in shapes:
        inputs = shape.inputs()
        for name in ("flashcore", *names):
            if name in COMPILED:
                with contextlib.suppress(Exception):
                    peers.ALL[name].require(shape)
                    prepared = peers.ALL[name].prepare(shape, *inputs)
                    with prepared.context():
                        prepared.call()
                    torch.cuda.synchronize()


def measure(shapes: Sequence[Shape], options: argparse.Namespace, path: Path) -> None:
    """The worker: appends to the journal what it finds out, and leaves out what is there already."""
    before, write = Journal.read(path), Writer(path)
    environment = machine.environment()
    write(environment=environment)
    if "ceilings" not in before.facts:
        from flashcore.measure.ceilings import ceilings

        write.at("ceilings", "torch")
        write(ceilings=None if before.blamed("ceilings", "torch") else ceilings(environment["l2_bytes"]))
    for shape in shapes:
        if shape.label not in before.cases:
            write(case=shape.label, **_case(shape, options, environment["l2_bytes"], before, write))


def _case(
    shape: Shape, options: argparse.Namespace, l2_bytes: int, before: Journal, write: Writer
) -> dict[str, Any]:
    from flashcore.benchmark import contest, peers

    inputs = shape.inputs()
    admitted: dict[str, peers.Peer] = {}
    found: dict[str, Any] = {}
    for name in ("flashcore", *options.peers):
        peer = peers.ALL[name]
        if why := before.blamed(shape.label, name):
            admission = contest.Admission("failed", why, {})
        else:
            write.at(shape.label, name)
            admission = contest.admit(peer, shape, inputs)
        found[name] = admission.as_json(peer)
        if admission.prepared:
            admitted[name] = peer
    states = [machine.gpu_state()]
    for clock, cold in (("gpu_warm", False), ("gpu_cold", True)):
        if cold and not options.cold:
            continue
        timed, failed = contest.gpu_clock(
            admitted, shape, cold=cold, l2_bytes=l2_bytes, replays=options.replays,
            watch=lambda name: write.at(shape.label, name),
        )  # fmt: skip
        for name, timing in timed.items():
            found[name][clock] = timing
        for name, why in failed.items():
            found[name] |= {"status": "failed", "reason": why}
            del admitted[name]
        states.append(machine.gpu_state())
    torch.cuda.empty_cache()
    return {"shape": shape.as_json(), "contestants": found, "gpu_states": states}


def _shapes(options: argparse.Namespace) -> list[Shape]:
    own = [Shape(b, h, s, d, options.causal, options.dtype) for b, h, s, d in options.shape]
    suites = [shape for name in options.suite for shape in SUITES[name]]
    return list(dict.fromkeys(own or suites))


def _sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected B,H,S,D, got {text!r}")
    return [int(size) for size in sizes]


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.compare_peers", description="FlashCore beside every peer, on device time."
    )
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=["nine"])
    parser.add_argument("--shape", type=_sizes, nargs="+", default=[], metavar="B,H,S,D", help="instead of a suite")
    parser.add_argument("--causal", action="store_true", help="with --shape: a causal mask")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="with --shape")
    parser.add_argument(
        "--peers", nargs="+", choices=NAMES[1:], default=BESIDE, metavar="NAME", help=f"of {', '.join(NAMES[1:])}"
    )
    parser.add_argument("--cold", action="store_true", help="also with inputs that left the L2")
    parser.add_argument("--replays", type=int, default=30, metavar="N", help="timed replays of each graph (30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="stop after so many seconds")
    parser.add_argument(
        "--patience", type=float, default=150, metavar="S", help="a peer silent for so long hangs (150)"
    )
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="compile in N processes first (0)")
    parser.add_argument("--compile", type=_part, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.peers = list(dict.fromkeys(options.peers))
    return options


if __name__ == "__main__":
    sys.exit(main())
