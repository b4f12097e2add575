"""The performance guide's figures, from results/: what the host pays, what batching brings, where peers are faster."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from flashcore.benchmark import peers_text, results, validation_text
from flashcore.benchmark.markdown import link, table, times
from flashcore.benchmark.shapes import Shape
from flashcore.benchmark.terminal import us

Record = dict[str, Any]


def _source(record: Record) -> str:
    return f"{record['environment']['gpu']}, {record['environment']['recorded'][:10]}, {link(record)}"


def clocks(folder: Path) -> Iterator[str]:
    """One call on the clocks of the validation, and what a sequence costs."""
    record = results.headline(results.newest(folder, "validation"))
    if record is None:
        return
    rows = []
    for case in record["cases"]:
        figures = [validation_text.figure(case, "flashcore", clock) for clock in validation_text.CLOCKS]
        call, warm, _ = figures
        each = [None if f is None else f / case["shape"]["batch"] for f in (call, warm)]
        rows.append((Shape(**case["shape"]).label, *map(us, figures), *map(us, each)))
    yield f"µs, H=8, D=64, fp16. {_source(record)}."
    yield ""
    header = *validation_text.CLOCKS.values(), "call / B", "gpu warm / B"
    yield from table(("Shape", *header), rows)


def host(folder: Path) -> Iterator[str]:
    """What a call costs the CPU, way by way, and what captured calls and first calls cost."""
    record = results.headline(results.newest(folder, "host"))
    if record is None:
        return
    rows = []
    for case in record["cases"]:
        for found in case["contestants"].values():
            if "host" in found:
                title = found["title"] + (", inputs require grad" if case["gradients"] else "")
                rows.append((title, us(found["host"]["p50"]), times(found.get("over_sdpa", {}).get("value"))))
    yield f"µs of CPU time a call, P50, and its ratio to SDPA's in the same rounds. {_source(record)}."
    yield ""
    yield from table(("Way", "µs", "of SDPA"), rows)
    if replay := record.get("replay"):
        call, kernel = replay["call"], replay["kernel"]
        yield (
            f"A captured call takes {call['us']:.2f} µs of the GPU in each replay, its kernel alone "
            f"{kernel['us']:.2f} µs."
        )
        yield ""
    waits = [
        (title, *(_seconds(record["first_calls"].get(cache, {}).get(name)) for cache in ("cold", "warm")))
        for name, title in (
            ("process", "a process's first call"), ("kernel", "the first call that needs another kernel"),
            ("length", "the first call of another length"), ("same", "the same call again"),
        )
    ]  # fmt: skip
    yield from table(("What waits", "nothing compiled yet", "compiled by an earlier process"), waits)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value > 0.1 else f"{1e3 * value:.2f} ms"


def behind(folder: Path) -> Iterator[str]:
    """Every shape measured against the peers where FlashCore is not ahead beyond the noise, GPU by GPU."""
    runs: dict[tuple[str, str, str], list[Record]] = {}
    for gpu, records in results.runs(folder, "peers").items():
        for record in records:
            for case, clock in product(record["cases"], ("gpu_warm", "gpu_alone")):
                if peers_text.ratio(case, clock):
                    runs.setdefault((gpu, Shape(**case["shape"]).label, clock), []).append({**record, "cases": [case]})
    if not runs:
        return
    rows, files = [], set()
    for (gpu, label, clock), those in sorted(runs.items(), key=lambda entry: entry[0][0]):
        record = peers_text.standing(those)
        case, recorded = record["cases"][0], record["environment"]["recorded"]
        found, best = peers_text.ratio(case, clock), peers_text.best_peer(case, clock)
        if found is not None and best is not None and (found.value if found.low is None else found.low) <= 1:
            figures = [us(peers_text.figure(case, name, clock)) for name in ("flashcore", best)]
            name = peers_text.CLOCKS[clock]
            rows.append((gpu, label, name, *figures, best, times(found.value), recorded[:10]))
            files.add(link(record))
    measured = f"{len({place[:2] for place in runs})} shapes measured beside the peers, GPU by GPU,"
    if not rows:
        yield f"Of the {measured} none has a peer that is faster, or level within the noise."
        yield ""
        return
    yield (
        f"{len({row[:2] for row in rows})} of the {measured} warm in the L2; µs per call, in turns with the peers (gpu "
        "warm) or each alone at the clock that its own power leaves (gpu alone), and the best peer's time divided by "
        f"FlashCore's. {', '.join(sorted(files))}."
    )
    yield ""
    yield from table(("GPU", "Shape", "Clock", "FlashCore", "Best peer", "which is", "Ratio", "Measured"), rows)
