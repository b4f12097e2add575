"""Faults planted in the Hopper kernel: each compiles, and on a GPU the gates catch each, which pass the shipped one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore.launch import capability
from flashcore.testing.mutants_hopper import MUTANTS

pytestmark = pytest.mark.skipif(
    not capability._triton().startswith(capability.TRITON_RELEASES), reason="not offered under this release of Triton"
)
HERE = Path(__file__).parent
TRIALS = ("plain", "large logits", "many keys", "wide", "negative scale", "causal", "causal lengths", "blind",
          "window", "soft cap", "bias", "fp32 bias", "hidden NaN", "bias, persistent", "mask", "lengths", "few lengths",
          "sorted", "sorted, persistent", "packed", "packed, short", "persistent", "narrow tile",
          "narrow tile, persistent", "columns", "heads in one block", "causal, heads in one block", "shared",
          "shared by four", "shared by four, causal", "shared, ones", "shared, many", "shared, columns",
          "shared, negative", "shared, causal", "shared, causal, many", "strides")  # fmt: skip
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def verdicts(names: list[str], *flags: str, processes: int, limit_s: float) -> dict[str, str]:
    """What becomes of each name, in several processes; one that ends early, or not at all, says so of where it was."""

    def chunk(mine: list[str]) -> dict[str, str]:
        command = [sys.executable, str(HERE / "hopper_mutants.py"), *flags, *mine]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        environment.pop("TRITON_INTERPRET", None)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
            said, why = done.stdout, done.stderr.strip().splitlines()[-1:] or [""]
        except subprocess.TimeoutExpired as late:
            said, why = (late.stdout or b"").decode(), [f"no end within {limit_s:.0f} s"]
        lines = [json.loads(line) for line in said.splitlines()]
        found = {line["name"]: line["verdict"] for line in lines if "name" in line}
        for line in lines:
            if "at" in line and line["at"] not in found:
                found[line["at"]] = f"its process ended: {why[0][:300]}"
        left = [name for name in mine if name not in found]
        return found | (chunk(left) if left and len(left) < len(mine) else {})

    with ThreadPoolExecutor(processes) as pool:
        parts = pool.map(chunk, [names[i::processes] for i in range(min(processes, len(names)))])
        return {name: verdict for part in parts for name, verdict in part.items()}


def test_every_mutant_is_one() -> None:
    assert len(MUTANTS) >= 20
    assert len({(m.file, m.old, m.new) for m in MUTANTS.values()}) == len(MUTANTS)
    assert {m.trial for m in MUTANTS.values()} <= set(TRIALS)
    for mutant in MUTANTS.values():
        assert mutant.new in mutant.source()
    with pytest.raises(ValueError, match="0 times in"):
        replace(MUTANTS["lse in base 2"], old="no such line").source()


def test_every_mutant_compiles() -> None:
    """A mutant that no compiler takes would count as caught on a GPU without anything being caught; one that its trial
    does not reach is caught by nothing.
    """
    found = verdicts(list(MUTANTS), "--compile", processes=2, limit_s=600)
    assert found == dict.fromkeys(MUTANTS, "")


def test_a_fault_out_of_its_trial_s_reach_is_noticed() -> None:
    name = "specialized: sum by products not rescaled"  # where there is an lse, products with ones add up nothing
    found = verdicts([name], "--compile", "--in", "shared", processes=1, limit_s=120)
    assert "of the same code" in found[name]


@pytest.mark.gpu
@on_hopper
def test_the_shipped_kernel_passes_every_trial() -> None:
    found = verdicts(list(TRIALS), "--trials", processes=8, limit_s=120)
    assert found == dict.fromkeys(TRIALS, "")


@pytest.mark.gpu
@on_hopper
def test_every_planted_fault_is_caught() -> None:
    found = verdicts(list(MUTANTS), processes=8, limit_s=120)
    assert set(found) == set(MUTANTS)
    assert not [name for name, verdict in found.items() if not verdict]
    assert not {name: verdict for name, verdict in found.items() if "process ended" in verdict}
