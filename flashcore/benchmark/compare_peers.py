"""FlashCore beside every peer on the same inputs, on every clock asked for, in one process with the order rotated.

    flashcore bench --suite nine --cold --json results/peers-nine.json
    flashcore bench --shape 32,12,384,64 --clock all --html bench.html
    flashcore bench --from-model bert-base-uncased

A peer that isn't installed, refuses a shape, fails the error gate, raises, hangs or takes the GPU down loses its own
figures and nothing else: the measuring runs in a process of its own (isolation.py), which is started again where it
stopped. With --json, an interrupted run is taken up again by the same command. Several suites make one record, in which
each case names its suites; with --jobs, what is compiled for them is compiled by so many processes beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashcore.benchmark import model_shapes, page, peers_text, results
from flashcore.benchmark.isolation import Journal, Writer, supervise
from flashcore.benchmark.shapes import SEED, SUITES, Shape
from flashcore.benchmark.terminal import Terminal
from flashcore.measure import machine

# torch's default is one of its backends below, and its math path takes memory quadratic in the length
BESIDE = ("sdpa-flash", "sdpa-cudnn", "triton-plain", "fa4", "fa3", "fa2", "flex", "varlen", "flashinfer",
          "xformers", "sdpa-efficient", "sdpa-cudnn-square", "sdpa-efficient-square")  # fmt: skip
COMPILED = ("flashcore", "flashcore-portable", "flashcore-hopper", "triton-plain", "flex")  # and kept on disk
OURS = ("flashcore", "flashcore-portable", "flashcore-hopper")
# What belongs to --shape, and its value where it isn't given.
OF_SHAPES = {"causal": False, "heads_kv": 0, "window": (-1, -1), "softcap": 0.0, "bias": "", "lengths": ""}
NAMES = (*OURS, "sdpa", *BESIDE, "sdpa-math")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when FlashCore was wrong or failed somewhere, or not everything was measured."""
    options = _options(argv)
    try:
        shapes = _shapes(options)
    except ValueError as misuse:
        print(f"flashcore bench: {misuse}", file=sys.stderr)
        return 2
    if options.worker:
        measure(shapes, options, options.worker)
        return 0
    if options.compile:
        compile_ahead(shapes[options.compile[0] :: options.compile[1]], options.peers)
        return 0
    if not torch.cuda.is_available():
        print("flashcore bench: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        journal = options.json.with_suffix(".journal") if options.json else Path(folder) / "journal"
        record = supervised(shapes, options, journal, list(sys.argv[1:] if argv is None else argv))
        for text in peers_text.rest(record):
            print(text)
        if options.json:
            results.write(options.json, record)
            print(f"Measurements written to {options.json}")
        if options.html:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            named = {**record, "file": options.json.name if options.json else "this run"}
            options.html.write_text(page.page([named]), encoding="utf-8")
            print(f"Page written to {options.html}")
        if record["complete"]:
            for leftover in (journal, journal.with_suffix(".log")):
                leftover.unlink(missing_ok=True)
    return 0 if record["complete"] and peers_text.passed(record) else 1


def supervised(
    shapes: Sequence[Shape], options: argparse.Namespace, path: Path, arguments: Sequence[str]
) -> dict[str, Any]:
    """Measure in a worker process, print rows as they come, and return the record."""
    protocol = {
        "name": " + ".join(peers_text.CLOCKS[clock] for clock in _clocks(options)),
        "seed": SEED,
        "replays": options.replays,
        **({"trials": options.trials} if options.clock in ("call", "all") else {}),
        "contestants": ["flashcore", *options.peers],
    }
    header = {"source": machine.source(), "protocol": protocol, "shapes": [shape.as_json() for shape in shapes]}
    if Journal.read(path).header != header:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        Writer(path)(header=header)
    command = [sys.executable, "-m", "flashcore.benchmark.compare_peers", *arguments]
    deadline = time.monotonic() + options.budget
    if options.jobs:
        print(f"compiling in {options.jobs} processes", flush=True)
    compiling_s = _compile_in_processes(command, options.jobs, min(options.patience, options.budget / 3))
    with Terminal(len(shapes), "measuring") as terminal:
        for text in peers_text.head(protocol):
            terminal.line(text)

        def heard(entry: dict[str, Any]) -> None:
            if "fault" in entry:
                terminal.line("  {}: {}: {}".format(*entry["fault"]))
                return
            for text in peers_text.rows(entry, protocol, Journal.read(path).facts.get("ceilings")):
                terminal.line(text)
            terminal.advance()

        for case in Journal.read(path).cases.values():
            heard(case)
        finished = supervise(
            [*command, "--worker", str(path)], path, patience_s=options.patience,
            budget_s=deadline - time.monotonic(), heard=heard,
        )  # fmt: skip
    journal = Journal.read(path)
    suites = {} if _own(options) else {name: [s.label for s in SUITES[name]] for name in options.suite}
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
        "event_floor_us": journal.facts.get("event_floor_us"),
        "cross_check": journal.facts.get("cross_check"),
        "faults": [[case, who, why] for (case, who), why in journal.faults.items()],
        "cases": list(journal.cases.values()),
    }


def _compile_in_processes(command: Sequence[str], jobs: int, limit_s: float) -> float:
    """Have `jobs` processes compile before anything is timed, for at most `limit_s`. Returns the seconds it took.

    Compilers keep what they made on disk, where the measuring process finds it. What goes wrong here goes wrong again
    there, and is reported there.
    """
    started = time.monotonic()
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # it starts a process for each core otherwise
    processes = [
        subprocess.Popen(
            [*command, "--compile", f"{i}/{jobs}"], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for i in range(jobs)
    ]
    for process in processes:
        try:
            process.wait(max(0.0, started + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - started


def compile_ahead(shapes: Sequence[Shape], names: Sequence[str]) -> None:
    """Call every contestant that compiles for a shape once, without a look at what it says.

    In COMPILED's order, all shapes of one before the next: who is slow, or loses the GPU, keeps none before it waiting.
    """
    from flashcore.benchmark import peers

    for name in COMPILED:
        for shape in shapes if name in ("flashcore", *names) else ():
            with contextlib.suppress(Exception):
                peers.ALL[name].require(shape)
                prepared = peers.ALL[name].prepare(shape, *shape.inputs())
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
    if "call" in _clocks(options) and "event_floor_us" not in before.facts:
        from flashcore.measure import clocks, statistics

        floor = statistics.summarize(clocks.event_floor(trials=options.trials))
        write(event_floor_us=results.latency(floor, None, None))
    for shape in shapes:
        if shape.label not in before.cases:
            started = time.monotonic()
            found = _case(shape, options, environment["l2_bytes"], before, write)
            write(case=shape.label, seconds=time.monotonic() - started, **found)
    if options.cross_check and "cross_check" not in before.facts:  # last: what goes wrong there costs no case
        write(cross_check=_cross_check(options.cross_check, shapes[0], before, write))


def _cross_check(name: str, shape: Shape, before: Journal, write: Writer) -> dict[str, Any]:
    from flashcore.benchmark import contest, peers

    case = "cross-check"
    why = before.blamed(case, name) or before.blamed(case, contest.OTHER_CLOCK)
    found = {"reason": why} if why else contest.cross_check(peers.ALL[name], shape, lambda who: write.at(case, who))
    return {"contestant": name, "case": shape.label, **found}


def _case(
    shape: Shape, options: argparse.Namespace, l2_bytes: int, before: Journal, write: Writer
) -> dict[str, Any]:
    from flashcore.benchmark import contest, peers

    inputs = shape.inputs()
    admitted: dict[str, peers.Peer] = {}
    prepared: dict[str, peers.Prepared] = {}
    found: dict[str, Any] = {}
    for name in ("flashcore", *options.peers):
        peer = peers.ALL[name]
        if not peer.enters(shape):
            continue
        if why := before.blamed(shape.label, name):
            admission = contest.Admission("failed", why, {})
        else:
            write.at(shape.label, name)
            admission = contest.admit(peer, shape, inputs)
        found[name] = admission.as_json(peer)
        if admission.prepared:
            admitted[name], prepared[name] = peer, admission.prepared
    states = [machine.gpu_state()]
    for clock in _clocks(options):
        failed: dict[str, str] = {}
        if clock.startswith("gpu"):
            timed, failed = contest.gpu_clock(
                admitted, shape, cold=clock == "gpu_cold", alone=clock == "gpu_alone", l2_bytes=l2_bytes,
                replays=options.replays, watch=lambda name: write.at(shape.label, name),
            )  # fmt: skip
        elif before.blamed(shape.label, clock):
            continue
        else:
            write.at(shape.label, clock)
            here = {name: prepared[name] for name in admitted}
            timed = (
                contest.call_clock(here, trials=options.trials, warmup=100, ratios=True)
                if clock == "call"
                else contest.host_clock(here)
            )
        for name, timing in timed.items():
            found[name][clock] = timing
        for name, why in failed.items():
            found[name] |= {"status": "failed", "reason": why}
            del admitted[name]
        states.append(machine.gpu_state())
    torch.cuda.empty_cache()
    return {"shape": shape.as_json(), "contestants": found, "gpu_states": states}


def _own(options: argparse.Namespace) -> bool:
    """Whether the user brought shapes, instead of suites."""
    return bool(options.shape or options.from_model)


def _shapes(options: argparse.Namespace) -> list[Shape]:
    if not options.shape:
        stray = [name for name, none in OF_SHAPES.items() if getattr(options, name) != none]
        if stray or (options.dtype and not options.from_model):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in stray) or "--dtype"
            raise ValueError(f"{names}: for your own shapes, with --shape; a suite has its own")
    dtype = options.dtype or "float16"
    own = [Shape(b, h, s, d, options.causal, dtype, **_features(options, b)) for b, h, s, d in options.shape]
    if options.from_model:
        own += model_shapes.shapes(options.from_model, options.batch, options.dtype)
    suites = [shape for name in options.suite for shape in SUITES[name]]
    return list(dict.fromkeys(own if _own(options) else suites))


def _features(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    return {
        "heads_kv": options.heads_kv, "window": tuple(options.window), "softcap": options.softcap,
        "bias": {"": 0, "one": 1, "batch": batch}[options.bias], "lengths": options.lengths,
    }  # fmt: skip


def _clocks(options: argparse.Namespace) -> list[str]:
    """The keys of peers_text.CLOCKS that are asked for."""
    asked = {"gpu", "call", "host"} if options.clock == "all" else {options.clock}
    gpu = "gpu" in asked
    wanted = {"gpu_warm": gpu, "gpu_cold": gpu and options.cold, "gpu_alone": gpu and options.alone,
              "call": "call" in asked, "host": "host" in asked}  # fmt: skip
    return [clock for clock in peers_text.CLOCKS if wanted[clock]]


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
        prog="flashcore bench", description="FlashCore beside every other library on the same problems.",
        epilog="`flashcore bench host` measures what a call costs the CPU, path by path.",
    )  # fmt: skip
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=["nine"])
    parser.add_argument("--shape", type=_sizes, nargs="+", default=[], metavar="B,H,S,D", help="instead of a suite")
    parser.add_argument(
        "--from-model", metavar="NAME_OR_CONFIG", help="the shapes of a Hugging Face model: a path, or a name as "
        "bert-base-uncased"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=model_shapes.BATCHES, metavar="B", help="with --from-model (1 8 32)"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="with --shape (float16) or --from-model (its)")
    shape = parser.add_argument_group("with --shape")
    shape.add_argument("--causal", action="store_true", help="a causal mask")
    shape.add_argument("--heads-kv", type=int, default=0, metavar="H", help="key and value heads (as many as heads)")
    shape.add_argument("--window", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"), help="-1 = all")
    shape.add_argument("--softcap", type=float, default=0.0, metavar="C", help="a soft cap of the scores")
    shape.add_argument("--bias", choices=("one", "batch"), default="", help="an additive bias [1 or B, H, S, S]")
    shape.add_argument("--lengths", choices=("padded", "packed"), default="", help="sequences of S/4 to S tokens")
    parser.add_argument(
        "--peers", nargs="+", choices=NAMES[1:], default=BESIDE, metavar="NAME", help=f"of {', '.join(NAMES[1:])}"
    )
    parser.add_argument(
        "--clock", choices=("call", "gpu", "host", "all"), default="gpu",
        help="gpu: device time; call: one eager call with its launch; host: CPU time of a call (gpu)",
    )  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="device time also with inputs that left the L2")
    parser.add_argument(
        "--alone", action="store_true", help="device time also of each contestant by itself, at the clock that its own "
        "power leaves: two seconds each"
    )  # fmt: skip
    parser.add_argument("--replays", type=int, default=30, metavar="N", help="timed replays of each graph (30)")
    parser.add_argument("--trials", type=int, default=1000, metavar="N", help="trials of the call clock (1000)")
    parser.add_argument(
        "--cross-check", nargs="?", const="flashcore", choices=NAMES, metavar="NAME",
        help="time this contestant (flashcore) on the first shape by NVBench too, or by Triton's timer without it",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page here")
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
