"""The attention problems of a model, from its Hugging Face configuration: heads, head dimensions and usual lengths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashcore.benchmark.shapes import Shape

Config = Mapping[str, Any]

BATCHES = (1, 8, 32)
TEXT_LENGTHS = (128, 512, 2048)  # where a text model takes them: a query, a passage, a prompt
_NESTED = ("text_config", "vision_config", "audio_config")

# What these models' config.json says of attention, for where transformers isn't installed or there is no network.
KNOWN: dict[str, Config] = {
    "bert-base-uncased": {"model_type": "bert", "hidden_size": 768, "num_attention_heads": 12,
                          "max_position_embeddings": 512},
    "bert-large-uncased": {"model_type": "bert", "hidden_size": 1024, "num_attention_heads": 16,
                           "max_position_embeddings": 512},
    "sentence-transformers/all-MiniLM-L6-v2": {"model_type": "bert", "hidden_size": 384, "num_attention_heads": 12,
                                               "max_position_embeddings": 512},
    "BAAI/bge-m3": {"model_type": "xlm-roberta", "hidden_size": 1024, "num_attention_heads": 16,
                    "max_position_embeddings": 8194},
    "google/vit-base-patch16-224": {"model_type": "vit", "hidden_size": 768, "num_attention_heads": 12,
                                    "image_size": 224, "patch_size": 16},
    "openai/clip-vit-large-patch14": {
        "model_type": "clip",
        "text_config": {"model_type": "clip_text_model", "hidden_size": 768, "num_attention_heads": 12,
                        "max_position_embeddings": 77},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16,
                          "image_size": 224, "patch_size": 14},
    },
    "openai/whisper-base": {"model_type": "whisper", "d_model": 512, "encoder_attention_heads": 8,
                            "max_source_positions": 1500},
    "openai/whisper-large-v3": {"model_type": "whisper", "d_model": 1280, "encoder_attention_heads": 20,
                                "max_source_positions": 1500},
    "t5-base": {"model_type": "t5", "d_model": 768, "d_kv": 64, "num_heads": 12, "n_positions": 512,
                "relative_attention_num_buckets": 32},
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12,
             "n_positions": 1024},
    "meta-llama/Llama-3.1-8B": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
                                "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
                                "max_position_embeddings": 131072},
    "HuggingFaceTB/SmolLM2-135M": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576,
                                   "num_attention_heads": 9, "num_key_value_heads": 3, "torch_dtype": "bfloat16",
                                   "max_position_embeddings": 8192},
}  # fmt: skip


def shapes(name: str, batches: Sequence[int] = BATCHES, dtype: str | None = None) -> list[Shape]:
    """The problems of a model: every kind of self-attention it has, at its usual lengths, for each batch.

    Args:
        name: a folder or file with a Hugging Face configuration, a name of KNOWN, or one that transformers finds.
        dtype: "float16" or "bfloat16"; None = the configuration's, or float16 where it names neither.

    Raises:
        ValueError: no such configuration, or one that doesn't say what attention needs.
    """
    found = [
        shape
        for part in _parts(config(name))
        for shape in _shapes(part, name, batches, dtype)
    ]
    return list(dict.fromkeys(found))


def config(name: str) -> Config:
    """A model's configuration: from a path, the built-in table, or transformers, in this order."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError(f"--from-model: expected a JSON object in {path}")
        return read
    short = {known.split("/")[-1].lower(): known for known in KNOWN}
    if known := short.get(name.split("/")[-1].lower()):
        return KNOWN[known]
    try:
        from transformers import AutoConfig  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError(
            f"--from-model: {name!r} is no path and none of {', '.join(KNOWN)}; with transformers installed, any name "
            "of the Hugging Face hub works"
        ) from None
    try:
        found: Config = AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"--from-model: transformers finds no configuration of {name!r}: {error}") from error
    return found


def _parts(whole: Config) -> Iterator[Config]:
    """A configuration, or those of its towers where it joins several: of one that generates, the text's tower does."""
    towers = {name: dict(whole[name]) for name in _NESTED if isinstance(whole.get(name), Mapping)}
    generates = any("ForConditionalGeneration" in a or "CausalLM" in a for a in whole.get("architectures") or ())
    if generates and "text_config" in towers:
        towers["text_config"]["architectures"] = ["CausalLM"]
    yield from towers.values() or [whole]


def _shapes(part: Config, name: str, batches: Sequence[int], dtype: str | None) -> Iterator[Shape]:
    kind = part.get("model_type", "this model")
    heads = _first(part, "num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "num_heads")
    width = _first(part, "hidden_size", "n_embd", "d_model", "dim")
    head_dim = _first(part, "head_dim", "d_kv") or (width // heads if width and heads else None)
    if not heads or not head_dim:
        raise ValueError(f"--from-model: the configuration of {name!r} ({kind}) names no heads and head dimension")
    if dtype is None:
        named = str(part.get("torch_dtype") or part.get("dtype")).removeprefix("torch.")
        dtype = named if named in ("float16", "bfloat16") else "float16"
    decodes = any("CausalLM" in a or "LMHead" in a for a in part.get("architectures") or ())
    is_causal = decodes or kind == "clip_text_model"
    options: dict[str, Any] = {
        "dtype": dtype,
        "heads_kv": _first(part, "num_key_value_heads") or 0,
        "softcap": part.get("attn_logit_softcapping") or 0.0,
        "bias": int("relative_attention_num_buckets" in part),  # T5's, the same for the whole batch
    }
    if options["heads_kv"] == heads:
        options["heads_kv"] = 0
    for seqlen in _lengths(part, name):
        for mask in _masks(part, is_causal, seqlen):
            for batch in batches:
                yield Shape(batch, heads, seqlen, head_dim, **mask, **options)


def _first(part: Config, *names: str) -> int | None:
    return next((int(part[name]) for name in names if isinstance(part.get(name), int)), None)


def _lengths(part: Config, name: str) -> list[int]:
    """Tokens of a sequence: an image's patches and class token, an audio window, or usual texts up to the longest."""
    image, patch = part.get("image_size"), part.get("patch_size")
    if image and patch:
        sides = [side // patch for side in (image if isinstance(image, Sequence) else [image, image])]
        has_no_class_token = "siglip" in str(part.get("model_type"))
        return [sides[0] * sides[1] + (not has_no_class_token)]
    if audio := part.get("max_source_positions"):
        return [int(audio)]
    longest = _first(part, "max_position_embeddings", "n_positions", "max_sequence_length")
    if longest is None:
        raise ValueError(f"--from-model: the configuration of {name!r} names no longest sequence and no image size")
    return [length for length in TEXT_LENGTHS if length <= longest] or [longest]


def _masks(part: Config, is_causal: bool, seqlen: int) -> list[dict[str, Any]]:
    """The masks of a model's layers at a length: whole or causal, within a window, or some layers each."""
    whole = {"is_causal": is_causal}
    local, sliding = part.get("local_attention"), part.get("sliding_window")
    if local and local // 2 < seqlen:  # ModernBERT: half of it to each side
        window = {"window": (local // 2, local // 2)}
    elif is_causal and sliding and part.get("use_sliding_window", True) and sliding < seqlen:
        window = {"window": (sliding - 1, 0)}  # as transformers counts, the token itself is one of them
    else:
        return [whole]
    mixed = any(part.get(name) for name in ("global_attn_every_n_layers", "sliding_window_pattern"))
    return [window, whole] if mixed or "full_attention" in (part.get("layer_types") or ()) else [window]
