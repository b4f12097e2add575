"""docs/validation/RELIABILITY_REPORT.md: every claim of reliability beside what was measured and what has to fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashcore.benchmark import results

Record = dict[str, Any]

# Kind of record -> what it is asked for, where nobody ran it yet, and the command.
KINDS: dict[str, tuple[str, str]] = {
    "gpu-tests": ("Every test that needs a GPU passes on one", "make gpu-test"),
    "audit-fuzz": ("Random problems over every option pass every gate", "flashcore audit fuzz"),
    "audit-bitwise": ("The same bits on every repeat, stream, process and place in a batch", "flashcore audit bitwise"),
    "audit-load": ("Threads and streams at once: right every time, and memory does not grow", "flashcore audit load"),
    "audit-sanitize": ("compute-sanitizer finds nothing in any kernel or option", "flashcore audit sanitize"),
    "audit-faults": ("After a fault the next call is right; only problems are launched", "flashcore audit faults"),
    "audit-tables": ("Hostile tuning tables and simultaneous starts break nothing", "flashcore audit tables"),
    "audit-sass": ("No branch and no address depends on q, k or v", "flashcore audit sass"),
    "audit-timing": (
        "Cycles, and wall time on few blocks, do not depend on what q, k and v hold", "flashcore audit timing"
    ),
}
NOT_RUN = {80: "A100", 89: "L4"}  # architecture -> the GPU that stands for it, of which there may be no record


class Line(NamedTuple):
    """One row of the table."""

    claim: str
    figure: str
    control: str
    passed: bool


def _said(record: Record) -> Iterator[Line]:
    """What the audits of flashcore/security/record.py say themselves."""
    for row in record["rows"]:
        yield Line(row["claim"], row["figure"], row["control"], row["passed"])


def _gpu_tests(record: Record) -> Iterator[Line]:
    figure = f"{record['passed']:,} passed, {record['failed']} failed, {record['skipped']} skipped"
    done = record["passed"] + record["failed"] + record["skipped"]
    left = sum(run["selected"] for run in record["runs"]) - done
    if left:
        figure += f", {left} cut off by the time limit"
    yield Line(KINDS["gpu-tests"][0], figure, "", not record["failed"] and not left)


def _fuzz(record: Record) -> Iterator[Line]:
    """The newest run, and with it those of other seeds on the same GPU: no two seeds share a problem."""
    others = record["others"]
    for row, line in zip(record["rows"], _said(record), strict=True):
        if others:
            counts = [run["counts"]["problems"] for run in (record, *others)]
            failed = sum(len(run["failures"]) for run in (record, *others))
            figure = f"{sum(counts):,} problems in {len(counts)} runs of different seeds: {failed} failed"
            line = line._replace(figure=figure, passed=row["passed"] and all(r["rows"][0]["passed"] for r in others))
        yield line


def _sass(record: Record) -> Iterator[Line]:
    for row in record["summary"]:
        tainted = row["tainted_branches"] + row["tainted_addresses"] + row["tainted_other"]
        caught = f"{row['controls_caught']} of {row['controls']} kernels with a branch on data found"
        yield Line(
            f"{KINDS['audit-sass'][0]}, sm_{row['arch']}",
            f"{row['clean']:,} of {row['variants']:,} variants clean, {tainted} findings", caught,
            row["clean"] == row["variants"] and row["controls_caught"] == row["controls"] > 0,
        )  # fmt: skip
        yield Line(
            f"No register is read that nothing wrote, as compilers' faults have it, sm_{row['arch']}",
            f"{row['written']:,} of {row['variants']:,} variants",
            f"{row['gaps_noticed']:,} of them with one write taken away noticed",
            row["written"] == row["variants"] == row["gaps_noticed"],
        )  # fmt: skip


def _timing(record: Record) -> Iterator[Line]:
    cases = [case for case in record["cases"] if case.get("gated")]
    even, caught = sum(case["ok"] for case in cases), sum(case["ok"] for case in record["controls"])
    controls = f"{caught} of {len(record['controls'])} kernels with a branch on data told apart"
    figure = f"{even} of {len(cases)} comparisons within the limits"
    yield Line(KINDS["audit-timing"][0], figure, controls, even == len(cases) > 0 and caught == len(record["controls"]))


_LINES: dict[str, Callable[[Record], Iterator[Line]]] = {
    "gpu-tests": _gpu_tests, "audit-fuzz": _fuzz, "audit-sass": _sass, "audit-timing": _timing
}  # fmt: skip


def newest(folder: Path) -> dict[str, dict[str, Record]]:
    """Kind -> machine ("" = none with a GPU) -> its newest complete record; of the tests, cut off or not."""
    return _newest(folder, whole=True)


def _newest(folder: Path, whole: bool) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {kind: {} for kind in KINDS}
    for path in sorted(folder.glob("*.json")):
        record = results.read(path)
        is_whole = record["kind"] == "gpu-tests" or (record.get("complete", True) and not record.get("quick"))
        if record["kind"] not in KINDS or is_whole != whole:
            continue
        here, gpu = found[record["kind"]], record["environment"]["gpu"] or ""
        record |= {"file": path.name, "others": []}
        older = here.get(gpu)
        if older and _date(older) > _date(record):
            record, older = older, record
        if older:
            seeds = {record.get("seed"): record}
            record["others"] = [
                run for run in (*record["others"], older, *older["others"])
                if seeds.setdefault(run.get("seed"), run) is run
            ]  # fmt: skip
        here[gpu] = record
    return found


def _date(record: Record) -> str:
    """When it was recorded; the first GPU tests say it in their file's name alone."""
    named = re.search(r"\d{4}-\d\d-\d\d", record["file"])
    return str(record["environment"].get("recorded") or (named[0] if named else ""))


def _when(gpu: str, record: Record) -> str:
    return f"[{_date(record)[:10]}](../../results/{record['file']}), {gpu or 'no GPU'}"


def rows(folder: Path) -> Iterator[Sequence[str]]:
    """The table's rows: claim, figure, control, command, date and machine, and whether it holds."""
    found, smaller = newest(folder), _newest(folder, whole=False)
    for kind, (claim, command) in KINDS.items():
        for gpu, record in sorted(found[kind].items()):
            when = _when(gpu, record)
            for line in _LINES.get(kind, _said)(record):
                asked = f"`{record.get('command', command)}`"
                yield line.claim, line.figure, line.control or "-", asked, when, "yes" if line.passed else "**no**"
        if not found[kind]:
            said = "smaller runs than the claim asks for" if smaller[kind] else "not run yet"
            where = "; ".join(_when(gpu, record) for gpu, record in sorted(smaller[kind].items())) or "-"
            yield claim, said, "-", f"`{command}`", where, "-"
    audited = {row["arch"] for record in found["audit-sass"].values() for row in record["summary"]}
    machines = {gpu for kind in found.values() for gpu in kind}
    for arch, name in NOT_RUN.items():
        if not any(name in gpu.split() or f"{name}-" in gpu for gpu in machines):
            state = "compiled and audited, not run" if arch in audited else "not run yet"
            yield f"Everything above that needs a GPU, on {name} (sm_{arch})", state, "-", "-", "-", "-"


INTRODUCTION = (
    "Each claim is a command that you can run, and each command plants faults of its own, which it has to find in the"
    " same run: a row holds where the claim held and the control failed. Figures of a smaller run than the claim asks"
    " for are not shown. What `flashcore audit sass` and `audit timing` can't see is in [security.md](../security.md)."
)
