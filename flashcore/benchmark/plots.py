"""A comparison with the peers as a picture: latency, the ratio to the best peer, and TFLOP/s under the ceilings.

    python -m flashcore.benchmark.plots                            every suite's newest run, into docs/validation
    python -m flashcore.benchmark.plots RESULTS.json --out FOLDER  one run

Colours are Okabe's and Ito's, which stay apart for colour-blind readers; every contestant has a marker of its own too,
so that the figure can be read in grey. The same record gives the same file, byte for byte, with the same matplotlib;
the PNG's "Source" text names the record it was drawn from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.benchmark import peers_text, results
from flashcore.benchmark.shapes import SUITES, Shape
from flashcore.measure import machine
from flashcore.measure.statistics import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

FOLDER = Path("docs/validation")
WIDTH, DPI = 12.0, 100  # inches and dots in each: 1200 pixels
CROWDED = 12  # cases, beyond which their names stand upright
OURS = "#0072B2"
MUTED = "#595959"  # 7:1 on white
TITLES = {"gpu_warm": "Inputs warm in the L2", "gpu_cold": "Inputs cold: rotated through more than 3x the L2"}


@dataclass(frozen=True, slots=True)
class Style:
    """How one contestant is drawn: relatives share a colour, nobody shares a marker."""

    colour: str
    marker: str
    line: str = "-"


STYLES = {
    "flashcore": Style(OURS, "o"),
    "flashcore-portable": Style("#56B4E9", "H", "--"),
    "flashcore-hopper": Style("#56B4E9", "h", ":"),
    "sdpa-flash": Style("#E69F00", "s"),
    "sdpa-efficient": Style("#E69F00", "p", "--"),
    "sdpa-efficient-square": Style("#E69F00", "$E$", "-."),
    "sdpa-math": Style("#E69F00", "8", ":"),
    "sdpa-cudnn": Style("#D55E00", "^"),
    "sdpa-cudnn-square": Style("#D55E00", "$C$", "-."),
    "sdpa": Style("#D55E00", "*", "--"),
    "triton-plain": Style("#009E73", "D"),
    "fa4": Style("#CC79A7", "v"),
    "fa3": Style("#CC79A7", "<", "--"),
    "fa2": Style("#CC79A7", ">", ":"),
    "flex": Style("#000000", "X"),
    "varlen": Style("#009E73", "$V$", "--"),
    "flashinfer": Style("#000000", "P", "--"),
    "xformers": Style("#000000", "d", ":"),
}
UNKNOWN = Style(MUTED, ".", "-.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case stands on the horizontal axis."""

    x: float
    tick: str
    group: str  # cases beside each other with the same group are joined by lines


def filename(record: Record) -> str:
    """The picture of a suite on a GPU; a newer run replaces it."""
    return f"peers-{record['suite'].replace(' ', '-')}-{results.slug(record['environment']['gpu'])}.png"


def digest(record: Record) -> str:
    """What the PNG's "Source" says of the figures it was drawn from: file name and a digest of the content."""
    content = json.dumps({k: v for k, v in record.items() if k != "file"}, sort_keys=True)
    return f"{record['file']} sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def places(record: Record) -> list[Place]:
    """Groups of one length where the batch varies within a length, else of one kind of problem."""
    shapes = [Shape(**case["shape"]) for case in record["cases"]]
    labels = [shape.label.split() for shape in shapes]
    by_length = len({(length, *rest) for length, _, *rest in labels}) < len(shapes)
    one_batch = len({shape.batch for shape in shapes}) == 1
    found: list[Place] = []
    x = -1.0
    for length, batch, *rest in labels:
        if by_length:
            tick, group = batch, [length, *rest]
        elif one_batch:
            tick, group = length, [batch, *rest]
        else:
            tick, group = f"{length} {batch}", rest
        x += 1.0 if not found or found[-1].group == " ".join(group) else 1.6
        found.append(Place(x, tick, " ".join(group)))
    return found


def draw(record: Record) -> Figure:
    """The figure of a peers record: a column for each clock with times; latency, ratio, TFLOP/s from top to bottom.

    Raises:
        ValueError: no peers record, or one without a time.
    """
    if record["kind"] != "peers":
        raise ValueError(f"expected a record of kind peers, got {record['kind']}")
    clocks = [clock for clock in TITLES if any(peers_text.tflops(case, clock) for case in record["cases"])]
    if not clocks:
        raise ValueError("no case with a time of FlashCore's to draw")

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {  # matplotlib's type for the names differs from release to release
        "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlelocation": "left",
        "grid.color": "#D9D9D9", "grid.linewidth": 0.6,
    }  # fmt: skip
    with rc_context(settings):
        at = places(record)
        figure = Figure(figsize=(WIDTH, 13.0 if len(at) <= CROWDED else 15.0), dpi=DPI)
        grid = figure.subplots(
            3, len(clocks), sharey="row", squeeze=False,
            gridspec_kw={"height_ratios": (1.45, 1.25, 1), "left": 0.07, "right": 0.985, "top": 0.885, "bottom": 0.115,
                         "hspace": 0.36 if len(at) <= CROWDED else 0.58, "wspace": 0.07},
        )  # fmt: skip
        for column, clock in enumerate(clocks):
            axes = grid[:, column]
            _latency(axes[0], record, clock, at)
            _ratio(axes[1], record, clock, at)
            _tflops(axes[2], record, clock, at)
            for panel in axes:
                _axis(panel, at)
                panel.grid(axis="y")
        for row, unit in enumerate(("µs per call (log)", "peer's time / FlashCore's", "TFLOP/s")):
            grid[row, 0].set_ylabel(unit)
        _around(figure, grid[0, 0], record)
    return figure


def _latency(panel: Axes, record: Record, clock: str, at: Sequence[Place]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in reversed(record["protocol"]["contestants"]):  # FlashCore last, on top
        style, ours = STYLES.get(name, UNKNOWN), name == "flashcore"
        times = [peers_text.figure(case, name, clock) for case in record["cases"]]
        if not any(times):
            continue
        for group in dict.fromkeys(place.group for place in at):
            points = [(p.x, t) for p, t in zip(at, times, strict=True) if p.group == group and t is not None]
            panel.plot(
                [x for x, _ in points], [t for _, t in points], label=name, color=style.colour, marker=style.marker,
                linestyle=style.line, linewidth=2.6 if ours else 1.2, markersize=9 if ours else 6.5,
                markeredgecolor="white", markeredgewidth=0.6, zorder=3 if ours else 2,
            )  # fmt: skip
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="y", which="minor", length=0)
    panel.set_title(TITLES[clock], fontweight="bold", pad=10)


def _ratio(panel: Axes, record: Record, clock: str, at: Sequence[Place]) -> None:
    for place, case in zip(at, record["cases"], strict=True):
        found, best = peers_text.ratio(case, clock), peers_text.best_peer(case, clock)
        ours = peers_text.figure(case, "flashcore", clock)
        if found is None or ours is None:
            continue
        panel.bar(place.x, found.value - 1, bottom=1, width=0.66, color="#C6DDED")
        if found.low is not None and found.high is not None:
            panel.vlines(place.x, found.low, found.high, color="black", linewidth=1.2, zorder=2)
        for name in case["contestants"]:
            if not name.startswith("flashcore") and (theirs := peers_text.figure(case, name, clock)) is not None:
                _mark(panel, place.x, theirs / ours, name, 8 if name == best else 6.5)
        ahead = found.value >= 1
        panel.annotate(
            f"{found.value:.2f}", (place.x, 1), (0, -4 if ahead else 4), textcoords="offset points", ha="center",
            va="top" if ahead else "bottom", fontsize=10 if len(at) <= CROWDED else 8,
            rotation=0 if len(at) <= CROWDED else 90,
        )  # fmt: skip
    panel.axhline(1, color="black", linewidth=1)
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 1 - (0.14 if len(at) <= CROWDED else 0.2) * (high - 1)), high)  # room for the numbers
    values = peers_text.ratios(record, clock)
    mean = f", geometric mean {geometric_mean(values):.2f}" if values else ""
    panel.set_title(f"Bars: best peer{mean}; above 1, FlashCore is ahead", fontsize=11)


def _mark(panel: Axes, x: float, y: float, name: str, size: float) -> None:
    style = STYLES.get(name, UNKNOWN)
    panel.plot(x, y, color=style.colour, marker=style.marker, markersize=size, markeredgecolor="white",
               markeredgewidth=0.6, zorder=3)  # fmt: skip


def _tflops(panel: Axes, record: Record, clock: str, at: Sequence[Place]) -> None:
    ceilings = record["ceilings"]
    for place, case in zip(at, record["cases"], strict=True):
        shape = Shape(**case["shape"])
        ours, best = peers_text.tflops(case, clock), peers_text.best_peer(case, clock)
        if ours is not None:
            panel.bar(place.x, ours, width=0.62, color=OURS)
        if best and (theirs := peers_text.figure(case, best, clock)):
            _mark(panel, place.x, shape.flops / theirs / 1e6, best, 8)
        if ceilings and (limit := peers_text.roof(shape, ceilings, clock)) < ceilings["matmul_tflops"]:
            panel.hlines(limit, place.x - 0.42, place.x + 0.42, color="black", linewidth=1.6)
    panel.set_ylim(0)
    title = "Bars: FlashCore; markers: the best peer"
    if ceilings:
        panel.axhline(ceilings["matmul_tflops"], color="black", linewidth=1.2, linestyle="--")
        panel.annotate(
            f"matmul ceiling {ceilings['matmul_tflops']:.0f}", (0, ceilings["matmul_tflops"]), (4, 5),
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        panel.set_ylim(0, max(panel.get_ylim()[1], 1.13 * ceilings["matmul_tflops"]))
        title += f"; strokes: {'L2' if clock == 'gpu_warm' else 'HBM'} ceiling"
    panel.set_title(title, fontsize=11)


def _axis(panel: Axes, at: Sequence[Place]) -> None:
    """Ticks name the cases; under them stands what a group has in common."""
    crowded = len(at) > CROWDED
    size = 8 if len(at) > 9 else 10
    panel.set_xticks([place.x for place in at], [place.tick for place in at], fontsize=size, rotation=90 * crowded)
    panel.tick_params(axis="x", length=0)
    panel.set_xlim(at[0].x - 0.6, at[-1].x + 0.6)
    below = -7 - (0.7 * size * max(len(place.tick) for place in at) if crowded else 12)
    for group in dict.fromkeys(place.group for place in at):
        inside = [place.x for place in at if place.group == group]
        panel.annotate(
            group, (sum(inside) / len(inside), 0), (0, below), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=9 if crowded else 11, fontweight="bold",
        )  # fmt: skip


def _around(figure: Figure, panel: Axes, record: Record) -> None:
    """Title and legend above, where the figures come from below."""
    environment = record["environment"]
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    names = [name for name in record["protocol"]["contestants"] if name in handles]
    names.sort(key=lambda name: not name.startswith("flashcore"))
    title = f"FlashCore and its peers on {environment['gpu']}"
    method = (
        "Device time of a call (CUDA graph, medians of interleaved replays, one process). H=8, D=64, fp16, no mask "
        "unless a label says otherwise; S = length, B = batch."
    )
    figure.text(0.012, 0.985, title, fontsize=16, fontweight="bold", va="top")
    figure.text(0.012, 0.961, method, fontsize=10, color=MUTED, va="top")
    figure.legend(
        [handles[name] for name in names], names, loc="upper left", bbox_to_anchor=(0.005, 0.948), ncols=8,
        frameon=False, fontsize=11, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip
    states = [state for case in record["cases"] for state in case["gpu_states"]]
    clocks = [state["sm_mhz"] for state in states if "sm_mhz" in state]
    held = machine.throttled(states)
    ceilings = record["ceilings"]
    lines = [
        "Vertical lines through the best peer's marker: the ratio's 95% interval, mostly smaller than the marker. L2 "
        "and HBM ceilings: every input read and the output written once.",
        f"{environment['recorded'][:10]}, commit {(environment['commit'] or 'unknown')[:12]}, driver "
        f"{environment['driver'] or 'unknown'}, CUDA {environment['cuda']}, PyTorch {environment['torch']}, Triton "
        f"{environment['triton']}; results/{record['file']}.",
        (f"SM clock {min(clocks)} to {max(clocks)} MHz" if clocks else "SM clock unknown")
        + (f", held back by {', '.join(held)}" if held else "")
        + (
            f"; ceilings of the same run: matmul {ceilings['matmul_tflops']:.0f} TFLOP/s, copies in the L2 "
            f"{ceilings['l2_copy_tb_s']:.2f} TB/s, through HBM {ceilings['hbm_copy_tb_s']:.2f} TB/s."
            if ceilings
            else "."
        ),
    ]
    figure.text(0.012, 0.008, "\n".join(lines), fontsize=9, color=MUTED, va="bottom", linespacing=1.45)


def save(record: Record, folder: Path) -> Path:
    """Draw a peers record, `file` among its fields, into the folder. Returns the PNG's path."""
    return write(draw(record), folder / filename(record), record)


def write(figure: Figure, path: Path, record: Record) -> Path:
    """Write a figure drawn from a record, `file` among its fields, as PNG. Returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    source = PngInfo()
    source.add_text("Source", digest(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE)  # a third of the bytes, and no difference to be seen
    palette.save(path, optimize=True, pnginfo=source)
    return path


def newest(root: Path) -> list[Record]:
    """The newest complete run of every suite and GPU."""
    return [record for suite in SUITES for record in peers_text.newest(root / "results", suite).values()]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw. Returns the exit status: 0 = drawn, 2 = matplotlib is missing or a file is no peers record with times."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.plots", description="Draw comparisons with the peers as PNG files."
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS.json", help="every suite's newest run")
    parser.add_argument("--out", type=Path, default=results.ROOT / FOLDER, metavar="FOLDER", help=f"({FOLDER})")
    options = parser.parse_args(argv)
    try:
        records = [{**results.read(path), "file": path.name} for path in options.results] or newest(results.ROOT)
        for record in records:
            print(f"{save(record, options.out)} written")
    except ModuleNotFoundError as missing:
        print(
            f"plots: this needs {missing.name}, which the bench extra installs: pip install 'flashcore-attn[bench]'",
            file=sys.stderr,
        )
        return 2
    except (OSError, ValueError) as misuse:
        print(f"plots: {misuse}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
