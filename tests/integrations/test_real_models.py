"""Whole models: real weights of a sentence encoder and of a language model, and vision and diffusion transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="needs the integrations extra")

from flashcore import attention  # noqa: E402
from flashcore.integrations import sdpa  # noqa: E402
from flashcore.integrations import transformers as fcore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)

CORPUS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods while the rain that had been forecast for days finally began to fall.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
    "Attention computes a weighted mean of values.",
    "The stock market fell sharply on Monday, after a week of quiet trading.",
]
QUERIES = ["Someone has a meal.", "An animal makes music.", "A predator hunts.", "What is a weighted mean?"]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_sentence_embeddings(device, minilm):
    """Padded batches of sentences: the same embeddings, and the same order of the closest ones."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs the integrations extra")
    fcore.register()
    dtype = torch.float16 if device == "cuda" else torch.float32
    found = {}
    for name in ("sdpa", "fcore"):
        options = {"attn_implementation": name, "dtype": dtype}
        model = sentence_transformers.SentenceTransformer(str(minilm), device=device, model_kwargs=options)
        found[name] = [model.encode(texts, convert_to_tensor=True).float() for texts in (CORPUS, QUERIES)]
    for ours, theirs in zip(found["fcore"], found["sdpa"], strict=True):
        assert F.cosine_similarity(ours, theirs).min() > 0.9999
    ours, theirs = (F.normalize(q, dim=-1) @ F.normalize(c, dim=-1).T for c, q in found.values())
    if device == "cpu":
        assert torch.equal(ours.argsort(-1), theirs.argsort(-1))
    assert torch.equal(ours.topk(3).indices, theirs.topk(3).indices)
    assert ours.argmax(-1).tolist() == [0, 6, 7, 8]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_language_model_writes_the_same(device, smollm2):
    """64 tokens, greedily: grouped heads, prefill and decode steps."""
    length = 64
    fcore.register()
    load = {"pretrained_model_name_or_path": str(smollm2.parent), "gguf_file": smollm2.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**load)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=dtype).to(device).eval()
    prompt = tokenizer("Once upon a time, in a small village by the sea,", return_tensors="pt").to(device)
    texts = []
    for name in ("fcore", "sdpa"):
        model.set_attn_implementation(name)
        texts.append(model.generate(**prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)[0])
    assert len(texts[0]) == prompt["input_ids"].shape[1] + length
    assert torch.equal(*texts), [tokenizer.decode(text) for text in texts]


@pytest.fixture
def hook(monkeypatch):
    """SDPA by FlashCore: on a GPU through torch's registry, without one by another function of its name."""
    if torch.cuda.is_available():
        sdpa.activate()
    else:
        def stand_in(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            assert attn_mask is None and not enable_gqa
            return sdpa._forward(query, key, value, dropout_p, is_causal, scale=scale)[0]

        monkeypatch.setattr(F, "scaled_dot_product_attention", stand_in)
    calls = []
    monkeypatch.setattr(sdpa, "attention", lambda *args, **kw: (calls.append(args), attention(*args, **kw))[1])
    yield calls
    sdpa.restore()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_vision_transformer_of_timm(device, hook):
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, pretrained=False).eval()
    _by_hook(model, [torch.randn(2, 3, 224, 224)], device, hook, calls=12)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_diffusion_transformer(device, hook):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    inputs = [torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 7])]
    _by_hook(model, inputs, device, hook, calls=2)


def _by_hook(model, inputs, device, hook, calls):
    """The model's output with SDPA by FlashCore is that of torch's."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = model.to(device, dtype)
    inputs = [t.to(device, dtype if t.is_floating_point() else None) for t in inputs]

    def run():
        with torch.no_grad():
            out = model(*inputs)
        return getattr(out, "sample", out)

    ours = run()
    assert len(hook) == calls
    if device == "cuda":
        sdpa.restore()
        want = run()
    else:
        with pytest.MonkeyPatch.context() as torchs:
            torchs.setattr(F, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention)
            want = run()
    assert len(hook) == calls
    error = (ours - want).float().norm() / want.float().norm()
    assert error < (5e-3 if device == "cuda" else 1e-5), error
