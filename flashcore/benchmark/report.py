"""Generates from results/ every figure that the documents state, so that none can differ from its measurement.

    python -m flashcore.benchmark.report            writes
    python -m flashcore.benchmark.report --check    exit status 1 when a document differs from what would be written

The reports in docs/validation/ are generated whole, and so is docs/support-matrix.md, from what the kernels say that
they serve. In README.md and everywhere else in docs/ the text between `<!-- results:NAME -->` and `<!-- /results -->`
is, by the function of that name in BLOCKS.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flashcore.benchmark import (
    cross_gpu_text,
    distributed_text,
    guide_text,
    models_text,
    own_tests_text,
    page,
    peers_text,
    plots,
    reliability_text,
    results,
    security_text,
    support_text,
    validation_text,
)
from flashcore.benchmark.markdown import table as _table
from flashcore.benchmark.markdown import times as _times
from flashcore.benchmark.results import headline as _headline
from flashcore.benchmark.shapes import Shape
from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import geometric_mean

Record = dict[str, Any]

VALIDATION = Path("docs/validation/EXPERT_VALIDATION_REPORT.md")
PEERS = Path("docs/validation/PEERS.md")
CROSS_GPU = Path("docs/validation/CROSS_GPU_VALIDATION_REPORT.md")
RELIABILITY = Path("docs/validation/RELIABILITY_REPORT.md")
SUPPORT = Path("docs/support-matrix.md")
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
_GENERATED = "<!-- Generated from results/ by `python -m flashcore.benchmark.report`; not to be edited. -->"


def expected(root: Path) -> dict[Path, str | None]:
    """Document -> its text as results/ and the code have it; None for one that has nothing to say."""
    folder = root / "results"
    texts: dict[Path, str | None] = {
        root / VALIDATION: _document(validation_report(results.newest(folder, "validation"))),
        root / PEERS: _document(peers_report(folder)),
        root / CROSS_GPU: _document(_cross_gpu(folder)),
        root / RELIABILITY: _document(reliability_report(folder)),
        root / SUPPORT: _document(support_text.matrix()),
    }
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        if path.exists() and path not in texts:
            text = path.read_text(encoding="utf-8")
            if MARKED.search(text):
                texts[path] = MARKED.sub(lambda m: m[1] + _block(m[2], folder) + m[3], text)
    return texts


def stale(root: Path) -> list[Path]:
    """The documents that differ from what `write` would leave."""
    now = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in expected(root)}
    return [path for path, text in expected(root).items() if now[path] != text]


def write(root: Path) -> list[Path]:
    """Bring every document up to date; returns those that changed."""
    changed = stale(root)
    texts = expected(root)
    for path in changed:
        text = texts[path]
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return changed


def _document(lines: Iterator[str]) -> str | None:
    text = "\n".join(lines)
    return text + "\n" if text else None


# -- the validation ---------------------------------------------------------------------------------------------


def validation_report(records: dict[str, Record]) -> Iterator[str]:
    """docs/validation/EXPERT_VALIDATION_REPORT.md: one part a GPU. No lines without a record."""
    if not records:
        return
    yield _GENERATED
    yield ""
    yield "# Expert validation report"
    yield ""
    yield (
        "Nine configurations, H=8, D=64, fp16, each held against the error gates on independent q, k, v and on "
        "q = k = v before it is timed. `make validate` repeats this on your GPU."
    )
    yield ""
    for gpu, record in sorted(records.items()):
        yield from _validated(gpu, record)
    yield "## How to read it"
    yield ""
    yield (
        "**call** is CUDA events around one eager call, synchronised each time: what a caller sees, the launch path "
        "and the machine's event floor included. **gpu warm** and **gpu cold** are device time, from calls captured in "
        "a CUDA graph, with inputs that stay in the L2 and with inputs rotated through more than three times its size. "
        "Absolute figures hold on the machine named above them; between machines compare ratios. A ratio above 1 says "
        "that the fastest of torch's SDPA backends takes so many times as long as FlashCore."
    )


def _validated(gpu: str, record: Record) -> Iterator[str]:
    cases = record["cases"]
    yield f"## {gpu}"
    yield ""
    yield from _environment(record)
    for line in validation_text.verdict(record):
        yield f"**{line}**\n" if line.startswith("VERDICT") else line.strip()
    yield ""
    yield "### Latency (call clock, µs per sequence)"
    yield ""
    protocol, floor = record["protocol"], record["event_floor_us"]
    yield (
        f"{protocol['trials']:,} trials after {protocol['warmup']} warm-up calls. CUDA events around nothing read "
        f"{floor['p50']:.2f} µs (P50) and {floor['p99']:.2f} µs (P99) per call on this machine."
    )
    yield ""
    yield from _table(
        ("Configuration", "Kernel, tile", "P50", "P95", "P99", "P99 / P50", "Target < 5 µs"),
        [_latency_row(record, case) for case in cases],
    )
    yield "### Beside torch's SDPA (µs per call)"
    yield ""
    rows = []
    for case in cases:
        for clock, title in validation_text.CLOCKS.items():
            names = ("flashcore", *validation_text.TORCH)
            figures = [us(validation_text.figure(case, name, clock), 0) for name in names]
            rows.append((validation_text.label(case), title, *figures, _times(validation_text.ratio(case, clock))))
    yield from _table(("Configuration", "Clock", "FlashCore", *validation_text.TORCH.values(), "Ratio"), rows)
    yield "### Correctness"
    yield ""
    yield (
        "Largest difference from torch's SDPA, and the figures of the gates against fp64 with their limits; the "
        "worse of both kinds of input. `flashcore/testing/gates.py` says how each limit comes about."
    )
    yield ""
    yield from _table(
        ("Configuration", "Correct", "Largest difference", "Relative Frobenius error", "Largest error", "Worst row"),
        [_correctness_row(case) for case in cases],
    )


def _environment(record: Record) -> Iterator[str]:
    e = record["environment"]
    yield (
        f"{e['recorded'][:10]}, commit `{(e['commit'] or 'unknown')[:12]}`, driver {e['driver'] or 'unknown'}, "
        f"CUDA {e['cuda']}, PyTorch {e['torch']}, Triton {e['triton']}, Python {e['python']}; "
        f"[results/{record['file']}](../../results/{record['file']})."
    )
    states = record.get("gpu_states") or [state for case in record["cases"] for state in case["gpu_states"]]
    if clocks := [state["sm_mhz"] for state in states if "sm_mhz" in state]:
        held = machine.throttled(states)
        yield (
            f"SM clock {min(clocks)} to {max(clocks)} MHz at the samples taken between shapes; "
            + (f"held back by {', '.join(held)}." if held else "not held back.")
        )
    yield ""


def _latency_row(record: Record, case: Record) -> tuple[str, ...]:
    p50, p95, p99 = (validation_text.per_sequence(case, p) for p in ("p50", "p95", "p99"))
    tail = "-" if p50 is None or p99 is None else f"{p99 / p50:.2f}x"
    met = "-" if p50 is None else "yes" if validation_text.on_target(record, case) else "no"
    tile = f"{case['kernel']} {'x'.join(map(str, case['block']))}" if "block" in case else "-"
    return validation_text.label(case), tile, us(p50), us(p95), us(p99), tail, met


def _correctness_row(case: Record) -> tuple[str, ...]:
    close = case.get("against_torch", {})
    difference = f"{max(c['max_abs_diff'] for c in close.values()):.1e}" if close else "-"
    kinds = (case["contestants"]["flashcore"]["errors"], case["same_qkv"]["errors"])

    def worst(name: str) -> str:
        found = [errors[name] for errors in kinds if name in errors]
        if not found:
            return "-"
        most = max(found, key=lambda f: float(f["value"]) / float(f["limit"]) if f["limit"] else 0.0)
        return f"{most['value']:.2e} of {most['limit']:.2e}"

    figures = [worst(name) for name in ("frobenius", "max_error", "row_ratio")]
    return validation_text.label(case), "yes" if case["correct"] else "no", difference, *figures


# -- the peers --------------------------------------------------------------------------------------------------


def peers_report(folder: Path) -> Iterator[str]:
    """docs/validation/PEERS.md: one part a GPU and suite. No lines without a record."""
    found = {suite: peers_text.newest(folder, suite) for suite in page.SUITE_TITLES}
    gpus = sorted({gpu for records in found.values() for gpu in records})
    if not gpus:
        return
    yield _GENERATED
    yield ""
    yield "# FlashCore and its peers"
    yield ""
    yield (
        "Device time in µs per call (calls captured in a CUDA graph; median of interleaved replays), every contestant "
        "in one process on the same inputs, after the error gate. fp16, H=8, D=64 and no mask unless the row says "
        "otherwise. The ratio is the best peer's time divided by FlashCore's, with its 95% confidence interval: "
        "the median of the rounds' own ratios, which a drift of the clock does not move."
    )
    yield ""
    for gpu in gpus:
        yield f"## {gpu}"
        yield ""
        yield f"Everything below, and times per sequence, on [one page](peers-{results.slug(gpu)}.html)."
        yield ""
        for suite, title in page.SUITE_TITLES.items():
            if gpu in found[suite]:
                yield from _suite(title, found[suite][gpu])


def _suite(title: str, record: Record) -> Iterator[str]:
    yield f"### {title}"
    yield ""
    yield from _environment(record)
    yield from (f"![{title}: latency, ratio to the best peer, TFLOP/s]({plots.filename(record)})", "")
    ceilings = record["ceilings"]
    if ceilings:
        yield (
            f"Ceilings measured in the same run: matmul {ceilings['matmul_tflops']:.0f} TFLOP/s, copy inside the L2 "
            f"{ceilings['l2_copy_tb_s']:.2f} TB/s, through HBM {ceilings['hbm_copy_tb_s']:.2f} TB/s, empty kernel "
            f"{ceilings['empty_kernel_us']:.2f} µs."
        )
        yield ""
    names = [n for n in record["protocol"]["contestants"] if any(peers_text.figure(c, n) for c in record["cases"])]
    conditions = {
        "gpu_warm": "Inputs warm", "gpu_cold": "Inputs cold",
        "gpu_alone": "Inputs warm, each contestant alone for seconds, at the clock that its own power leaves the GPU",
    }  # fmt: skip
    for clock, condition in conditions.items():
        values = peers_text.ratios(record, clock)
        if not values:
            continue
        yield (
            f"{condition}: geometric mean {geometric_mean(values):.2f}x, from {min(values):.2f}x to "
            f"{max(values):.2f}x."
        )
        yield ""
        rows = [_peer_row(case, names, clock, ceilings) for case in record["cases"]]
        yield from _table(("Shape", *names, "Ratio (95%)", "TFLOP/s", "of matmul"), rows)
    if beside := list(peers_text.beside_the_table(record)):
        yield from (f"- {line}" for line in beside)
        yield ""
    left = list(peers_text.left_out(record))
    if left:
        yield "Without figures:"
        yield ""
        yield from (f"- {line}" for line in left)
        yield ""


def _peer_row(case: Record, names: Sequence[str], clock: str, ceilings: Record | None) -> tuple[str, ...]:
    times, done = peers_text.ratio(case, clock), peers_text.tflops(case, clock)
    best = peers_text.best_peer(case, clock)
    figures = [us(peers_text.figure(case, name, clock), 0) for name in names]
    figures = [f"**{text}**" if name == best else text for name, text in zip(names, figures, strict=True)]
    interval = "" if times is None or times.low is None else f" ({times.low:.2f} to {times.high:.2f})"
    share = "-" if done is None or not ceilings else f"{100 * done / ceilings['matmul_tflops']:.0f}%"
    return (
        Shape(**case["shape"]).label, *figures, _times(times.value if times else None) + interval,
        "-" if done is None else f"{done:.0f}", share,
    )  # fmt: skip


# -- several GPUs -----------------------------------------------------------------------------------------------


def _cross_gpu(folder: Path) -> Iterator[str]:
    """docs/validation/CROSS_GPU_VALIDATION_REPORT.md. No lines without a record of any GPU."""
    for number, line in enumerate(cross_gpu_text.report(folder)):
        if number == 0:
            yield from (_GENERATED, "")
        yield line


# -- reliability ------------------------------------------------------------------------------------------------


def reliability_report(folder: Path) -> Iterator[str]:
    """docs/validation/RELIABILITY_REPORT.md: one row a claim. No lines without any record."""
    if not any(reliability_text.newest(folder).values()):
        return
    yield _GENERATED
    yield ""
    yield "# Reliability"
    yield ""
    yield reliability_text.INTRODUCTION
    yield ""
    header = ("Claim", "Figure", "Control", "Command", "Date, machine", "Holds")
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    yield from ("| " + " | ".join(row) + " |" for row in reliability_text.rows(folder))


# -- blocks inside other documents ------------------------------------------------------------------------------


def nine(folder: Path) -> Iterator[str]:
    """The README's table: what a caller sees, and device time beside the best peer."""
    validation = _headline(results.newest(folder, "validation"))
    peers = _headline(peers_text.newest(folder, "nine"))
    if validation:
        cases = validation["cases"]
        medians = [p50 for case in cases if (p50 := validation_text.per_sequence(case, "p50")) is not None]
        yield (
            f"{validation['environment']['gpu']}, {validation['environment']['recorded'][:10]}: "
            f"{sum(case['correct'] for case in cases)} of {len(cases)} configurations correct, "
            f"{min(medians):.2f} to {max(medians):.2f} µs per sequence at P50 as a caller sees it (H=8, D=64, fp16)."
            if medians
            else f"{validation['environment']['gpu']}: no configuration was correct."
        )
        yield ""
    if peers and (warm := peers_text.ratios(peers, "gpu_warm")):
        cold = peers_text.ratios(peers, "gpu_cold")
        yield (
            f"Device time beside the fastest peer of each row (µs per call, inputs warm in the L2; "
            f"{peers['environment']['recorded'][:10]}). Geometric mean of the ratios: {_times(geometric_mean(warm))}"
            + (f", with cold inputs {_times(geometric_mean(cold))}." if cold else ".")
        )
        yield ""
        yield from _table(
            ("Shape", "FlashCore", "Best peer", "which is", "Ratio"), [_nine_row(case) for case in peers["cases"]]
        )


def _nine_row(case: Record) -> tuple[str, ...]:
    best, found = peers_text.best_peer(case), peers_text.ratio(case)
    theirs = us(peers_text.figure(case, best) if best else None)
    ours = us(peers_text.figure(case, "flashcore"))
    return Shape(**case["shape"]).label, ours, theirs, best or "-", _times(found.value if found else None)


def suites(folder: Path) -> Iterator[str]:
    """How FlashCore stands beside the best peer: a row for each suite and clock, a column for each GPU."""
    found = {suite: peers_text.newest(folder, suite) for suite in page.SUITE_TITLES}
    gpus = sorted({gpu for records in found.values() for gpu, record in records.items() if record["cases"]})

    def cell(record: Record, values: list[float]) -> str:
        spread = f"{geometric_mean(values):.2f}x ({min(values):.2f} to {max(values):.2f})"
        return f"{spread}, {record['environment']['recorded'][:10]}"

    if rows := cross_gpu_text.beside_peers(gpus, found, cell):
        alone = any(row[1] == peers_text.CLOCKS["gpu_alone"] for row in rows)
        yield (
            "The best peer's time divided by FlashCore's: geometric mean over a suite, least and most. Device time in "
            "turns, gpu warm with inputs in the L2, gpu cold out of memory"
            + ("; gpu alone: warm, each by itself for seconds, at the clock that its power leaves." if alone else ".")
        )
        yield ""
        yield from _table(("Suite", "Clock", *gpus), rows)


BLOCKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "nine": nine, "suites": suites, "clocks": guide_text.clocks, "host": guide_text.host, "behind": guide_text.behind,
    "audit_sass": security_text.audit_sass, "timing": security_text.timing, "timing_batch": security_text.timing_batch,
    "own_tests": own_tests_text.own_tests, "models": models_text.models, "gradients": models_text.gradients,
    "context_parallel": distributed_text.context_parallel,
}  # fmt: skip


def _block(name: str, folder: Path) -> str:
    if name not in BLOCKS:
        raise ValueError(f"<!-- results:{name} -->: expected one of {', '.join(BLOCKS)}")
    return "".join(line + "\n" for line in BLOCKS[name](folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the documents, or with --check say which are stale. Returns 1 when --check found one."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.report", description="Generate the documents' figures from results/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a document is stale")
    options = parser.parse_args(argv)
    root = results.ROOT
    found = stale(root) if options.check else write(root)
    for path in found:
        print(f"{path.relative_to(root)} {'differs from results/' if options.check else 'written'}")
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
