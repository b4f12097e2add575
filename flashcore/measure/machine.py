"""The machine's record: what a figure needs beside it to mean anything, and what the GPU went through meanwhile."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# NVML's reasons for a clock below the highest, by bit (nvml.h, nvmlClocksEventReason*). Idle and an application's own
# clock setting are no trouble; all others mean that a figure is of a GPU held back.
_REASONS = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}


def environment(device_index: int = 0) -> dict[str, Any]:
    """Versions, the GPU and the commit; None for what can't be found out. Names neither user, host nor path."""
    import torch

    found: dict[str, Any] = {
        "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "source": source(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device_index)
        with _Nvml(device_index) as nvml:
            found["driver"] = nvml.driver()
        found["cudnn"] = torch.backends.cudnn.version()
        found["gpu"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["sms"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["memory_bytes"] = properties.total_memory
    return found


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit this code was checked out at, "+" behind it when tracked files differ; None outside a checkout.

    FLASHCORE_COMMIT stands in where the code was copied without its history.
    """
    if named := os.environ.get("FLASHCORE_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def source() -> str:
    """A digest of the package's own files: what ran, also where there is no history or a changed checkout."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in {".py", ".c", ".json"}:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def gpu_state(device_index: int = 0) -> dict[str, Any]:
    """The GPU at this moment: clocks (MHz), temperature (C), power (W), and what holds its clock back.

    Empty without nvidia-ml-py; a value that this GPU or its virtualisation doesn't tell is left out.
    """
    with _Nvml(device_index) as nvml:
        return nvml.state()


def throttled(states: Iterable[dict[str, Any]]) -> list[str]:
    """Every reason in these states that held the clock back, once."""
    return sorted({reason for state in states for reason in state.get("held_back_by", ())})


class _Nvml:
    """NVML's view of a CUDA device. Found by its UUID: the two libraries number GPUs differently."""

    def __init__(self, device_index: int) -> None:
        self._index = device_index
        self._nvml: Any = None
        self._handle: Any = None

    def __enter__(self) -> _Nvml:
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            self._nvml = pynvml
            uuid = torch.cuda.get_device_properties(self._index).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except Exception:  # no nvidia-ml-py, no GPU, no driver, a GPU that hides: every one means "not told"
            pass
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml:
            self._nvml.nvmlShutdown()

    def _ask(self, function: str, *arguments: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(*arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None

    def driver(self) -> str | None:
        answer = self._ask("nvmlSystemGetDriverVersion")
        return answer.decode() if isinstance(answer, bytes) else answer

    def state(self) -> dict[str, Any]:
        if self._handle is None:
            return {}
        power = self._ask("nvmlDeviceGetPowerUsage", self._handle)
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons", self._handle)
        if mask is None:  # the name before driver 535
            mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._handle)
        answers = {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", self._handle, self._nvml.NVML_CLOCK_SM),
            "sm_mhz_highest": self._ask("nvmlDeviceGetMaxClockInfo", self._handle, self._nvml.NVML_CLOCK_SM),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", self._handle, self._nvml.NVML_CLOCK_MEM),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", self._handle, self._nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1000,
            "held_back_by": None if mask is None else [why for bit, why in _REASONS.items() if mask & bit],
        }
        return {name: answer for name, answer in answers.items() if answer is not None}
