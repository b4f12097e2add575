"""The comparison with the peers as text, from its record: a row a shape and clock, then what it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashcore.benchmark.shapes import Shape
from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import Interval, geometric_mean

Record = dict[str, Any]

CLOCKS = {"gpu_warm": "warm", "gpu_cold": "cold"}


def figure(case: Record, name: str, clock: str = "gpu_warm") -> float | None:
    """µs per call of one contestant; None where it has none."""
    timed = case["contestants"][name].get(clock)
    return timed["us"] if timed else None


def best_peer(case: Record, clock: str = "gpu_warm") -> str | None:
    """The fastest contestant that isn't FlashCore; None when none was timed."""
    times = {name: figure(case, name, clock) for name in case["contestants"] if not name.startswith("flashcore")}
    timed = {name: t for name, t in times.items() if t is not None}
    return min(timed, key=timed.__getitem__) if timed else None


def ratio(case: Record, clock: str = "gpu_warm") -> Interval | None:
    """How many times as long as FlashCore the best peer takes, with its 95% interval; None without both."""
    best = best_peer(case, clock)
    found = case["contestants"][best][clock].get("over_flashcore") if best else None
    return Interval(**found) if found else None


def tflops(case: Record, clock: str = "gpu_warm") -> float | None:
    """FlashCore's useful arithmetic per second, in 10^12."""
    ours = figure(case, "flashcore", clock)
    return Shape(**case["shape"]).flops / ours / 1e6 if ours is not None else None


def ratios(record: Record, clock: str) -> list[float]:
    """The ratio of every case that has one."""
    return [found.value for case in record["cases"] if (found := ratio(case, clock))]


def passed(record: Record) -> bool:
    """Whether FlashCore computed every case, rightly."""
    return all(case["contestants"]["flashcore"]["status"] == "ok" for case in record["cases"])


def _width(name: str) -> int:
    return max(8, len(name))


def head(protocol: Record) -> Iterator[str]:
    """The title and the column names."""
    names = protocol["contestants"]
    yield f"FLASHCORE AND ITS PEERS: µs per call on the gpu clock ({protocol['name']}); ratio = best peer / FlashCore"
    columns = " ".join(f"{name:>{_width(name)}}" for name in names)
    line = f"{'Shape':<20} {'L2':<5}{columns} {'Ratio':>7} {'TFLOP/s':>8}  Best peer"
    yield line
    yield "-" * len(line)


def rows(case: Record, protocol: Record) -> Iterator[str]:
    """One shape: a row a clock."""
    label = Shape(**case["shape"]).label
    for clock, title in CLOCKS.items():
        if clock == "gpu_cold" and "cold" not in protocol["name"]:
            continue
        columns = " ".join(us(figure(case, name, clock), _width(name)) for name in protocol["contestants"])
        times, done = ratio(case, clock), tflops(case, clock)
        yield (
            f"{label if clock == 'gpu_warm' else '':<20} {title:<5}{columns} "
            f"{'-' if times is None else f'{times.value:.2f}x':>7} {'-' if done is None else f'{done:.0f}':>8}  "
            f"{best_peer(case, clock) or '-'}"
        )


def rest(record: Record) -> Iterator[str]:
    """What it comes to, who was left out and why, and what the GPU did meanwhile."""
    yield ""
    for clock, title in CLOCKS.items():
        if values := ratios(record, clock):
            ahead = sum(value > 1 for value in values)
            yield (
                f"{title}: the best peer takes {geometric_mean(values):.3f}x as long (geometric mean over "
                f"{len(values)}; {min(values):.2f}x to {max(values):.2f}x; FlashCore ahead on {ahead})"
            )
    if found := record["ceilings"]:
        yield (
            f"ceilings: matmul {found['matmul_tflops']:.0f} TFLOP/s, copy in L2 {found['l2_copy_tb_s']:.2f} TB/s, "
            f"in HBM {found['hbm_copy_tb_s']:.2f} TB/s, empty kernel {found['empty_kernel_us']:.2f} µs"
        )
    yield from left_out(record)
    if reasons := machine.throttled(state for case in record["cases"] for state in case["gpu_states"]):
        yield f"NOTE: the GPU's clock was held back during this run: {', '.join(reasons)}."
    if not record["complete"]:
        yield "NOTE: not every shape was measured."


def left_out(record: Record) -> Iterator[str]:
    """Who has no figures, where and why: one line for each reason."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for case in record["cases"]:
        for name, found in case["contestants"].items():
            if found["status"] != "ok":
                where.setdefault((name, found["status"], found["reason"]), []).append(Shape(**case["shape"]).label)
    for (name, status, reason), labels in where.items():
        places = "everywhere" if len(labels) == len(record["cases"]) else ", ".join(labels)
        yield f"{name}: {status} ({places}): {reason}"
