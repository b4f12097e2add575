"""attn_implementation="fcore" in tiny models of every kind, beside "sdpa" and "eager"."""

from __future__ import annotations

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the integrations extra")

from flashcore import UnsupportedError  # noqa: E402
from flashcore.integrations import transformers as fcore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
CLOSE = {"atol": 3e-6, "rtol": 1e-4}  # fp32; computed once in fp64 and once by torch
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99
}  # fmt: skip
DECODER = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}


@pytest.fixture(autouse=True, scope="module")
def registered():
    fcore.register()


def bert():
    return transformers.BertModel(transformers.BertConfig(**TINY))


def modernbert():
    special = {name: i for i, name in enumerate(("pad_token_id", "cls_token_id", "sep_token_id"))}
    local = {"local_attention": 4, "global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**TINY, **special, **local))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, sliding_window=5))


def gemma2():
    more = {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**DECODER, **more))


def gpt_oss():
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**DECODER, **more))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def vit():
    size = {"image_size": 32, "patch_size": 8}
    return transformers.ViTModel(transformers.ViTConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"}, **size))


def whisper():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16,
            max_source_positions=20, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
        )
    )


DECODERS = [llama, mistral, gemma2, gpt_oss]


def made(make, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return make().eval().to(device, dtype)


def tokens(batch=3, length=13, seed=1):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch=3, length=13, side="right"):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, missing in ((0, 4), (2, 8)):
        mask[row, (slice(length - missing, None) if side == "right" else slice(missing))] = 0
    return mask


def inputs_of(model):
    ids = tokens()
    if isinstance(model, transformers.ViTModel):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        features = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(1))
        return {"input_features": features, "decoder_input_ids": ids}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return {"input_ids": ids, "attention_mask": padded(), "decoder_input_ids": ids[:, :6]}
    return {"input_ids": ids}


def run(model, name, **inputs):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(**inputs)[0]


def others(model):
    return ["eager", *(["sdpa"] if model._supports_sdpa else [])]


ALL = [bert, modernbert, *DECODERS, vit, whisper, t5]


@pytest.mark.parametrize("make", ALL, ids=lambda m: m.__name__)
def test_every_model_computes_the_same(make):
    model = made(make)
    inputs = inputs_of(model)
    ours = run(model, "fcore", **inputs)
    for name in others(model):
        torch.testing.assert_close(ours, run(model, name, **inputs), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [bert, modernbert, *DECODERS], ids=lambda m: m.__name__)
def test_padded_batches(make, side):
    model, mask = made(make), padded(side=side)
    ours, real = run(model, "fcore", input_ids=tokens(), attention_mask=mask), mask.bool()
    for name in others(model):
        torch.testing.assert_close(ours[real], run(model, name, input_ids=tokens(), attention_mask=mask)[real], **CLOSE)
    if side == "left" or make in (bert, modernbert):  # where it changes anything
        assert not torch.allclose(ours[real], run(model, "fcore", input_ids=tokens())[real], **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", DECODERS, ids=lambda m: m.__name__)
def test_generation(make, cache):
    model, ids, mask = made(make), tokens(), padded(side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    found = {}
    for name in ["fcore", *others(model)]:
        model.set_attn_implementation(name)
        found[name] = model.generate(ids, attention_mask=mask, **options)
    ours = found.pop("fcore")
    assert ours.sequences.shape == (3, 19)
    for theirs in found.values():
        for a, b in zip(ours.scores, theirs.scores, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("make", DECODERS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("parts", [[13], [6, 7], [12, 1], [1] * 13], ids=str)
def test_a_prompt_in_parts_is_the_prompt_at_once(make, parts):
    """Prefill, prefill behind a filled cache, and decode steps of one token."""
    model, ids = made(make), tokens()
    whole = run(model, "fcore", input_ids=ids)
    cache, got = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in ids.split(parts, 1):
            got.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), whole, **CLOSE)


def test_whisper_generates():
    model = made(whisper)
    features = inputs_of(model)["input_features"]
    found = []
    for name in ("fcore", "sdpa"):
        model.set_attn_implementation(name)
        found.append(model.generate(features, max_new_tokens=8, do_sample=False))
    assert torch.equal(*found)


def test_a_mask_of_the_callers_own():
    model, ids = made(llama), tokens()
    seen = torch.rand(3, 1, 13, 13, generator=torch.Generator().manual_seed(2)) < 0.6
    seen |= torch.eye(13, dtype=torch.bool)
    floating = torch.zeros(3, 1, 13, 13).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, floating):
        ours = run(model, "fcore", input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(ours, run(model, "sdpa", input_ids=ids, attention_mask=mask), **CLOSE)


def test_packed_sequences_by_their_positions():
    """Positions that start again hide the sequence before, as in training without padding."""
    model = made(llama)
    ids, positions = tokens(1, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    ours = run(model, "fcore", input_ids=ids, position_ids=positions, use_cache=False)
    parts = [run(model, "fcore", input_ids=part) for part in ids.split([5, 4, 3], 1)]
    torch.testing.assert_close(ours, torch.cat(parts, 1), **CLOSE)


@pytest.mark.parametrize("make", [bert, llama, vit], ids=lambda m: m.__name__)
def test_gradients(make):
    model = made(make)
    grads = {}
    for name in ("fcore", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(**inputs_of(model))[0].square().mean().backward()
        grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads["fcore"].keys() == grads["sdpa"].keys()
    for name, grad in grads["fcore"].items():
        torch.testing.assert_close(grad, grads["sdpa"][name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("make", [llama, whisper, t5], ids=lambda m: m.__name__)
def test_beam_search(make):
    """The cache is reordered between steps; encoder-decoders keep one of their cross-attention."""
    model = made(make)
    inputs = {name: value for name, value in inputs_of(model).items() if not name.startswith("decoder")}
    found = []
    for name in ("fcore", "sdpa"):
        model.set_attn_implementation(name)
        found.append(model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("make", [bert, llama], ids=lambda m: m.__name__)
def test_training_with_checkpointing(make):
    """Without dropout, in train mode, with activations computed again in the backward pass."""
    grads = []
    for checkpointing in (False, True):
        model = made(make).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.set_attn_implementation("fcore")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens())[0].square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [bert, llama, vit], ids=lambda m: m.__name__)
def test_half_precision_is_no_worse_than_eager(make, dtype):
    inputs = inputs_of(made(make))
    exact = run(made(make), "eager", **inputs)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    ours, theirs = (run(made(make, dtype=dtype), name, **half).float() for name in ("fcore", "eager"))
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_what_is_not_served_is_named():
    model = made(bert)
    model.set_attn_implementation("fcore")
    with pytest.raises(UnsupportedError, match="dropout"):
        model.train()(tokens())
    model.eval()
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(tokens(), output_attentions=True)
    layer, q = torch.nn.Module(), torch.randn(1, 2, 5, 8)
    for name in ("head_mask", "layer_head_mask", "block_table"):
        with pytest.raises(UnsupportedError, match=name):
            fcore.attend(layer, q, q, q, None, **{name: torch.ones(2)})
    with pytest.raises(ValueError, match="attn_mask"):
        fcore.attend(layer, q, q, q, None, position_bias=torch.zeros(1, 3, 5, 5))


def test_the_name_is_not_taken_for_flash_attentions():
    assert fcore.register() == "fcore" and "flash" not in fcore.NAME
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert ALL_MASK_ATTENTION_FUNCTIONS["fcore"] is fcore.make_mask
    assert transformers.AttentionInterface()["fcore"] is fcore.attend


def test_an_older_transformers_is_refused(monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=r"5\.5"):
        fcore.register()


# -- the two functions by themselves ----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_bias_of_positions(is_causal):
    q, k, v, bias = (torch.randn(shape) for shape in ((2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 8), (1, 4, 7, 7)))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    hidden = torch.zeros(7, 7).masked_fill(~causal, -torch.inf) if is_causal else 0.0
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias + hidden).transpose(1, 2)
    out, weights = fcore.attend(Layer(is_causal), q, k, v, None, position_bias=bias)
    assert weights is None
    torch.testing.assert_close(out, want, **CLOSE)
    if is_causal:
        for mask in (causal, torch.zeros(7, 7).masked_fill(~causal, -torch.inf)):
            out, _ = fcore.attend(Layer(True), q, k, v, mask, position_bias=bias)
            torch.testing.assert_close(out, want, **CLOSE)


def test_sinks_take_their_share_of_the_weights():
    q, k, v, sinks = (torch.randn(shape) for shape in ((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4,)))
    scores = (q @ k.repeat_interleave(2, 1).mT) * 0.3
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 7, 1)], -1).softmax(-1)[..., :-1]
    out, _ = fcore.attend(Layer(True), q, k, v, None, scaling=0.3, s_aux=sinks)
    torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2), **CLOSE)


def test_queries_that_a_batch_shares_and_strided_tensors():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(3, 2, 8, 6).mT
    out, _ = fcore.attend(Layer(False), q, k, k, None)
    want = torch.nn.functional.scaled_dot_product_attention(q.expand(3, -1, -1, -1), k, k)
    torch.testing.assert_close(out, want.transpose(1, 2), **CLOSE)
    assert out.is_contiguous()


@pytest.mark.parametrize("length", [12, 16, 21])
def test_masks_are_those_of_sdpa(length):
    from transformers import masking_utils as m

    padding = torch.ones(3, length, dtype=torch.bool)
    padding[1, length - 3 :] = False
    functions = (m.causal_mask_function, m.bidirectional_mask_function, m.sliding_window_causal_mask_function(4))
    for function, mask, (q_length, offset) in itertools.product(
        functions, (padding, padding[:, :-2]), ((length, 0), (1, length - 1), (5, length - 5))
    ):
        asked = {
            "batch_size": 3, "q_length": q_length, "kv_length": length, "q_offset": offset, "mask_function": function,
            "attention_mask": mask, "allow_is_causal_skip": True,
        }  # fmt: skip
        ours = fcore.make_mask(**asked)
        assert torch.equal(ours, m.sdpa_mask(**{**asked, "allow_is_causal_skip": False}))
        assert ours.stride(-1) == 1 and all(s % 16 == 0 for s in ours.stride()[:-1])
        if function is m.bidirectional_mask_function and q_length > 1:
            assert ours.stride(2) == 0  # one row for all


def test_a_mask_is_left_out_by_lengths_alone():
    make = fcore.make_mask
    ones = torch.ones(2, 9, dtype=torch.bool)
    assert make(2, 9, 9) is None and make(2, 1, 9, q_offset=8) is None and make(2, 4, 9, q_offset=5) is None
    assert make(2, 9, 9, local_size=10) is None
    assert make(2, 9, 9, local_size=9) is not None  # keys that the layers' is_causal would show
    assert make(2, 9, 9, allow_is_causal_skip=False) is not None
    assert make(2, 4, 9, q_offset=3) is not None and make(2, 4, 9, q_offset=torch.tensor(5)) is not None
    assert make(2, 9, 9, attention_mask=ones) is not None  # whatever it holds


class Untouchable(torch.Tensor):
    """A tensor whose values nobody may ask for."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "nonzero"), name
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_padding_is_not_looked_at():
    from transformers import masking_utils as m

    for function in (m.causal_mask_function, m.bidirectional_mask_function, m.sliding_window_causal_mask_function(4)):
        asked = {"mask_function": function, "attention_mask": padded().bool().as_subclass(Untouchable)}
        assert isinstance(fcore.make_mask(3, 13, 13, **asked), Untouchable)
        if function is m.causal_mask_function:
            with pytest.raises(AssertionError, match="__bool__"):
                m.sdpa_mask(3, 13, 13, **asked)


# -- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("make", [m for m in ALL if m is not gpt_oss], ids=lambda m: m.__name__)
def test_every_model_on_a_gpu(make):  # rounding sends some of gpt_oss's tokens to other experts
    model = made(make, "cuda", torch.float16)
    inputs = {k: v.cuda().half() if v.is_floating_point() else v.cuda() for k, v in inputs_of(model).items()}
    ours = run(model, "fcore", **inputs)
    exact = run(made(make), "eager", **inputs_of(model))
    theirs = run(model, "eager", **inputs)
    assert (ours.cpu() - exact).abs().max() <= 2 * (theirs.cpu() - exact).abs().max() + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["padding", "position_bias", "s_aux", "softcap", "sliding_window"])
def test_each_option_on_a_gpu(option):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 75, 64), (2, 2, 75, 64), (2, 2, 75, 64))
    q, k, v = (torch.randn(shape, generator=generator).half() for shape in shapes)
    more = {
        "padding": {}, "position_bias": {"position_bias": torch.randn(1, 4, 75, 75, generator=generator)},
        "s_aux": {"s_aux": torch.randn(4, generator=generator)}, "softcap": {"softcap": 2.0},
        "sliding_window": {"sliding_window": 9},
    }[option]  # fmt: skip
    mask = None
    if option == "padding":
        mask = fcore.make_mask(2, 75, 75, attention_mask=torch.arange(75)[None] < torch.tensor([[75], [40]]))
    exact, _ = fcore.attend(Layer(True), *(t.double() for t in (q, k, v)), mask, **more)
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    got, _ = fcore.attend(Layer(True), *(t.cuda() for t in (q, k, v)), None if mask is None else mask.cuda(), **moved)
    torch.testing.assert_close(got.double().cpu(), exact, atol=3e-3, rtol=3e-3)


def watched(function):
    """The function, raising where it waits for the GPU; the model around it may."""

    def call(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.mark.gpu
@pytest.mark.parametrize("make", [bert, *DECODERS, vit], ids=lambda m: m.__name__)
def test_no_synchronisation(make, request):
    model = made(make, "cuda", torch.float16)
    inputs = {k: v.cuda().half() if v.is_floating_point() else v.cuda() for k, v in inputs_of(model).items()}
    if "input_ids" in inputs:
        inputs["attention_mask"] = padded(side="left").cuda()
    run(model, "fcore", **inputs)
    request.addfinalizer(fcore.register)
    transformers.AttentionInterface.register("fcore", watched(fcore.attend))
    transformers.AttentionMaskInterface.register("fcore", watched(fcore.make_mask))
    assert torch.isfinite(run(model, "fcore", **inputs)).all()


@pytest.mark.gpu
def test_a_padded_encoder_in_a_cuda_graph():
    model = made(bert, "cuda", torch.float16)
    ids, mask = tokens().cuda(), padded().cuda()
    run(model, "fcore", input_ids=ids, attention_mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(model, "fcore", input_ids=ids, attention_mask=mask)
    mask.copy_(padded().flip(0))
    ids.copy_(tokens(seed=3))
    graph.replay()
    torch.testing.assert_close(out, run(model, "fcore", input_ids=ids, attention_mask=mask))
