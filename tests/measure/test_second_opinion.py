"""The cross-check against stand-ins for both other timers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flashcore.measure import second_opinion
from flashcore.measure.clocks import Contestant


@pytest.fixture(autouse=True)
def our_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[2.0, 2.0], [4.0, 4.0]])
    monkeypatch.setattr(second_opinion, "gpu_times", lambda *_, **__: ({"": next(answers)}, {"": 1}))


def nvbench_json(seconds: str | None) -> dict[str, Any]:
    """As NVBench 0.3 writes it: numbers are strings."""
    data = [{"name": "value", "type": "float64", "value": seconds}]
    summaries = [{"tag": "nv/cold/time/gpu/mean", "data": [{"name": "value", "type": "float64", "value": "9.0"}]}]
    if seconds:
        summaries.append({"tag": "nv/batch/time/gpu/mean", "data": data})
    return {"benchmarks": [{"name": "b", "states": [{"name": "Device=0", "summaries": summaries}]}]}


def test_nvbench(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    replays: list[int] = []

    def run_all_benchmarks(arguments: list[str]) -> None:
        launch = SimpleNamespace(get_stream=lambda: SimpleNamespace(addressof=lambda: 7))
        for function in registered:
            function(SimpleNamespace(exec=lambda call: call(launch)))
        path = Path(arguments[arguments.index("--json") + 1])
        path.write_text(json.dumps(nvbench_json("2.5e-4")))

    class Device:
        def synchronize(self) -> None:
            pass

        def capture(self, calls: list[Any]) -> Any:
            return lambda: replays.append(len(calls))

    cuda, bench = ModuleType("cuda"), ModuleType("cuda.bench")
    bench.register, bench.run_all_benchmarks = registered.append, run_all_benchmarks  # type: ignore[attr-defined]
    cuda.bench = bench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda.bench", bench)
    monkeypatch.setattr(second_opinion, "Cuda", Device)
    import contextlib

    import torch

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address: address)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(stream))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = second_opinion.cross_check(Contestant([lambda: None]))
    assert replays == [second_opinion.CALLS]
    assert found["tool"] == "NVBench" and found["us"] == pytest.approx(2.5)
    assert found["ours_us"] == 3.0 and found["ratio"] == pytest.approx(1.2)


def test_triton_where_nvbench_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.testing

    monkeypatch.setitem(sys.modules, "cuda.bench", None)
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda call, return_mode: 3e-3)  # milliseconds
    found = second_opinion.cross_check(Contestant([lambda: None]))
    assert found["tool"].startswith("triton.testing") and found["us"] == pytest.approx(3.0) and found["ratio"] == 1.0


def test_nvbenchs_file() -> None:
    assert second_opinion._seconds(nvbench_json("2.0")) == 2.0
    assert second_opinion._seconds(nvbench_json(None)) == 9.0
    skipped = {"benchmarks": [{"states": [{"summaries": None, "is_skipped": True, "skip_reason": "no device"}]}]}
    with pytest.raises(ValueError, match="no device"):
        second_opinion._seconds(skipped)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_the_clocks_agree_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.undo()
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    assert second_opinion.cross_check(Contestant([lambda: x @ x]))["ratio"] == pytest.approx(1.0, abs=0.03)
