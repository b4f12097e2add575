"""The validation's command line, its output and its order of things; the measuring itself is the gpu test below."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore.benchmark import contest, expert_validation, results, validation_text, without_gpu
from flashcore.benchmark.shapes import NINE, Shape
from flashcore.benchmark.terminal import Terminal
from flashcore.core.config import Config
from flashcore.fast import planning
from tests.benchmark import records

BENCHMARK = Path(expert_validation.__file__).parent


def text_of(record: dict[str, Any]) -> str:
    rows = [validation_text.row(record, case) for case in record["cases"]]
    return "\n".join([*validation_text.head(record), *rows, *validation_text.rest(record)])


def test_the_first_validations_order_of_output() -> None:
    text = text_of(records.validation())
    headings = ["EXPERT VALIDATION: < 5 µs ATTENTION KERNEL", "ENVIRONMENT:", "  GPU: ", "  CUDA: ", "  PyTorch: ",
                "  Triton: ", " Seq  Batch      Block  Correct    MaxDiff      P50      P95      P99   Target",
                "SUMMARY STATISTICS:", "LATENCY DISTRIBUTION ANALYSIS", "VERDICT: PASSED"]  # fmt: skip
    positions = [text.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert " 128      8      64x64      yes   0.000500     2.62" in text  # (1 + 20) / 8
    assert "gpu warm: 1.25x faster than torch's best SDPA backend (geometric mean)" in text
    assert "Event floor: P50 6.00 µs" in text and max(map(len, text.splitlines())) <= 120


def test_a_wrong_configuration_prints_no_speed() -> None:
    record = records.wrong(records.validation())
    row = validation_text.row(record, record["cases"][0])
    assert row.split() == ["128", "8", "64x64", "NO", "0.000500", "-", "-", "-", "-"]
    text = text_of(record)
    assert "S128B8: independent: frobenius 0.5 exceeds 0.00042" in text
    assert "VERDICT: NOT PASSED" in text and "8 of 9 configurations correct" in text
    assert not validation_text.passed(record)


@pytest.mark.parametrize(("p50", "met"), [(39.99, True), (40.0, False), (41.0, False)])
def test_the_target_is_below_five_microseconds_a_sequence(p50: float, met: bool) -> None:
    record = records.validation()
    record["cases"][0]["contestants"]["flashcore"]["call"]["p50"] = p50
    assert validation_text.passed(record) == met
    assert ("8 of 9 below 5 µs" in text_of(record)) == (not met)


def test_nothing_measured_is_no_pass() -> None:
    assert not validation_text.passed(records.validation(cases=[]))


def test_a_throttled_run_says_so() -> None:
    record = records.validation(gpu_states=[{"held_back_by": ["software power cap"]}])
    assert "held back during this run: software power cap" in text_of(record)


def test_arguments() -> None:
    options = expert_validation._options([])
    assert (options.trials, options.configs, options.json) == (1000, NINE, None)
    options = expert_validation._options(["--trials", "7", "--configs", "S64B2,s128b8", "--json"])
    assert options.configs == [Shape(2, 8, 64, 64), Shape(8, 8, 128, 64)]
    assert (options.trials, options.json) == (7, expert_validation.AUTOMATIC)


@pytest.mark.parametrize("bad", ["--trials 0", "--trials x", "--configs 128x8", "--configs S1B", "x"])
def test_bad_arguments(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        expert_validation.main(bad.split())
    assert stop.value.code == 2 and "flashcore validate: error" in capsys.readouterr().err


@pytest.mark.parametrize("right", [True, False])
def test_exit_status_and_json(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = records.validation() if right else records.wrong(records.validation())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(expert_validation, "run", lambda shapes, trials: record)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert expert_validation.main(["--json"]) == (0 if right else 1)
    assert [p.name for p in tmp_path.iterdir()] == ["validation-h100-2001-01-01.json"]
    assert expert_validation.main(["--json", str(tmp_path / "mine.json")]) == (0 if right else 1)
    assert json.loads((tmp_path / "mine.json").read_text())["kind"] == "validation"


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Runs `measure` without a GPU: clocks and choice are stand-ins, and the log tells what was asked of them."""
    log: list[str] = []
    inputs = Shape.inputs
    monkeypatch.setattr(Shape, "inputs", lambda self, device="cpu", seed=42: inputs(self, "cpu", seed))
    explanation = SimpleNamespace(config=Config("portable", 64, 32, 4, 2))
    monkeypatch.setattr(planning, "explain", lambda *_, **__: explanation)

    def call_clock(admitted: dict[str, Any], **_: Any) -> dict[str, Any]:
        log.append(f"call {' '.join(admitted)}")
        return {name: records.call(50.0) for name in admitted}

    def gpu_clock(peers: dict[str, Any], shape: Shape, *, cold: bool, **_: Any) -> tuple[Any, dict[str, str]]:
        log.append(f"{'cold' if cold else 'warm'} {' '.join(peers)}")
        return records.gpu(dict.fromkeys(peers, 5.0)), {}

    monkeypatch.setattr(contest, "call_clock", call_clock)
    monkeypatch.setattr(contest, "gpu_clock", gpu_clock)
    yield log


def test_measure_times_what_passed_its_gate(on_cpu: list[str]) -> None:
    with Terminal(1, "testing") as terminal:
        case = expert_validation.measure(Shape(1, 2, 64, 64), 10, 2**20, terminal)
    assert case["correct"] and case["block"] == [64, 32]
    assert {name: found["status"] for name, found in case["contestants"].items()}["flashcore"] == "ok"
    passed = " ".join(name for name, found in case["contestants"].items() if found["status"] == "ok")
    assert on_cpu == [f"call {passed}", f"warm {passed}", f"cold {passed}"]  # torch's cuDNN refuses CPU tensors
    assert case["contestants"]["sdpa-cudnn"]["status"] == "failed" and "sdpa-cudnn" not in passed


def test_measure_times_nothing_behind_a_red_gate(on_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.benchmark.peers import OURS, Prepared

    def off(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        return Prepared(lambda: 1.01 * torch.nn.functional.scaled_dot_product_attention(q, k, v))

    right = OURS["flashcore"]
    monkeypatch.setitem(OURS, "flashcore", type(right)("flashcore", "FlashCore", off))
    with Terminal(1, "testing") as terminal:
        case = expert_validation.measure(Shape(1, 2, 64, 64), 10, 2**20, terminal)
    assert on_cpu == [] and not case["correct"]
    assert case["contestants"]["flashcore"]["status"] == "wrong"
    assert all("call" not in found for found in case["contestants"].values())


def test_failing_while_timed_is_no_pass(on_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "gpu_clock", lambda *_, **__: ({}, {"flashcore": "not inside a graph"}))
    with Terminal(1, "testing") as terminal:
        case = expert_validation.measure(Shape(1, 2, 64, 64), 10, 2**20, terminal)
    assert not case["correct"]
    assert "independent: gpu_cold: not inside a graph" in validation_text.why_wrong(case)


def test_it_runs_as_a_file_and_as_a_module() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command, folder in ((["expert_validation.py"], BENCHMARK), (["-m", "flashcore.benchmark.expert_validation"],
                                                                    results.ROOT)):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "--trials" in done.stdout


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gate = {"shape": "S128 B1", "inputs": "independent", "reason": "", "max_diff": 5e-4, "frobenius": 2.6e-4}
    problem = {"head_dim": 64, "dtype": "float16", "is_causal": False}
    config = {"schedule": "", "block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    check = {"arch": 90, "kernel": "portable", "config": config, "problem": problem, "registers": 96, "spills": 0,
             "shared": 24576, "error": "", "ok": True}  # fmt: skip

    def run(gates: list[dict[str, Any]], checks: list[dict[str, Any]]) -> tuple[int, str]:
        monkeypatch.setattr(without_gpu, "_lines", lambda arguments, interpret: iter(gates if interpret else checks))
        return without_gpu.main(), capsys.readouterr().out

    gates = [gate] * (2 * len(without_gpu.SHAPES))
    status, text = run(gates, [check])
    assert status == 0 and "no timings" in text and "PASSED, as far as it goes" in text
    assert "sm_90  portable         64x32, 4 warps, 2 stages" in text
    status, text = run([*gates[1:], {**gate, "reason": "frobenius 0.1 exceeds 0.00042"}], [check])
    assert status == 1 and "NOT PASSED" in text and "S128 B1, independent: frobenius 0.1 exceeds" in text
    status, text = run(gates, [{**check, "ok": False, "error": "too much shared memory"}])
    assert status == 1 and "sm_90 portable: too much shared memory" in text
    assert run(gates[1:], [check])[0] == 1  # the gates ended early
    assert run(gates, [])[0] == 1


def test_no_bar_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(3, "working") as terminal:
        terminal.line("a row")
        terminal.advance(3)
    assert capsys.readouterr().out == "a row\n"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    status = expert_validation.main(["--configs", "S128B8", "--trials", "50", "--json", str(path)])
    record = results.read(path)
    (case,) = record["cases"]
    assert case["correct"] and status == (0 if validation_text.passed(record) else 1)
    ours = case["contestants"]["flashcore"]
    assert 0 < ours["gpu_warm"]["us"] < ours["call"]["p50"]
    assert ours["gpu_cold"]["sets"] > 1
