"""What docs/security.md states of the audits, from their records in results/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashcore.benchmark import results, timing_plot
from flashcore.benchmark.markdown import link
from flashcore.measure import machine
from flashcore.security import elapsed

Record = dict[str, Any]

GPUS = {80: "A100", 89: "L4", 90: "H100"}
UNITS = {"cycles": "cycles", "wall": "µs", "elapsed": "cycles", "frequency": "MHz"}
NOT_MEASURED = "No timing was measured yet: the table fills with the first run of `flashcore audit timing` in results/."


def newest_audit(folder: Path) -> Record | None:
    """The newest complete record of `flashcore audit sass`, which no GPU takes part in."""
    records = [{**results.read(path), "file": path.name} for path in sorted(folder.glob("audit-sass-*.json"))]
    whole = [record for record in records if not record["quick"]]
    return max(whole, key=lambda record: str(record["environment"]["recorded"]), default=None)


def audit_sass(folder: Path) -> Iterator[str]:
    """What was compiled, by architecture, and what was found in it."""
    record = newest_audit(folder)
    if record is None:
        yield "No audit was recorded yet."
        return
    e = record["environment"]
    yield (
        f"{e['recorded'][:10]}, Triton {e['triton']}, ptxas {e['ptxas']}, nvdisasm {e['nvdisasm']}, source "
        f"`{e['source']}`; every variant by name is in {link(record)}."
    )
    yield ""
    header = ("Compiled for", "Variants", "Clean", "Instructions", "Steer", "Touch memory", "Tainted", "Read lengths",
              "Fail were lengths secret", "Controls caught")  # fmt: skip
    yield from _table(header, [_audit_row(row) for row in record["summary"]])


def _audit_row(row: Record) -> tuple[str, ...]:
    tainted = row["tainted_branches"] + row["tainted_addresses"] + row["tainted_other"]
    counts = (row["variants"], row["clean"], row["instructions"], row["branches"], row["memory"], tainted,
              row["reads_lengths"], row["undeclared"])  # fmt: skip
    name = f"sm_{row['arch']} ({GPUS.get(row['arch'], '?')})"
    return name, *(f"{count:,}" for count in counts), f"{row['controls_caught']} of {row['controls']}"


def timing(folder: Path) -> Iterator[str]:
    """Both clocks, every pair of classes, and the controls."""
    records = results.newest(folder, "audit-timing")
    if not records:
        yield NOT_MEASURED
        return
    for gpu, record in sorted(records.items()):
        yield from _machine(gpu, record)
        image = timing_plot.filename(record)
        if (folder.parent / timing_plot.FOLDER / image).exists():
            yield f"![Difference of means and t of every pair](validation/{image})"
            yield ""
        for clock, title in (("cycles", "Cycles inside an SM"), ("wall", "Wall time of the shipped kernels")):
            entries = [entry for entry in record["cases"] if entry["clock"] == clock]
            if clock == "cycles":
                entries += record["controls"]
            yield f"**{title}**"
            yield ""
            if clock == "wall" and any("explained" in entry for entry in entries):
                yield from _walls(record, entries)
                continue
            header = ("Kernel", "Classes", "Measurements a class", "Mean", "Difference (95%)", "Largest t", "")
            yield from _table(header, [_timing_row(entry) for entry in entries])


def _walls(record: Record, entries: Sequence[Record]) -> Iterator[str]:
    """Wall time, the cycles elapsed in the same graphs and the frequency that they give, in one row a pair."""
    header = ("Kernel", "Classes", "Measurements a class", "Wall time", "Largest t", "Elapsed cycles", "Largest t",
              "SM frequency", "")  # fmt: skip
    beside = {(e["clock"], e["kernel"], e["pair"]): e for e in record["cases"]}
    rows = []
    for wall in entries:
        cycles, rate = (beside.get((clock, wall["kernel"], wall["pair"])) for clock in ("elapsed", "frequency"))
        *named, mean, difference, largest, verdict = _timing_row(wall)
        if cycles and not cycles["even"]:
            verdict += ", **elapsed cycles differ**"
        if sum(wall["dropped"]):
            verdict += f", {sum(wall['dropped']):,} readings dropped"
        rows.append((
            *named, f"{mean}, {difference}", largest, _beside(cycles), f"{cycles['largest_t']:.2f}" if cycles else "-",
            _beside(rate), verdict,
        ))  # fmt: skip
    yield from _table(header, rows)
    every, held, explained = elapsed.gates(record)
    yield (
        f"{held} of all {every} gates hold, those of cycles inside an SM among them; of the {every - held} others "
        f"{explained} differ by the clock, not the cycles."
    )
    yield ""


def _beside(entry: Record | None) -> str:
    return f"{_mean(entry)}, {_difference(entry)}" if entry else "-"


def timing_batch(folder: Path) -> Iterator[str]:
    """How a batch's time depends on one of its sequences."""
    records = {gpu: r for gpu, r in results.newest(folder, "audit-timing").items() if r["batch"]}
    if not records:
        yield NOT_MEASURED
        return
    for gpu, record in sorted(records.items()):
        yield from _machine(gpu, record)
        header = ("Batch", "First sequence", "Mean", "Difference (95%)", "Largest t", "Measurements for t of 4.5")
        yield from _table(header, [_batch_row(entry) for entry in record["batch"]])


def _machine(gpu: str, record: Record) -> Iterator[str]:
    e = record["environment"]
    timed = [state for part in ("cases", "batch") for entry in record[part] for state in entry.get("gpu_states", ())]
    held = ", ".join(machine.throttled([*record["gpu_states"], *timed]))
    yield (
        f"{gpu}, {e['recorded'][:10]}, driver {e['driver'] or 'unknown'}, CUDA {e['cuda']}, PyTorch {e['torch']}, "
        f"Triton {e['triton']}, source `{e['source']}`, {f'held back by {held}' if held else 'not held back'}; "
        f"{link(record)}."
    )
    yield ""


def _timing_row(entry: Record) -> tuple[str, ...]:
    control = entry.get("control")
    kernel = f"{entry['kernel']} {entry['config']}" + (f", control: {control}" if control else "")
    if control:
        verdict = "caught" if entry["ok"] else "**missed**"
    elif entry["even"]:
        verdict = "even"
    elif entry.get("explained"):
        verdict = elapsed.VERDICT
    else:
        verdict = "**differs**" if entry["gated"] else "differs, no gate"
    if held := machine.throttled(entry.get("gpu_states", ())):
        verdict += f", clock held back by {', '.join(held)}"
    return (
        kernel, entry["pair"], f"{min(entry['measurements']):,}", _mean(entry), _difference(entry),
        f"{entry['largest_t']:.2f}", verdict,
    )  # fmt: skip


def _batch_row(entry: Record) -> tuple[str, ...]:
    label = entry["pair"] + (" (public)" if entry["public"] else "")
    needed = "-" if entry["even"] or entry["needed"] is None else f"{max(entry['needed'], 2):,.0f}"
    calls = f"{entry['mean']:,.1f} µs"
    return str(entry["batch"]), label, calls, _difference(entry), f"{entry['largest_t']:.2f}", needed


def _mean(entry: Record) -> str:
    return f"{entry['mean']:,.1f} {UNITS[entry['clock']]}"


def _difference(entry: Record) -> str:
    middle, low, high = (100 * entry[name] for name in ("relative", "relative_low", "relative_high"))
    return f"{middle:+.3f}% ({low:+.3f} to {high:+.3f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(" --- " if i < 2 else " ---: " for i in range(len(header))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
