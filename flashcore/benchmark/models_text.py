"""What docs/integrations.md states of whole models and of gradients, from their records in results/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.markdown import link, table, times
from flashcore.benchmark.models import MODELS, MODES
from flashcore.measure.statistics import geometric_mean

Record = dict[str, Any]


def models(folder: Path) -> Iterator[str]:
    """A row a model and mode of the newest record: how many times as long as "fcore" the other two take."""
    record = results.headline(results.newest(folder, "models"))
    if record is None:
        return
    transformers = record["environment"]["transformers"]
    yield f"{_heading(record)}, transformers {transformers}, fp16, P50 of a call; {link(record)}."
    yield ""
    rows = []
    for name in dict.fromkeys(case["model"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["model"] == name]
        for mode in MODES:
            cells = [_spread([r for case in cases if (r := _over(case, peer, mode))]) for peer in ("sdpa", "eager")]
            rows.append((f"{MODELS[name].title}, {cases[0]['weights']} weights", mode, str(len(cases)), *cells))
    yield from table(("Model", "Mode", "Cases", '"sdpa" / "fcore"', '"eager" / "fcore"'), rows)
    every = _beside_sdpa(record)
    behind = [found for found in every if found[0] < 1]
    if behind:
        yield f'Behind "sdpa" in {len(behind)} of {len(every)}, most in {min(behind)[1]}.'
        yield ""


def gradients(folder: Path) -> Iterator[str]:
    """A row a problem of the newest record: both passes, as a caller sees them and on the GPU."""
    record = results.headline(results.newest(folder, "gradients"))
    if record is None:
        return
    yield f"{_heading(record)}, fp16, forward and backward, µs; {link(record)}."
    yield ""
    rows = []
    for case in record["cases"]:
        cells = []
        for clock in ("call", "gpu_warm"):
            ours, theirs = (case["contestants"][name].get(clock) for name in ("flashcore", "sdpa"))
            unit = "p50" if clock == "call" else "us"
            cells += [f"{each[unit]:.1f}" if each else "-" for each in (ours, theirs)]
            cells.append(times(theirs[unit] / ours[unit] if ours and theirs else None))
        rows.append((case["case"], *cells))
    header = ("Problem", "FlashCore, call", "SDPA, call", "SDPA / FlashCore", "FlashCore, GPU", "SDPA, GPU",
              "SDPA / FlashCore")  # fmt: skip
    yield from table(header, rows)


def _heading(record: Record) -> str:
    environment = record["environment"]
    return f"{environment['gpu']}, {environment['recorded'][:10]}, PyTorch {environment['torch']}"


def _over(case: Record, peer: str, mode: str) -> float | None:
    """How many times as long as "fcore" a peer takes; None where one of them has no time."""
    found = case["contestants"][peer].get(mode, {}).get("over_fcore")
    return found["value"] if found else None


def _beside_sdpa(record: Record) -> list[tuple[float, str]]:
    """The ratio of "sdpa" in every case and mode, with a name for it."""
    return [
        (ratio, f"{case['case']}, {mode}, at {ratio:.2f}x")
        for case in record["cases"] for mode in MODES if (ratio := _over(case, "sdpa", mode))
    ]  # fmt: skip


def _spread(ratios: list[float]) -> str:
    """Geometric mean, least and most."""
    if not ratios:
        return "-"
    return f"{geometric_mean(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
