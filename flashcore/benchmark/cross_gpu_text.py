"""docs/validation/CROSS_GPU_VALIDATION_REPORT.md from results/: what was measured where, and what was only compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flashcore.benchmark import peers_text, resources, results, validation_text
from flashcore.benchmark.markdown import table, times
from flashcore.benchmark.page import SUITE_TITLES
from flashcore.measure import machine
from flashcore.measure.statistics import geometric_mean

Record = dict[str, Any]

MEANT_FOR = ("H100", "H200")  # without a record of one of these, the report says so


def report(folder: Path) -> Iterator[str]:
    """The report's lines. None without a record of any GPU."""
    validations = results.newest(folder, "validation")
    peers = {suite: peers_text.newest(folder, suite) for suite in SUITE_TITLES}
    gpus = sorted({*validations, *(gpu for found in peers.values() for gpu in found)})
    if not gpus:
        return
    yield "# FlashCore on several GPUs"
    yield ""
    yield (
        "What the files in results/ say, GPU by GPU; the reports beside this one have every figure. "
        "Absolute times hold on the machine that they were measured on; between machines compare ratios."
    )
    yield ""
    yield "## Measured"
    yield ""
    yield from _validated(validations)
    yield from _compared(gpus, peers)
    for name in MEANT_FOR:
        if not any(name in gpu for gpu in gpus):
            yield f"There is no record of an {name} yet."
            yield ""
    yield from _compiled(folder, gpus)
    yield "## Your GPU"
    yield ""
    yield (
        "`flashcore validate --json`, `flashcore bench --suite nine --cold --json results/peers-nine.json` and "
        "`flashcore submit-results` make one file that can be attached to an issue. `flashcore tune` measures which "
        "tiles are fastest there and writes the table that the choice of a kernel reads."
    )


def _validated(validations: dict[str, Record]) -> Iterator[str]:
    rows = []
    for gpu, record in sorted(validations.items()):
        cases = record["cases"]
        medians = [p50 for case in cases if (p50 := validation_text.per_sequence(case, "p50")) is not None]
        ratios = [ratio for case in cases if (ratio := validation_text.ratio(case, "gpu_warm")) is not None]
        rows.append((
            gpu, record["environment"]["recorded"][:10], f"{sum(case['correct'] for case in cases)} of {len(cases)}",
            f"{min(medians):.2f} to {max(medians):.2f}" if medians else "-",
            f"{sum(validation_text.on_target(record, case) for case in cases)} of {len(cases)}",
            times(geometric_mean(ratios) if ratios else None),
            f"[{record['file']}](../../results/{record['file']})",
        ))  # fmt: skip
    header = ("GPU", "Measured", "Correct", "P50, µs per sequence", "On target", "Torch's best, gpu warm", "Record")
    yield from table(header, rows)


def beside_peers(
    gpus: Sequence[str], peers: dict[str, dict[str, Record]], cell: Callable[[Record, list[float]], str]
) -> list[tuple[str, ...]]:
    """A row for each suite and clock that was measured: its title, the clock, and for each GPU what `cell` makes of the
    record and its ratios to the best peers.
    """
    rows = []
    for suite, title in SUITE_TITLES.items():
        for clock, name in peers_text.CLOCKS.items():
            records = [peers[suite].get(gpu) for gpu in gpus]
            found = [(record, peers_text.ratios(record, clock) if record else []) for record in records]
            if any(values for _, values in found):
                rows.append((title, name, *(cell(r, values) if r and values else "-" for r, values in found)))
    return rows


def _compared(gpus: Sequence[str], peers: dict[str, dict[str, Record]]) -> Iterator[str]:
    """The geometric mean of the ratios to the best peer: a row for each suite and clock, a column for each GPU."""

    def cell(record: Record, values: list[float]) -> str:
        return f"{geometric_mean(values):.2f}x ({sum(value > 1 for value in values)} of {len(values)})"

    rows = beside_peers(gpus, peers, cell)
    if not rows:
        return
    yield (
        "The best peer's time divided by FlashCore's: geometric mean over a suite, and on how many of its shapes "
        "FlashCore is ahead."
    )
    yield ""
    yield from table(("Suite", "Clock", *gpus), rows)
    for gpu in gpus:
        cases = [case for records in peers.values() if gpu in records for case in records[gpu]["cases"]]
        if why := machine.throttled([state for case in cases for state in case["gpu_states"]]):
            yield f"{gpu}: the clock was held back during some of these runs ({', '.join(sorted(why))})."
            yield ""


def _compiled(folder: Path, measured: Sequence[str]) -> Iterator[str]:
    """GPUs for which the kernels are compiled and audited, and on which nothing has run."""
    record, audit = results.newest_without_gpu(folder, "resources"), results.newest_without_gpu(folder, "audit-sass")
    if record is None:
        return
    absent = {int(arch): target for arch, target in record["targets"].items() if target["gpu"] not in measured}
    if not absent:
        return
    names = " and ".join(target["gpu"] for target in absent.values())
    yield "## Compiled and audited, not run"
    yield ""
    yield (
        f"FlashCore has not been run on {names}: no speed and no result there has been measured. What is known is what "
        "a compiler and a disassembler say of every shipped variant, without such a GPU."
    )
    yield ""
    audited = {row["arch"]: row for row in audit["summary"]} if audit else {}
    groups = [group for group in resources.summary(record["cases"]) if group["arch"] in absent]
    rows = []
    for group in groups:
        target = absent[group["arch"]]
        rows.append((
            target["gpu"], f"sm_{group['arch']}", group["kernel"], str(group["head_dim"]),
            f"{group['compiled']} of {group['variants']}", str(group["spilling"]), str(group["registers"]),
            f"{group['shared']:,} of {target['shared']:,}",
        ))  # fmt: skip
    header = ("GPU", "", "Kernel", "D", "Compile", "Spill", "Registers, at most", "Shared memory, bytes at most")
    yield from table(header, rows)
    environment = record["environment"]
    yield (
        f"Compiled {environment['recorded'][:10]} by Triton {environment['triton']}, commit "
        f"`{(environment['commit'] or 'unknown')[:12]}`; [results/{record['file']}](../../results/{record['file']})."
    )
    for arch, target in absent.items():
        if row := audited.get(arch):
            assert audit is not None
            state = (audit["environment"].get("commit") or "unknown")[:12]
            yield (
                f"{target['gpu']}: the audit of {audit['environment']['recorded'][:10]}, commit `{state}`, found "
                f"{row['clean']} of {row['variants']} variants clean and caught {row['controls_caught']} of "
                f"{row['controls']} planted controls; [results/{audit['file']}](../../results/{audit['file']})."
            )
    yield ""
