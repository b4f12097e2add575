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
    random = record.get("random", 0)
    yield (
        f"{e['recorded'][:10]}, Triton {e['triton']}, ptxas {e['ptxas']}, nvdisasm {e['nvdisasm']}, source "
        f"`{e['source']}`; every variant by name is in {link(record)}"
        + (f", for each architecture {random:,} of random problems among them." if random else ".")
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
    """Both clocks, every pair of classes, the controls, and what the clock of a busy GPU gives away."""
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
        cases, controls = record["cases"], record["controls"]
        yield "**Cycles inside an SM**"
        yield ""
        header = ("Kernel", "Classes", "Measurements a class", "Mean", "Difference (95%)", "Largest t", "")
        yield from _table(header, [_timing_row(e) for e in (*cases, *controls) if e["clock"] == "cycles"])
        if "full" in record:
            yield from _walls(f"on few blocks ({_blocks(cases)})", [*cases, *controls])
            yield from _held(record)
            full = record["full"]
            yield from _walls(f"over the whole GPU ({_blocks(full)} blocks), which has no gate", full)
        else:
            full = cases
            yield from _walls("over the whole GPU, which an earlier protocol gated", cases)
            yield "On few blocks no wall time was measured yet: nothing is claimed of it."
            yield ""
            yield from _held(record)
        time, frequency = elapsed.given_away(full)
        yield (
            f"**What the clock gives away:** over the whole GPU classes differ in wall time by up to {time:.2%}, "
            f"and in the frequency of the SMs by up to {frequency:.2%}."
        )
        yield ""


def _blocks(entries: Sequence[Record]) -> str:
    counts = sorted({entry["blocks"] for entry in entries if "blocks" in entry})
    return " or ".join(f"{count:,}" for count in counts)


def _walls(where: str, entries: Sequence[Record]) -> Iterator[str]:
    """Wall time, the cycles elapsed in the same graphs and the frequency that they give, in one row a pair."""
    yield f"**Wall time of the shipped kernels {where}**"
    yield ""
    header = ("Kernel", "Classes", "Measurements a class", "Wall time", "Largest t", "Elapsed cycles", "Largest t",
              "SM frequency", "")  # fmt: skip
    beside = {(e["clock"], e["kernel"], e["pair"], e.get("control")): e for e in entries}
    rows = []
    for wall in (entry for entry in entries if entry["clock"] == "wall"):
        named = wall["kernel"], wall["pair"], wall.get("control")  # a control has to show in wall time alone
        cycles, rate = (beside.get((clock, *named)) for clock in ("elapsed", "frequency"))
        *subject, mean, difference, largest, verdict = _timing_row(wall)
        if cycles and not cycles["even"]:
            verdict += ", **elapsed cycles differ**" if cycles["gated"] else ", elapsed cycles differ"
        if lost := sum(wall.get("dropped", ())):
            verdict += f", {lost:,} readings dropped"
        if slow := sum(wall.get("slow", ())):
            verdict += f", {slow:,} disturbed"
        rows.append((
            *subject, f"{mean}, {difference}", largest,
            _beside(cycles), f"{cycles['largest_t']:.2f}" if cycles else "-", _beside(rate), verdict,
        ))  # fmt: skip
    yield from _table(header, rows)


def _held(record: Record) -> Iterator[str]:
    """How many gates hold, by clock."""
    said = []
    for clock, name in (("cycles", "cycles inside an SM"), ("wall", "wall time"), ("elapsed", "elapsed cycles")):
        every, held, _ = elapsed.gates({"cases": [e for e in record["cases"] if e["clock"] == clock]})
        said.append(f"{held} of {every} of {name}")
    every, held, explained = elapsed.gates(record)
    missed = f" Of the {every - held} others {explained} differ by the clock, not the cycles." if held < every else ""
    yield f"Gates that hold: {', '.join(said)}.{missed}"
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
    entries = [entry for part in ("cases", "controls", "full", "batch") for entry in record.get(part, ())]
    timed = [state for entry in entries for state in entry.get("gpu_states", ())]
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
