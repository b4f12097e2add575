"""examples/ as users start them, at a size for the CPU; shard_two_gpus.py is run in distributed/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the integrations extra")

ROOT = Path(__file__).resolve().parents[2]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def run(example: str, *arguments: object, device: str = "cpu") -> str:
    command = [sys.executable, ROOT / "examples" / example, "--device", device, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_embed_sentences(device: str, encoder: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the integrations extra")
    said = run("embed_sentences.py", "--model", encoder, device=device)
    assert said.count("\n") == 8 and re.search(r"SDPA's: (1\.0000|0\.9999)", said)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_generate_text(device: str, writer: Path) -> None:
    said = run("generate_text.py", "--model", writer, "--tokens", 8, "--prompt", "the cat sleeps", device=device)
    assert "fcore: 8 tokens" in said and "SDPA writes the same" in said


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_pipeline(device: str) -> None:
    load, size = ("--requests", 20, "--rate", 200), ("--layers", 1, 2, "--widths", 64, 128)
    said = run("pipeline.py", *load, *size, "--batches", 1, 4, "--lengths", 16, 32, device=device)
    for name in ("fcore", "sdpa"):
        assert re.search(rf"{name}: P50 [\d.]+ ms, P99 [\d.]+ ms, 40 requests", said), said
