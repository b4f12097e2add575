"""Each adapter against a stand-in for its package: that package's entry and layout, computing on the CPU."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.benchmark import contest
from flashcore.benchmark.peers import ALL, PEERS, Peer, flash_attn, flex, sdpa
from flashcore.benchmark.shapes import FEATURES, Shape
from flashcore.reference import oracle

FEATURED = [
    Shape(2, 4, 24, 16, bias=1),
    Shape(2, 4, 24, 16, bias=2, is_causal=True),
    Shape(3, 4, 48, 16, lengths="padded"),
    Shape(3, 4, 48, 16, lengths="packed"),
    Shape(3, 4, 48, 16, lengths="packed", is_causal=True, heads_kv=2),
    Shape(2, 4, 49, 16, window=(8, 4)),
    Shape(2, 4, 49, 16, window=(8, 0)),
    Shape(2, 4, 24, 16, softcap=2.0),
]
SHAPES = [Shape(2, 4, 24, 16), Shape(2, 4, 24, 16, is_causal=True), Shape(2, 4, 24, 16, heads_kv=2)]


def bshd_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    assert all(t.is_contiguous() for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    made = ModuleType(name)
    for attribute, value in contents.items():
        setattr(made, attribute, value)
    monkeypatch.setitem(sys.modules, name, made)


def admitted(peer: Peer, shape: Shape) -> contest.Admission:
    return contest.admit(peer, shape, shape.inputs("cpu"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@pytest.mark.parametrize(("name", "package"), [("fa2", "flash_attn"), ("fa3", "flash_attn_interface"),
                                               ("fa4", "flash_attn.cute")])  # fmt: skip
def test_flash_attn(name: str, package: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Any:
        out = bshd_attention(q, k, v, causal)
        return (out, None) if name == "fa4" else out

    module(monkeypatch, "flash_attn")
    module(monkeypatch, package, flash_attn_func=flash_attn_func)
    assert admitted(PEERS[name], shape).status == "ok"


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "flash_attn")
    found = admitted(PEERS["fa2"], SHAPES[0])
    assert found.status == "missing" and "pip install flash-attn" in found.reason


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_flashinfer(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str) -> None:
            assert layout == "NHD" and workspace.dtype == torch.uint8

        def plan(self, q_starts: Tensor, k_starts: Tensor, heads: int, kv_heads: int, head_dim: int, *, causal: bool,
                 q_data_type: torch.dtype, window_left: int, logits_soft_cap: float | None) -> None:  # fmt: skip
            assert window_left == -1 and logits_soft_cap is None
            assert q_starts.tolist() == k_starts.tolist() == [0, 24, 48]
            assert (heads, kv_heads, head_dim) == (shape.heads, shape.kv_heads, shape.head_dim)
            self.causal = causal

        def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.unflatten(0, (2, 24)) for t in (q, k, v))
            return bshd_attention(q, k, v, self.causal).flatten(0, 1)

    module(monkeypatch, "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=Wrapper)
    assert admitted(PEERS["flashinfer"], shape).status == "ok"


@pytest.mark.parametrize(("shape", "status"), list(zip(SHAPES, ["ok", "ok", "refused"], strict=True)))
def test_xformers(shape: Shape, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        return bshd_attention(q, k, v, isinstance(attn_bias, LowerTriangularMask))

    contents = {"memory_efficient_attention": memory_efficient_attention, "LowerTriangularMask": LowerTriangularMask}
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", **contents)
    assert admitted(PEERS["xformers"], shape).status == status


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "flashcore"])
def test_those_that_run_on_a_cpu(name: str, shape: Shape) -> None:
    assert admitted(ALL[name], shape).status == "ok"


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, **options: Any) -> Tensor:
    """Each packed sequence by itself, through the reference."""
    assert all(t.is_contiguous() for t in (q, k, v)) and starts.dtype == torch.int32
    parts = []
    for a, b in itertools.pairwise(starts.tolist()):
        one = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        parts.append(oracle.cpu(*one, **options)[0].transpose(0, 1))  # type: ignore[misc]
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", FEATURED, ids=lambda shape: shape.label)
@pytest.mark.parametrize("name", ["flashcore", "sdpa", "sdpa-math", "flex"])
def test_features_on_a_cpu(name: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex._compiled.cache_clear()
    refused = name.startswith("sdpa") and shape.features & {"packed", "softcap"}
    found = admitted(ALL[name], shape)
    assert found.status == ("refused" if refused else "ok"), found.reason


def test_masks_of_padded_batches() -> None:
    shape = Shape(3, 4, 48, 16, lengths="padded")
    q, k, v = shape.inputs("cpu")
    plain, square = (sdpa._mask(shape, q.device, None, square) for square in (False, True))
    assert plain is not None and plain.shape == (3, 1, 1, 48)
    assert square is not None and square.shape == (3, 1, 48, 48) and square.is_contiguous()
    assert torch.equal(square, plain.expand_as(square)) and square.dtype == torch.bool
    assert admitted(Peer("square", "square", sdpa._with(None, square=True)), shape).status == "ok"
    for name in ("sdpa-cudnn", "sdpa-efficient"):
        assert PEERS[name].enters(shape) and PEERS[name].enters(SHAPES[0])
        assert PEERS[f"{name}-square"].enters(shape) and not PEERS[f"{name}-square"].enters(SHAPES[0])


class Cute(ModuleType):
    """As much of CuTe's language as a score_mod takes, on numbers: what is loaded is the last one stored."""

    def jit(self, function: Any) -> Any:
        return function

    def make_rmem_tensor(self, size: int, kind: Any) -> Any:
        assert size == 1 and kind == torch.float16
        return Register()


class Register:
    def __setitem__(self, at: int, value: Tensor) -> None:
        self.value = value

    def load(self) -> Register:
        return self

    def to(self, kind: type) -> Any:
        return kind(self.value)


class Aux:
    """An aux tensor: four indices give a number."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.element_type = tensor, tensor.dtype

    def __getitem__(self, at: tuple[int, int, int, int]) -> Tensor:
        return self.tensor[at]


@pytest.mark.parametrize("shape", FEATURED, ids=lambda shape: shape.label)
@pytest.mark.parametrize(("name", "package"), [("fa2", "flash_attn"), ("fa4", "flash_attn.cute")])
def test_flash_attns_features(name: str, package: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "cutlass", Float32=float)
    monkeypatch.setitem(sys.modules, "cutlass.cute", Cute("cutlass.cute"))
    flash_attn._adding.cache_clear()

    def window(sides: tuple[int | None, int | None]) -> tuple[int, int]:
        assert (None in sides) <= (name == "fa4") and (-1 in sides) <= (name == "fa2")
        left, right = (-1 if side is None else side for side in sides)
        return left, right

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: Any = (-1, -1) if name == "fa2" else (None, None),
        softcap: float = 0.0, score_mod: Any = None, aux_tensors: Any = None,
    ) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        bias = None if score_mod is None else torch.zeros(*q.shape[:3], k.shape[2])
        for at in () if bias is None else itertools.product(*map(range, bias.shape)):
            indices = dict(zip(("b_idx", "h_idx", "q_idx", "kv_idx"), ([i] for i in at), strict=True))
            bias[at] = score_mod(0.0, **indices, seqlen_info=None, aux_tensors=[Aux(t) for t in aux_tensors])
        out = oracle.cpu(q, k, v, is_causal=causal, window=window(window_size), softcap=softcap, attn_mask=bias)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: int = 0,
        max_seqlen_k: int = 0, seqused_k: Any = None, causal: bool = False,
    ) -> tuple[Tensor, None]:
        if seqused_k is not None:
            assert cu_seqlens_q is cu_seqlens_k is None and seqused_k.dtype == torch.int32
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = oracle.cpu(q, k, v, is_causal=causal, seqused_k=seqused_k)
            assert isinstance(out, Tensor)
            return out.transpose(1, 2), None
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == max(shape.sequence_lengths)
        return packed_attention(q, k, v, cu_seqlens_q, is_causal=causal), None

    module(monkeypatch, "flash_attn")
    module(monkeypatch, package, flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    found = admitted(PEERS[name], shape)
    refused = name == "fa2" and shape.features & {"bias", "padded"}
    assert found.status == ("refused" if refused else "ok"), found.reason


def test_flash_attn_4_takes_a_bias_or_a_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "flash_attn")
    module(monkeypatch, "flash_attn.cute", flash_attn_func=lambda *_, **__: None)
    found = admitted(PEERS["fa4"], Shape(2, 4, 24, 16, bias=1, softcap=2.0))
    assert found.status == "refused" and "one score_mod" in found.reason


@pytest.mark.parametrize("shape", [*SHAPES, *FEATURED], ids=lambda shape: shape.label)
@pytest.mark.parametrize("release", ["2.10", "2.11", "2.13"])
def test_varlen(release: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
              is_causal: bool = False) -> Tensor:  # fmt: skip
        assert max_q == max_k == max(shape.sequence_lengths)
        return packed_attention(q, k, v, cu_seq_q, is_causal=is_causal)

    def second(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
               window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
        return packed_attention(q, k, v, cu_seq_q, window=window_size)

    def third(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
              window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
              seqused_k: Tensor | None = None) -> Tensor:  # fmt: skip
        assert enable_gqa == (shape.kv_heads != shape.heads)
        if seqused_k is None:
            return packed_attention(q, k, v, cu_seq_q, window=window_size)
        assert cu_seq_q.tolist() == list(range(0, len(q) + 1, shape.seqlen)) and max_q == max_k == shape.seqlen
        padded = (t.unflatten(0, (shape.batch, shape.seqlen)).transpose(1, 2) for t in (q, k, v))
        out = oracle.cpu(*padded, seqused_k=seqused_k)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(0, 1)

    package = pytest.importorskip("torch.nn.attention.varlen", reason="came with torch 2.10")
    monkeypatch.setattr(package, "varlen_attn", {"2.10": first, "2.11": second, "2.13": third}[release])
    lacks = {"2.10": {"padded", "window"}, "2.11": {"padded"}, "2.13": set()}[release]
    refused = shape.features & {"bias", "softcap", *lacks}
    found = admitted(PEERS["varlen"], shape)
    assert found.status == ("refused" if refused else "ok"), found.reason


@pytest.mark.parametrize("name", list(PEERS))
def test_a_refusal_names_its_features(name: str) -> None:
    assert set(PEERS[name].refuses) <= set(FEATURES)
    reasons = {part for reason in PEERS[name].refuses.values() for part in reason.split("; ")}
    for shape in FEATURED:
        if shape.features & set(PEERS[name].refuses):
            found = admitted(PEERS[name], shape)
            assert found.status == "refused" and set(found.reason.split("; ")) <= reasons


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "flashinfer", "xformers"])
def test_what_is_not_installed_is_named_with_its_install_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "flashinfer", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, package, None)
    found = admitted(PEERS[name], Shape(1, 2, 40, 16))
    assert found.status == "missing" and "pip install" in found.reason


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # what other libraries warn of
@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("shape", [Shape(2, 8, 128, 64), Shape(2, 8, 256, 64, is_causal=True)], ids=lambda s: s.label)
def test_on_a_gpu(name: str, shape: Shape) -> None:
    found = contest.admit(ALL[name], shape, shape.inputs())
    if found.status in ("missing", "refused"):
        pytest.skip(found.reason)
    assert found.status == "ok", found.reason
    assert found.memory_bytes is not None and found.memory_bytes >= shape.output_bytes


SERVES = {  # who has to serve what, where it is installed
    "bias": {"flashcore", "sdpa", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex", "fa4"},
    "padded": {"flashcore", "sdpa", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex", "fa4", "sdpa-cudnn-square",
               "sdpa-efficient-square"},
    "packed": {"flashcore", "varlen", "flex", "fa2", "fa3", "fa4", "flashinfer"},
    "window": {"flashcore", "sdpa", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex", "varlen", "fa2", "fa3", "fa4"},
}


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 8, 128, 64, bias=1), Shape(4, 12, 256, 64, lengths="padded"), Shape(4, 12, 256, 64, lengths="packed"),
     Shape(2, 8, 256, 64, window=(128, 0))],
    ids=lambda s: s.label,
)  # fmt: skip
def test_features_on_a_gpu(name: str, shape: Shape) -> None:
    found = contest.admit(ALL[name], shape, shape.inputs())
    (feature,) = shape.features
    if found.status == "missing":
        pytest.skip(found.reason)
    if name in SERVES[feature]:
        assert found.status == "ok", found.reason
    assert found.status in ("ok", "refused"), found.reason
