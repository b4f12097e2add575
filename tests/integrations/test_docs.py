"""docs/integrations.md: every snippet runs as it stands, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the integrations extra")
pytest.importorskip("sentence_transformers", reason="needs the integrations extra")

from flashcore.integrations import sdpa  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_snippets(device: str, encoder: Path, writer: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(sdpa.restore)
    blocks = re.findall(r"(<!-- example: gpu -->\n)?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 8
    scope = {
        "folder": str(encoder), "writer": str(writer), "device": device,
        "dtype": torch.float16 if device == "cuda" else torch.float32,
    }  # fmt: skip
    for needs_gpu, block in blocks:
        if device == "cuda" or not needs_gpu:
            exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["embeddings"].shape == (2, 64) and scope["states"].shape == (4, 24, 64)
    assert scope["tokens"].shape == (1, 11) and not sdpa.is_active()
    with torch.inference_mode():
        scope["model"].set_attn_implementation("eager")
        want = scope["model"](scope["ids"], attention_mask=scope["mask"]).last_hidden_state
    real = scope["mask"].bool()
    torch.testing.assert_close(scope["states"][real], want[real], atol=5e-3, rtol=5e-3)
