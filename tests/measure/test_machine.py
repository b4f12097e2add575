from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.measure import machine


def test_environment_is_plain_data_without_paths() -> None:
    found = machine.environment()
    text = json.dumps(found)
    assert found["torch"] == torch.__version__
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert (found["gpu"] is None) == (not torch.cuda.is_available())


def test_commit_is_a_hash_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHCORE_COMMIT", raising=False)
    found = machine.commit()
    assert found is None or len(found.removesuffix("+")) == 40


def test_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.delenv("FLASHCORE_COMMIT", raising=False)
    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.commit() is None


def test_source_is_the_same_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measure").mkdir()
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "measure" / "machine.py"))
    first = machine.source()
    (tmp_path / "notes.txt").write_text("no code")
    assert machine.source() == first
    (tmp_path / "a.py").write_text("2")
    assert machine.source() != first


def test_installed() -> None:
    assert machine.installed("no-such-distribution-as-this") is None
    assert machine.installed("pytest")


def test_state_without_a_gpu_is_empty() -> None:
    if not torch.cuda.is_available():
        assert machine.gpu_state() == {}


class FakeNvml:
    """A pynvml of which the state needs: no power on this GPU, and a clock held back by heat."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: object) -> int:
        return 0x20 | 0x1  # thermal, and idle

    def nvmlDeviceGetClockInfo(self, handle: object, which: int) -> int:
        return 1755 if which == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetMaxClockInfo(self, handle: object, which: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: object, which: int) -> int:
        return 41


def test_state_leaves_out_what_is_not_told() -> None:
    nvml = machine._Nvml(0)
    nvml._nvml, nvml._handle = FakeNvml(), object()
    assert nvml.state() == {
        "sm_mhz": 1755,
        "sm_mhz_highest": 1980,
        "memory_mhz": 2619,
        "temperature_c": 41,
        "held_back_by": ["software thermal slowdown"],
    }


def test_throttled_gathers_reasons_once() -> None:
    states: list[dict[str, Any]] = [{}, {"held_back_by": ["a"]}, {"held_back_by": ["b", "a"]}, {"held_back_by": []}]
    assert machine.throttled(states) == ["a", "b"]
