"""The gpu clock checked by another's: NVBench (cuda-bench), or Triton's own timer where that is not installed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashcore.measure.clocks import Contestant, Cuda, gpu_times
from flashcore.measure.machine import installed
from flashcore.measure.statistics import median

CALLS = 100  # in the graph that NVBench times: its own launches are counted with what it times
_MEAN = ("nv/batch/time/gpu/mean", "nv/cold/time/gpu/mean")  # seconds, as NVBench's JSON names them


def cross_check(contestant: Contestant) -> dict[str, Any]:
    """Device time of a call by our clock and by another's, one after the other and ours again.

    Returns:
        `tool` and its `version`; `us`, what it says; `ours_us`, the median of our rounds before and after; `ratio`,
        ours divided by theirs.
    """
    before = gpu_times({"": contestant}, replays=15)[0][""]
    with contestant.context():
        try:
            tool, distribution, us = "NVBench", "cuda-bench", _nvbench(contestant.calls[0])
        except ImportError:
            tool, distribution, us = "triton.testing.do_bench_cudagraph", "triton", _triton(contestant.calls[0])
    ours = median([*before, *gpu_times({"": contestant}, replays=15)[0][""]])
    return {"tool": tool, "version": installed(distribution), "us": us, "ours_us": ours, "ratio": ours / us}


def _triton(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(call, return_mode="median"))


def _nvbench(call: Callable[[], Any]) -> float:
    """The mean of a captured graph's replays, a call's share of it."""
    import cuda.bench as bench  # type: ignore[import-not-found, unused-ignore]
    import torch

    device = Cuda()
    call()
    device.synchronize()
    replay = device.capture([call] * CALLS)

    def launch(launch: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(launch.get_stream().addressof())):
            replay()

    def flashcore_cross_check(state: Any) -> None:
        state.exec(launch)

    bench.register(flashcore_cross_check)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nvbench.json"
        bench.run_all_benchmarks(["flashcore", "--json", str(path), "--devices", str(torch.cuda.current_device())])
        return 1e6 * _seconds(json.loads(path.read_text())) / CALLS


def _seconds(said: dict[str, Any]) -> float:
    """The mean GPU time in NVBench's JSON, batched where it has that.

    Raises:
        ValueError: it has neither.
    """
    (state,) = said["benchmarks"][0]["states"]
    summaries = {summary["tag"]: summary for summary in state["summaries"] or ()}
    for tag in _MEAN:
        if tag in summaries:
            return next(float(item["value"]) for item in summaries[tag]["data"] if item["name"] == "value")
    raise ValueError(f"NVBench: expected a mean GPU time, got {', '.join(summaries) or state.get('skip_reason')}")
