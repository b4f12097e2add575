"""The files in results/: one JSON a run. results/README.md describes their fields."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashcore.measure.statistics import Summary, median_interval

SCHEMA = 1
_ABOVE = Path(__file__).resolve().parents[2]
ROOT = _ABOVE if (_ABOVE / "pyproject.toml").exists() else Path.cwd()  # the checkout, where the package is in one
FOLDER = ROOT / "results"
HEADLINE = "H100"  # whose figures a document states that states one GPU's


def timing(values: Sequence[float], **more: Any) -> dict[str, Any]:
    """One contestant's rounds on the gpu or host clock: the median (µs), its 95% interval, and every round."""
    found = median_interval(values)
    return {"us": found.value, "low": found.low, "high": found.high, **more, "rounds": list(values)}


def latency(summary: Summary, low: float | None, high: float | None) -> dict[str, Any]:
    """One contestant's trials on the call clock (µs), with the interval of the median."""
    return {**asdict(summary), "p50_low": low, "p50_high": high}


def slug(gpu: str | None) -> str:
    """A GPU's name as file names have it: "NVIDIA H100 80GB HBM3" is h100."""
    if gpu is None:
        return "no-gpu"
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-").split("-")
    return next((w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)), "-".join(words))


def default_path(kind: str, environment: dict[str, Any]) -> Path:
    """results/<kind>-<gpu>-<date>.json; a second run of the same day replaces the first."""
    return FOLDER / f"{kind}-{slug(environment['gpu'])}-{environment['recorded'][:10]}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all. Numbers keep six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded({"schema": SCHEMA, **record}), indent=1, allow_nan=False)
    # one number a line makes a hundred thousand lines of a few lists of rounds
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n")
    os.chmod(name, 0o644)
    os.replace(name, path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def read(path: Path) -> dict[str, Any]:
    """A record of this schema.

    Raises:
        ValueError: another schema, or no record at all.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected a record of schema {SCHEMA}")
    return record


def runs(folder: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """GPU -> its records of this kind, complete or not, the oldest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        for record in members(read(path)):
            if record["kind"] == kind and (gpu := record["environment"]["gpu"]) is not None:
                found.setdefault(gpu, []).append({**record, "file": path.name})
    return {gpu: sorted(those, key=lambda record: record["environment"]["recorded"]) for gpu, those in found.items()}


def newest(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """GPU -> the newest complete record of this kind."""
    whole = {gpu: list(filter(complete, those)) for gpu, those in runs(folder, kind).items()}
    return {gpu: those[-1] for gpu, those in whole.items() if those}


def complete(record: dict[str, Any]) -> bool:
    """Whether a run was not cut short; kinds that never are do not say so."""
    return bool(record.get("complete", True))


def headline(records: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Of one record a GPU that of HEADLINE; None where there is none."""
    return next((record for gpu, record in sorted(records.items()) if HEADLINE in gpu), None)


def newest_without_gpu(folder: Path, kind: str) -> dict[str, Any] | None:
    """The newest record of a kind that needs no GPU; None where there is none."""
    found = [{**record, "file": path.name} for path in folder.glob("*.json") if (record := read(path))["kind"] == kind]
    return max(found, key=lambda record: (record["environment"]["recorded"], record["file"]), default=None)


def members(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records that a file holds: a submission's, or the one that it is."""
    if record["kind"] != "submission":
        return [record]
    return [part for part in (record["validation"], *record["peers"]) if part is not None]
