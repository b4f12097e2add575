"""Shapes of models, from configurations that are written here, shipped, or found by a stand-in for transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashcore.benchmark import model_shapes
from flashcore.benchmark.shapes import Shape


@pytest.mark.parametrize("name", list(model_shapes.KNOWN))
def test_every_known_model_has_shapes(name: str) -> None:
    found = model_shapes.shapes(name, batches=(1, 4))
    assert found and {shape.batch for shape in found} == {1, 4}
    assert all(shape.head_dim in (32, 64, 128) and shape.heads % shape.kv_heads == 0 for shape in found)
    assert model_shapes.shapes(name.split("/")[-1].upper(), batches=(1, 4)) == found


def test_what_configurations_say(tmp_path: Path) -> None:
    def of(**config: Any) -> list[Shape]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        by_folder = model_shapes.shapes(str(tmp_path), batches=(2,))
        assert model_shapes.shapes(str(tmp_path / "config.json"), batches=(2,)) == by_folder
        return by_folder

    assert of(hidden_size=768, num_attention_heads=12, max_position_embeddings=512) == [
        Shape(2, 12, 128, 64), Shape(2, 12, 512, 64),
    ]  # fmt: skip
    assert of(hidden_size=64, num_attention_heads=2, max_position_embeddings=77) == [Shape(2, 2, 77, 32)]
    vision = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    assert of(model_type="vit", **vision) == [Shape(2, 12, 197, 64)]
    assert of(model_type="siglip_vision_model", **vision) == [Shape(2, 12, 196, 64)]
    text = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 77}
    towers: dict[str, Any] = {"vision_config": vision, "text_config": text}
    assert of(**towers) == [Shape(2, 8, 77, 64), Shape(2, 12, 197, 64)]
    assert of(**towers, architectures=["Gemma3ForConditionalGeneration"]) == [
        Shape(2, 8, 77, 64, True), Shape(2, 12, 197, 64),
    ]  # fmt: skip
    assert not of(**text, architectures=["T5ForConditionalGeneration"])[0].is_causal  # what is measured is the encoder
    llama = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32,
             "num_key_value_heads": 8, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}  # fmt: skip
    assert of(**llama)[0] == Shape(2, 32, 128, 128, True, "bfloat16", 8)
    assert [shape.window for shape in of(**llama, sliding_window=512)] == [(-1, -1), (-1, -1), (511, 0)]
    assert {shape.window for shape in of(**llama, sliding_window=512, use_sliding_window=False)} == {(-1, -1)}
    assert of(**llama, head_dim=64, attn_logit_softcapping=50.0)[0].softcap == 50.0
    assert of(hidden_size=768, num_attention_heads=12, max_position_embeddings=8192, local_attention=128)[0].window == (
        64, 64,
    )  # fmt: skip
    modern = {"hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 128, "local_attention": 128}
    assert [shape.window for shape in of(**modern, global_attn_every_n_layers=3)] == [(64, 64), (-1, -1)]
    mixed = of(**llama, sliding_window=1024, layer_types=["sliding_attention", "full_attention"])
    assert [(shape.seqlen, shape.window, shape.is_causal) for shape in mixed[2:]] == [
        (2048, (1023, 0), False), (2048, (-1, -1), True),
    ]  # fmt: skip
    assert of(model_type="clip_text_model", **text)[0].is_causal
    t5 = {"d_model": 768, "d_kv": 64, "num_heads": 12, "n_positions": 512, "relative_attention_num_buckets": 32}
    assert {shape.bias for shape in of(**t5)} == {1}
    assert model_shapes.shapes(str(tmp_path), (2,), "bfloat16")[0].dtype == "bfloat16"
    for incomplete in ({"hidden_size": 8}, {"hidden_size": 64, "num_attention_heads": 2}):
        with pytest.raises(ValueError, match="--from-model: the configuration of"):
            of(**incomplete)


def test_names_that_transformers_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    class AutoConfig:
        @staticmethod
        def from_pretrained(name: str) -> Any:
            if name != "somebody/model":
                raise OSError("not on the hub")
            return AutoConfig()

        def to_dict(self) -> dict[str, Any]:
            return {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 128}

    transformers = ModuleType("transformers")
    transformers.AutoConfig = AutoConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    assert model_shapes.shapes("somebody/model", (1,)) == [Shape(1, 4, 128, 32)]
    with pytest.raises(ValueError, match="finds no configuration of 'nobody'"):
        model_shapes.shapes("nobody")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="'nobody' is no path and none of bert-base-uncased"):
        model_shapes.shapes("nobody")
