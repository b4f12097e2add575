"""The GPU tests in a few processes at once, each with a time limit, and what came of them as one JSON file.

    python tests/run_on_gpu.py [--shards N] [--limit 540] [--json PATH] [pytest's own arguments]

Most of a GPU test's time is the compiler's, on one core, so several processes share the GPU. What measures time has it
to itself: such tests run when all else is done. A process that passes the limit is interrupted, then killed; its
last lines of output, and the stack of a test that hangs, are in the record. Prints the record's summary; the exit
status is 0 when every process ran to its end and no test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALONE = "alone"  # the shard of the tests that measure
MEASURING = (
    "tests/benchmark/", "tests/integrations/distributed/test_gpus.py", "tests/measure/",
    "tests/security/test_timing.py",
)  # fmt: skip
# Seconds of a test, roughly, where they are far from the usual one: what shares are dealt by. The record's `slowest`
# says where these are wrong.
SECONDS = {
    "tests/behaviour/test_problems.py": 55.0, "tests/behaviour/test_conventions.py::test_any_call": 35.0,
    "tests/behaviour/": 0.15, "tests/docs/": 8.0, "tests/fast/test_attention_gpu.py::test_a_fork": 16.0,
    "tests/fast/test_attention_gpu.py::test_compiled": 12.0,
    "tests/fast/test_attention_gpu.py::test_many_keys": 5.0, "tests/integrations/distributed/": 1.0,
    "tests/integrations/test_compiled_models.py": 30.0, "tests/integrations/test_examples.py": 20.0,
    "tests/integrations/": 6.0, "tests/kernels/test_hopper_mutants.py": 18.0, "tests/launch/test_ops.py": 4.0,
    "tests/testing/": 0.2,
}  # fmt: skip
SHARDS = max(6, min(10, 2 * (os.cpu_count() or 1) // 3))
SLOWEST = 20  # tests named in the record
UNFINISHED = "unfinished"  # the process ended in this test
OUTCOMES = ("passed", "failed", UNFINISHED, "skipped")
GRACE_S = 15  # between an interrupt, at which pytest prints where it was, and the kill
FOR_ALONE = 0.3  # of the limit is kept for that shard
HUNG_S = 120  # a test that takes longer has its stacks printed
TAIL = 40  # lines kept of a traceback, or of the output of a process that did not end well
ENDED = {int(pytest.ExitCode.OK), int(pytest.ExitCode.TESTS_FAILED), int(pytest.ExitCode.NO_TESTS_COLLECTED)}


# -- one process ------------------------------------------------------------------------------------------------


class Shard:
    """A pytest plugin: leaves one shard of the collected tests, "0/6" ... "5/6" or "alone", and notes what each does.

    Every note is a line of its own, written at once: a report at the end is lost with a process that crashes or hangs.
    """

    def __init__(self, name: str, notes: TextIO) -> None:
        self.name, self.notes = name, notes

    def note(self, **found: Any) -> None:
        print(json.dumps(found), file=self.notes, flush=True)

    @pytest.hookimpl(trylast=True)  # after `-m` and `-k`
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mine = set(share([item.nodeid for item in items], self.name))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
        items[:] = [item for item in items if item.nodeid in mine]
        self.note(selected=len(items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(test=nodeid, outcome=UNFINISHED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = report.longreprtext.splitlines()
            message = crash.message if crash else lines[-1]
            self.note(test=report.nodeid, outcome="failed", message=message, traceback="\n".join(lines[-TAIL:]))
        elif report.skipped:
            self.note(test=report.nodeid, outcome="skipped", message=str(report.longrepr[-1]))
        elif report.when == "call":
            self.note(test=report.nodeid, outcome="passed", seconds=round(report.duration, 2))


def share(nodeids: list[str], shard: str) -> list[str]:
    """The tests of one shard; every test is in just one.

    Parameters of one function stay together, as far as they fill no more than half of a shard: they share kernels.
    """
    def measures(nodeid: str) -> bool:
        return nodeid.startswith(MEASURING)

    if shard == ALONE:
        return list(filter(measures, nodeids))
    index, shards = map(int, shard.split("/"))
    functions: dict[str, list[str]] = defaultdict(list)
    for nodeid in itertools.filterfalse(measures, nodeids):
        functions[nodeid.split("[")[0]].append(nodeid)
    half = sum(map(seconds, itertools.chain(*functions.values()))) / shards / 2
    parts = []
    for function in functions.values():
        size = max(1, int(half / seconds(function[0])))
        parts += [function[first : first + size] for first in range(0, len(function), size)]
    dealt = [(0.0, i, list[str]()) for i in range(shards)]
    for part in sorted(parts, key=lambda part: sum(map(seconds, part)), reverse=True):  # the longest to the shortest
        load, i, mine = heapq.heappop(dealt)
        heapq.heappush(dealt, (load + sum(map(seconds, part)), i, [*mine, *part]))
    return next(mine for _, i, mine in dealt if i == index)


def seconds(nodeid: str) -> float:
    """What a test takes, roughly."""
    return next((found for prefix, found in SECONDS.items() if nodeid.startswith(prefix)), 1.0)


def run_shard(shard: str, notes: Path, arguments: list[str]) -> int:
    options = ["-m", "gpu", "-v", "--tb=short", "--no-header", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += ["-o", f"faulthandler_timeout={HUNG_S}"]
    with notes.open("w") as file:
        return int(pytest.main([*options, *arguments], plugins=[Shard(shard, file)]))


# -- all of them ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One shard at work, and afterwards what is known of it."""

    shard: str
    folder: Path
    started: float
    process: subprocess.Popen[bytes]
    status: int | None = None
    seconds: float = 0.0
    selected: int = 0
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last word on each that was started

    @property
    def complete(self) -> bool:
        return self.status in ENDED

    def count(self, outcome: str) -> int:
        return sum(test["outcome"] == outcome for test in self.tests.values())

    def failures(self) -> list[dict[str, Any]]:
        return [test for test in self.tests.values() if test["outcome"] in ("failed", UNFINISHED)]

    def record(self) -> dict[str, Any]:
        told = {"shard": self.shard, "complete": self.complete, "seconds": round(self.seconds, 1)}
        counts = {outcome: self.count(outcome) for outcome in OUTCOMES}
        found = {**told, "selected": self.selected, **counts}
        return found if self.complete else {**found, "status": self.status, "last_lines": self.last_lines()}

    def last_lines(self) -> list[str]:
        return (self.folder / "log").read_text(errors="replace").splitlines()[-TAIL:]


def start(shard: str, folder: Path, arguments: list[str]) -> Run:
    folder.mkdir()
    command = [sys.executable, __file__, "--shard", shard, "--notes", str(folder / "notes"), *arguments]
    # A session of its own: the limit also ends what a test has started.
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return Run(shard, folder, time.monotonic(), process)


def finish(run: Run, deadline: float) -> None:
    """Wait for a shard until the deadline, end it there, and read its notes."""
    try:
        run.status = run.process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        run.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.status = run.process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # it, if it is still there, and what its tests have started
        os.killpg(run.process.pid, signal.SIGKILL)
    run.status = run.process.wait()
    run.seconds = time.monotonic() - run.started
    read_notes(run)


def read_notes(run: Run) -> None:
    notes = run.folder / "notes"
    for line in notes.read_text().splitlines() if notes.exists() else ():
        found = json.loads(line)
        if "selected" in found:
            run.selected = found["selected"]
        elif run.tests.get(found["test"], found)["outcome"] != "failed":  # nor is it passed when its teardown fails
            run.tests[found["test"]] = found


def summary(record: dict[str, Any]) -> str:
    lines = []
    for failure in record["failures"]:
        lines += [f"{failure['outcome'].upper()} {failure['test']}", failure.get("traceback", ""), ""]
    for run in record["runs"]:
        counts = ", ".join(f"{run[outcome]} {outcome}" for outcome in OUTCOMES)
        done = f"{counts} of {run['selected']} in {run['seconds']} s"
        lines.append(f"shard {run['shard']}: {done}{_unless_complete(run)}")
        lines += [f"    {line}" for line in run.get("last_lines", ())]
    lines += [f"skipped {count}: {why}" for why, count in record["skipped_because"].items()]
    total = ", ".join(f"{record[outcome]} {outcome}" for outcome in OUTCOMES)
    return "\n".join([*lines, total + _unless_complete(record)])


def _unless_complete(found: dict[str, Any]) -> str:
    return "" if found["complete"] else ", NOT COMPLETE"


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--shards", type=int, default=SHARDS, help=f"processes at once (default here {SHARDS})")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything together (default 540)")
    parser.add_argument("--no-measuring", action="store_true", help="without the tests that measure")
    parser.add_argument("--json", type=Path, help="where to write (default results/gpu-tests-<gpu>-<date>.json)")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    chosen, arguments = parser.parse_known_args()
    if chosen.shard:
        return run_shard(chosen.shard, chosen.notes, arguments)

    from flashcore.benchmark import results
    from flashcore.measure import machine

    environment = machine.environment()
    ends = time.monotonic() + chosen.limit - GRACE_S
    together_ends = ends - (0 if chosen.no_measuring else chosen.limit * FOR_ALONE)
    with tempfile.TemporaryDirectory() as folder:
        runs = [start(f"{i}/{chosen.shards}", Path(folder, str(i)), arguments) for i in range(chosen.shards)]
        for run in runs:
            finish(run, together_ends)
        if not chosen.no_measuring:
            runs.append(start(ALONE, Path(folder, ALONE), arguments))
            finish(runs[-1], ends)
        timed = [(test["seconds"], test["test"]) for run in runs for test in run.tests.values() if "seconds" in test]
        skipped = [test["message"] for run in runs for test in run.tests.values() if test["outcome"] == "skipped"]
        record = {
            "kind": "gpu-tests", "environment": environment,
            "protocol": {"limit_s": chosen.limit, "arguments": arguments},
            "complete": all(run.complete for run in runs),
            **{outcome: sum(run.count(outcome) for run in runs) for outcome in OUTCOMES},
            "runs": [run.record() for run in runs],
            "failures": [failure for run in runs for failure in run.failures()],
            "skipped_because": dict(Counter(skipped)),
            "slowest": dict((test, took) for took, test in sorted(timed, reverse=True)[:SLOWEST]),
        }  # fmt: skip
    results.write(chosen.json or results.default_path("gpu-tests", environment), record)
    print(summary(record))
    return 0 if record["complete"] and record["passed"] and not record["failures"] else 1


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # it was this folder
    sys.exit(main())
