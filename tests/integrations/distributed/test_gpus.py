"""Two GPUs: the example and a short run of the benchmark, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def run(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example() -> None:
    assert run("examples/shard_two_gpus.py").count("on 2 cuda devices") == 2


def test_the_benchmark_at_full_length(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    run("-m", "flashcore.benchmark.context_parallel", "--heads", "8", "--trials", "5", "--json", file)
    record = json.loads(file.read_text())
    assert record["met"] and len(record["cases"]) == 4
