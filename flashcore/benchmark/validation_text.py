"""The validation's output, from its record: text for the terminal, in the first validation's order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import geometric_mean

Record = dict[str, Any]

TORCH = {"sdpa": "SDPA", "sdpa-flash": "flash", "sdpa-cudnn": "cuDNN"}  # beside every row
CLOCKS = {"call": "call P50", "gpu_warm": "gpu warm", "gpu_cold": "gpu cold"}
WIDTH = 80


def label(config: Record) -> str:
    """As --configs names it: S128B8."""
    return f"S{config['shape']['seqlen']}B{config['shape']['batch']}"


def per_sequence(config: Record, percentile: str) -> float | None:
    """µs per sequence on the call clock; None where a wrong configuration was not timed."""
    latency = config["contestants"]["flashcore"].get("call")
    return latency[percentile] / config["shape"]["batch"] if latency else None


def on_target(record: Record, config: Record) -> bool:
    """Whether the median is below the target."""
    p50 = per_sequence(config, "p50")
    return p50 is not None and p50 < record["protocol"]["target_us_per_sequence"]


def passed(record: Record) -> bool:
    """Whether every configuration is correct and on target, and there is one."""
    return bool(record["cases"]) and all(c["correct"] and on_target(record, c) for c in record["cases"])


def figure(config: Record, name: str, clock: str) -> float | None:
    """µs per call of one contestant on one clock; None where it has none."""
    timed = config["contestants"][name].get(clock)
    return None if timed is None else timed["p50" if clock == "call" else "us"]


def ratio(config: Record, clock: str) -> float | None:
    """How many times as long the fastest of torch's takes; None where either side has no figure."""
    ours = figure(config, "flashcore", clock)
    torchs = [t for name in TORCH if (t := figure(config, name, clock)) is not None]
    return min(torchs) / ours if ours is not None and torchs else None


def head(record: Record) -> Iterator[str]:
    """What comes before the first row."""
    environment, protocol = record["environment"], record["protocol"]
    floor = record["event_floor_us"]
    yield "=" * WIDTH
    yield f"EXPERT VALIDATION: < {protocol['target_us_per_sequence']:.0f} µs ATTENTION KERNEL"
    yield "=" * WIDTH
    yield ""
    yield "ENVIRONMENT:"
    yield f"  GPU: {environment['gpu']}"
    yield f"  CUDA: {environment['cuda']} (driver {environment['driver'] or 'unknown'})"
    yield f"  PyTorch: {environment['torch']}"
    yield f"  Triton: {environment['triton']}"
    yield f"  Event floor: P50 {floor['p50']:.2f} µs, P99 {floor['p99']:.2f} µs (CUDA events around nothing)"
    yield ""
    yield f"TESTING CONFIGURATIONS (H=8, D=64, fp16; {protocol['trials']} trials; P50, P95, P99 in µs per sequence):"
    yield "-" * WIDTH
    yield (
        f"{'Seq':>4} {'Batch':>6} {'Block':>10} {'Correct':>8} {'MaxDiff':>10} "
        f"{'P50':>8} {'P95':>8} {'P99':>8} {'Target':>8}"
    )
    yield "-" * WIDTH


def row(record: Record, config: Record) -> str:
    """One configuration's row."""
    shape = config["shape"]
    block = "x".join(map(str, config["block"])) if "block" in config else "-"
    close = config.get("against_torch")
    worst = f"{max(each['max_abs_diff'] for each in close.values()):.6f}" if close else "-"
    p50, p95, p99 = (per_sequence(config, p) for p in ("p50", "p95", "p99"))
    target = "-" if p50 is None else "yes" if on_target(record, config) else "NO"
    correct = "yes" if config["correct"] else "NO"
    return (
        f"{shape['seqlen']:>4} {shape['batch']:>6} {block:>10} {correct:>8} {worst:>10} "
        f"{us(p50)} {us(p95)} {us(p99)} {target:>8}"
    )


def rest(record: Record) -> Iterator[str]:
    """Everything after the last row."""
    yield "-" * WIDTH
    yield ""
    yield from _wrong(record)
    yield from _beside(record)
    yield from _summary(record)
    yield from _distribution(record)
    if reasons := machine.throttled(record["gpu_states"]):
        yield f"NOTE: the GPU's clock was held back during this run: {', '.join(reasons)}."
        yield ""
    yield "=" * WIDTH
    yield from verdict(record)
    yield "=" * WIDTH
    yield ""


def why_wrong(config: Record) -> list[str]:
    """Every reason why a configuration is not correct."""
    reasons = []
    for inputs, found in (("independent", config["contestants"]["flashcore"]), ("q = k = v", config["same_qkv"])):
        if found["status"] != "ok":
            reasons.append(f"{inputs}: {found['reason'] or found['status']}")
    for inputs, close in config.get("against_torch", {}).items():
        if not close["allclose"]:
            reasons.append(f"{inputs}: not close to torch, largest difference {close['max_abs_diff']:.2e}")
    return reasons


def _wrong(record: Record) -> Iterator[str]:
    wrong = [c for c in record["cases"] if not c["correct"]]
    if wrong:
        yield "WRONG:"
        for config in wrong:
            for reason in why_wrong(config):
                yield f"  {label(config)}: {reason}"
        yield ""


def _beside(record: Record) -> Iterator[str]:
    yield "BESIDE TORCH'S SDPA (µs per call; same process and inputs, order rotated):"
    yield "-" * WIDTH
    yield f"{'Config':>10} {'Clock':>10} {'FlashCore':>10}" + "".join(f" {t:>9}" for t in TORCH.values()) + (
        f" {'best SDPA / FlashCore':>22}"
    )
    yield "-" * WIDTH
    for config in record["cases"]:
        for clock, title in CLOCKS.items():
            ours = [us(figure(config, name, clock), 9) for name in TORCH]
            times = ratio(config, clock)
            yield (
                f"{label(config) if clock == 'call' else '':>10} {title:>10} "
                f"{us(figure(config, 'flashcore', clock), 10)} {' '.join(ours)} "
                f"{'-' if times is None else f'{times:.2f}x':>22}"
            )
    yield "-" * WIDTH
    for name, title in TORCH.items():
        reasons = {c["contestants"][name]["reason"] for c in record["cases"]} - {""}
        for reason in sorted(reasons):
            yield f"  {title}: {reason}"
    yield ""


def _summary(record: Record) -> Iterator[str]:
    configs = record["cases"]
    medians = [p50 for c in configs if (p50 := per_sequence(c, "p50")) is not None]
    right, met = (sum(map(test, configs)) for test in (lambda c: c["correct"], lambda c: on_target(record, c)))
    yield "SUMMARY STATISTICS:"
    yield "-" * WIDTH
    yield f"  Correctness:        {right}/{len(configs)}"
    yield f"  Target < {record['protocol']['target_us_per_sequence']:.0f} µs:      {met}/{len(configs)}"
    if medians:
        yield f"  Best P50:           {min(medians):.2f} µs/seq"
        yield f"  Worst P50:          {max(medians):.2f} µs/seq"
        yield f"  Average P50:        {sum(medians) / len(medians):.2f} µs/seq"
    for clock, title in CLOCKS.items():
        if line := _against(record, clock):
            yield f"  {'SDPA, ' + title + ':':<19} {line}"
    yield ""


def _against(record: Record, clock: str) -> str:
    ratios = [r for c in record["cases"] if (r := ratio(c, clock)) is not None]
    if not ratios:
        return ""
    faster = sum(r > 1 for r in ratios)
    return (
        f"its best takes {geometric_mean(ratios):.2f}x as long (geometric mean; {min(ratios):.2f}x to "
        f"{max(ratios):.2f}x); faster on {faster}/{len(ratios)}"
    )


def _distribution(record: Record) -> Iterator[str]:
    yield "LATENCY DISTRIBUTION ANALYSIS (µs per sequence):"
    yield "-" * WIDTH
    yield f"{'Config':>12} {'Min':>8} {'P50':>8} {'P95':>8} {'P99':>8} {'Max':>8} {'P95/P50':>9} {'P99/P50':>9}"
    yield "-" * WIDTH
    for config in record["cases"]:
        low, p50, p95, p99, high = (per_sequence(config, p) for p in ("min", "p50", "p95", "p99", "max"))
        if p50 is None or p95 is None or p99 is None:
            continue
        columns = " ".join(us(value) for value in (low, p50, p95, p99, high))
        yield f"{label(config):>12} {columns} {p95 / p50:>8.2f}x {p99 / p50:>8.2f}x"
    yield "-" * WIDTH
    yield ""


def verdict(record: Record) -> Iterator[str]:
    """What was shown, in the words that the figures allow."""
    configs, target = record["cases"], record["protocol"]["target_us_per_sequence"]
    right, met = (sum(map(test, configs)) for test in (lambda c: c["correct"], lambda c: on_target(record, c)))
    yield f"VERDICT: {'PASSED' if passed(record) else 'NOT PASSED'}"
    yield f"  - {right} of {len(configs)} configurations correct on independent q, k, v and on q = k = v"
    yield f"  - {met} of {len(configs)} below {target:.0f} µs per sequence at P50"
    for clock in CLOCKS:
        ratios = [r for c in configs if (r := ratio(c, clock)) is not None]
        if ratios:
            mean = geometric_mean(ratios)
            words = f"{mean:.2f}x faster than" if mean > 1 else f"{1 / mean:.2f}x slower than"
            yield f"  - {CLOCKS[clock]}: {words} torch's best SDPA backend (geometric mean)"
