"""The timing audit as a picture: how far the classes' means are apart, and how sure the difference is.

    python -m flashcore.benchmark.timing_plot RESULTS.json   into docs/validation; without a file the newest of each GPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.benchmark import plots, results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

FOLDER = plots.FOLDER
COLOURS = {"cycles": plots.OURS, "wall": "#E69F00", "elapsed": "#009E73", "full": "#CC79A7", "control": "#D55E00"}
NAMES = {
    "cycles": "cycles inside an SM", "wall": "wall time", "elapsed": "cycles of whole calls",
    "full": "wall time at full load, no gate", "control": "control: conditional rescale",
}  # fmt: skip
MARKERS = {"cycles": "o", "wall": "s", "elapsed": "D", "full": "v", "control": "X"}


def filename(record: Record) -> str:
    """The picture of a GPU's run; a newer one replaces it."""
    return f"audit-timing-{results.slug(record['environment']['gpu'])}.png"


def draw(record: Record) -> Figure:
    """Two panels with one row a comparison: relative difference with its interval, and the largest |t|."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    entries = [(e, e["clock"]) for e in record["cases"] if e["clock"] != "frequency"]  # which has no gate
    entries += [(e, "control") for e in record["controls"]]
    entries += [(e, "full") for e in record.get("full", ()) if e["clock"] == "wall"]
    limits = record["protocol"]
    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(plots.WIDTH, 2.6 + 0.34 * len(entries)), dpi=plots.DPI, layout="constrained")
        difference, certainty = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        bound = 100 * limits["relative_limit"]
        difference.axvspan(-bound, bound, color="#E8F1F7", zorder=0)
        difference.axvline(0, color="black", linewidth=1)
        for y, (entry, kind) in enumerate(entries):
            _entry(difference, certainty, y, entry, kind)
        labels = [f"{e['kernel']}  {e['pair']}" + (f"  + {e['control']}" if "control" in e else "") for e, _ in entries]
        difference.set_yticks(range(len(entries)), labels)
        difference.invert_yaxis()
        # a control may be a hundred times as far off as anything else
        difference.set_xscale("symlog", linthresh=2 * bound, linscale=1.5)
        difference.set_xlabel(f"difference of means, % (95%); shaded: within ±{bound:g}%")
        certainty.set_xscale("log")
        certainty.axvline(limits["t_limit"], color="black", linestyle="--", linewidth=1)
        certainty.axvline(limits["t_control"], color=COLOURS["control"], linestyle=":", linewidth=1.4)
        gates = f"dashed: {limits['t_limit']:g}, dotted: controls pass {limits['t_control']:g}"
        certainty.set_xlabel(f"largest |t|; {gates}")
        for panel in (difference, certainty):
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.margins(x=0.08)
            panel.grid(axis="x", color="#DDDDDD", zorder=0)
            panel.set_axisbelow(True)
        handles, names = certainty.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
        e = record["environment"]
        figure.suptitle(f"Does time depend on values? {e['gpu']}, {e['recorded'][:10]}, results/{record['file']}",
                        fontsize=13, fontweight="bold")  # fmt: skip
    return figure


def _entry(difference: Axes, certainty: Axes, y: int, entry: Record, kind: str) -> None:
    middle, low, high = (100 * entry[name] for name in ("relative", "relative_low", "relative_high"))
    difference.hlines(y, low, high, color=COLOURS[kind], linewidth=2)
    mark: dict[str, Any] = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 7, "linestyle": ""}
    difference.plot(middle, y, **mark)
    known = certainty.get_legend_handles_labels()[1]
    certainty.plot(max(entry["largest_t"], 0.1), y, label=NAMES[kind] if NAMES[kind] not in known else None, **mark)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw. Returns the exit status: 0 = drawn, 2 = a file is no record of the timing audit."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.timing_plot", description="Draw the timing audit as a PNG file."
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS.json", help="every GPU's newest run")
    parser.add_argument("--out", type=Path, default=results.ROOT / FOLDER, metavar="FOLDER", help=f"({FOLDER})")
    options = parser.parse_args(argv)
    try:
        records = [{**results.read(path), "file": path.name} for path in options.results]
        records = records or list(results.newest(results.FOLDER, "audit-timing").values())
        for record in records:
            if record["kind"] != "audit-timing":
                raise ValueError(f"{record['file']}: expected kind audit-timing, got {record['kind']}")
            print(f"{plots.write(draw(record), options.out / filename(record), record)} written")
    except (OSError, ValueError) as misuse:
        print(f"timing_plot: {misuse}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
