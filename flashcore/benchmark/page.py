"""A comparison with the peers as one HTML page that needs nothing else: its pictures are SVG inside it.

    python -m flashcore.benchmark.page                                every GPU's newest runs, into docs/validation
    python -m flashcore.benchmark.page RESULTS.json --out bench.html  these runs

`flashcore bench --html FILE` writes one of what it has measured. Times in the tables are per sequence, in the pictures
per call. Colours and markers are those of `plots`; the page prints as it looks.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flashcore.benchmark import peers_text, plots, results
from flashcore.benchmark.shapes import SUITES, Shape
from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import geometric_mean

Record = dict[str, Any]

SUITE_TITLES = {
    "nine": "The nine configurations",
    "mid": "S = 1024 and 2048",
    "short": "Every length up to 1024",
    "odd": "Odd lengths",
    "b1": "One sequence",
    "dims": "Other head dimensions",
    "odd-dims": "Head dimensions that are odd multiples of 8",
    "causal": "Causal",
    "gqa": "Shared key heads, causal, D=128, bf16",
    "window": "Windows",
    "bias": "Additive bias",
    "softcap": "Soft cap, causal",
    "padded": "Padded batches: lengths uniform in S/4 to S",
    "varlen": "Packed sequences: lengths uniform in S/4 to S",
    "long": "Long sequences: 16k tokens in all",
}
_STYLE = """
body { font: 15px/1.5 "Helvetica Neue", Arial, sans-serif; color: #1a1a1a; background: #fff; margin: 2em auto;
       max-width: 75em; padding: 0 1.5em }
h1 { font-size: 1.6em; margin-bottom: .2em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #bbb }
p.small, li { color: #444; font-size: .9em } p.summary { font-size: 1.05em }
figure { margin: 1em 0 } svg { width: 100%; height: auto }
svg text { font-family: "DejaVu Sans", Verdana, Geneva, sans-serif !important }
div.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .85em; font-variant-numeric: tabular-nums; margin: .5em 0 1.5em }
caption { text-align: left; font-weight: bold; padding: .4em 0; white-space: nowrap }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #666 }
td.best { font-weight: bold } td.ours { background: #e8f1f8 }
@page { margin: 12mm }
@media print { body { margin: 0; padding: 0; max-width: none; font-size: 11px } table { font-size: 8px }
  th, td { padding: .15em .4em } h2 { break-before: page } h2.first { break-before: avoid }
  figure, table { break-inside: avoid } td.ours { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""


def page(records: Sequence[Record]) -> str:
    """The page of one GPU's peers records, `file` among the fields of each.

    Raises:
        ValueError: no record, one of another kind, or records of different GPUs.
    """
    kinds, gpus = {record["kind"] for record in records}, {record["environment"]["gpu"] for record in records}
    if kinds != {"peers"} or len(gpus) != 1:
        raise ValueError(f"expected peers records of one GPU, got {sorted(kinds)} of {sorted(map(str, gpus))}")
    parts = [part for record in records for part in _parts(record)]
    title = f"FlashCore and its peers on {gpus.pop()}"
    return "\n".join(["<!doctype html>", '<html lang="en">', *_head(title, parts), *_body(title, parts), "</html>", ""])


def _parts(record: Record) -> list[Record]:
    """A record suite by suite; one of the user's own shapes as it is."""
    found = [part for suite in record["suite"].split() if (part := peers_text.of_suite(record, suite))]
    return [part for part in found or [record] if part["cases"]]


def _head(title: str, parts: Sequence[Record]) -> Iterator[str]:
    yield f'<head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield f'<meta name="source" content="{escape(source(parts))}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style></head>"


def source(parts: Sequence[Record]) -> str:
    """What a page's "source" says of the figures it was made of."""
    return "; ".join(f"{part['suite']}: {plots.digest(part)}" for part in parts)


def _body(title: str, parts: Sequence[Record]) -> Iterator[str]:
    yield f"<body><h1>{escape(title)}</h1>"
    yield (
        '<p class="small">Every contestant ran in one process on the same inputs, in rotated order, after its result '
        "had passed an error gate against fp64. Without a remark a shape has H=8 heads, D=64, fp16 and no mask; S = "
        "length, B = batch. The ratio is the best peer's time divided by FlashCore's, with its 95% interval: above 1, "
        "FlashCore is ahead. The roof is what this GPU's matrix units and memory allow, both measured in the same run."
        "</p>"
    )
    for number, part in enumerate(parts):
        heading = SUITE_TITLES.get(part["suite"], "Your shapes")
        yield f"<h2{' class=first' if number == 0 else ''}>{escape(heading)}</h2>"
        yield from _summary(part)
        yield from _figure(part)
        for clock in peers_text.clocks(part["protocol"]):
            yield from _table(part, clock)
        yield from _remarks(part)
    yield "</body>"


def _summary(part: Record) -> Iterator[str]:
    for clock in peers_text.clocks(part["protocol"]):
        if values := peers_text.ratios(part, clock):
            yield (
                f'<p class="summary"><b>{peers_text.CLOCKS[clock]}</b>: the best peer takes '
                f"<b>{geometric_mean(values):.2f}x</b> as long as FlashCore (geometric mean over {len(values)}; "
                f"{min(values):.2f}x to {max(values):.2f}x)</p>"
            )


def _figure(part: Record) -> Iterator[str]:
    """The picture; a line that says what is missing where it can't be drawn."""
    try:
        from matplotlib import rc_context

        figure = plots.draw(part)
    except ModuleNotFoundError as missing:
        yield f"<p>No picture: {escape(str(missing))}. pip install 'flashcore-attn[bench]'</p>"
        return
    except ValueError as nothing:  # no device time of FlashCore's
        yield f"<p>No picture: {escape(str(nothing))}.</p>"
        return
    drawn = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": part["suite"]}
    with rc_context(settings):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    yield f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _table(part: Record, clock: str) -> Iterator[str]:
    names = [n for n in part["protocol"]["contestants"] if any(peers_text.figure(c, n, clock) for c in part["cases"])]
    if not names:
        return
    device = clock.startswith("gpu")
    yield f'<div class="table"><table><caption>µs per sequence, {peers_text.CLOCKS[clock]}</caption>'
    columns = ["Shape", *names, "Ratio (95%)", *(["TFLOP/s", "of the roof"] if device else [])]
    yield "<thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr></thead><tbody>"
    for case in part["cases"]:
        shape, best = Shape(**case["shape"]), peers_text.best_peer(case, clock)
        cells = [f"<td>{escape(shape.label)}</td>"]
        for name in names:
            time = peers_text.figure(case, name, clock)
            kind = " class=ours" if name == "flashcore" else " class=best" if name == best else ""
            cells.append(f"<td{kind}>{'-' if time is None else us(time / shape.batch, 0)}</td>")
        found = peers_text.ratio(case, clock)
        interval = "" if found is None or found.low is None else f" ({found.low:.2f} to {found.high:.2f})"
        cells.append(f"<td>{'-' if found is None else f'{found.value:.2f}x'}{interval}</td>")
        if device:
            done, share = peers_text.tflops(case, clock), peers_text.share(case, part["ceilings"], clock)
            cells.append(f"<td>{'-' if done is None else f'{done:.0f}'}</td>")
            cells.append(f"<td>{'-' if share is None else f'{100 * share:.0f}%'}</td>")
        yield "<tr>" + "".join(cells) + "</tr>"
    yield "</tbody></table></div>"


def _remarks(part: Record) -> Iterator[str]:
    environment = part["environment"]
    facts = [
        f"{environment['recorded'][:10]}, commit {(environment['commit'] or 'unknown')[:12]}, driver "
        f"{environment['driver'] or 'unknown'}, CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, PyTorch "
        f"{environment['torch']}, Triton {environment['triton']}; {part['file']}",
        *(line for line in peers_text.rest(part) if line and "geometric mean" not in line),
    ]
    states = [state for case in part["cases"] for state in case["gpu_states"]]
    if clocks := [state["sm_mhz"] for state in states if "sm_mhz" in state]:
        held = machine.throttled(states)
        facts.append(f"SM clock {min(clocks)} to {max(clocks)} MHz" + ("" if held else ", not held back"))
    yield "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>"


def newest(root: Path) -> dict[str, list[Record]]:
    """The page's file name of each GPU -> its newest complete run of every suite."""
    found: dict[str, list[Record]] = {}
    for suite in SUITES:
        for gpu, record in peers_text.newest(root / "results", suite).items():
            found.setdefault(f"peers-{results.slug(gpu)}.html", []).append(record)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write pages. Returns the exit status: 0 = written, 2 = a file is no peers record, or they are of several GPUs."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.page", description="Comparisons with the peers as self-contained pages."
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS.json", help="every suite's newest run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with RESULTS.json: the page (beside the first)")
    options = parser.parse_args(argv)
    folder = results.ROOT / plots.FOLDER
    try:
        if options.results:
            records = [{**results.read(path), "file": path.name} for path in options.results]
            pages = {options.out or options.results[0].with_suffix(".html"): page(records)}
        else:
            pages = {folder / name: page(records) for name, records in newest(results.ROOT).items()}
    except (OSError, ValueError) as misuse:
        print(f"page: {misuse}", file=sys.stderr)
        return 2
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
