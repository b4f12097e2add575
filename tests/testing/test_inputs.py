"""The makers give what their names say, on every shape, and the guards and layouts are what kernels need to fear."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.reference import attention
from flashcore.testing import FAMILIES, LAYOUTS, Guarded, Inputs, Shape, lay_out, make, poison_padding
from flashcore.testing.inputs import fetch, intact, place

SHAPES = [Shape(1, 1, 1, 8), Shape(2, 4, 33, 16, heads_kv=2, seqlen_k=50), Shape(1, 6, 40, 64, heads_kv=1, seqlen_k=7)]
ODD = [Shape(0, 2, 4, 8), Shape(2, 2, 0, 8, seqlen_k=3), Shape(2, 2, 3, 8, seqlen_k=0), Shape(1, 2, 3, 8, head_dim_v=4)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + ODD, ids=str)
def test_every_family_serves_every_shape(family: str, dtype: torch.dtype, shape: Shape) -> None:
    inputs = make(family, shape, dtype, seed=1)
    assert tuple(t.shape for t in inputs) == (shape.q, shape.k, shape.v)
    again = make(family, shape, dtype, seed=1)
    for name, t, same in zip("qkv", inputs, again, strict=True):
        assert t.dtype == dtype and t.is_contiguous()
        assert torch.equal(t.nan_to_num(), same.nan_to_num())
        bad = (~t.isfinite()).any(-1).sum()
        assert bad == (family.endswith(f"_{name}") and t.numel() > 0)


def logits(inputs: Inputs) -> torch.Tensor:
    q, k, _ = (t.double() for t in inputs)
    return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * q.shape[-1] ** -0.5


@pytest.mark.parametrize(("family", "low", "high"), [("large_logits", 5e3, 2e4), ("huge_logits", 5e6, 2e7)])
def test_logits_are_as_large_as_promised(family: str, low: float, high: float) -> None:
    assert low < logits(make(family, Shape(1, 2, 64, 64))).std() < high


def test_the_edge_of_fp16() -> None:
    for seed in range(4):
        inputs = make("overflow_edge", Shape(1, 2, 64, 64), seed=seed)
        assert inputs.v.abs().max() > 5e4
        assert max(inputs.q.abs().max(), inputs.k.abs().max()) > 5e4
        assert logits(inputs).abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subnormal_values(dtype: torch.dtype) -> None:
    q, k, v = make("subnormal", Shape(1, 2, 64, 64), dtype)
    tiny = torch.finfo(dtype).tiny
    assert (v.float().abs() <= tiny).all() and (v != 0).float().mean() > 0.9
    assert (q[:, :, ::2].float().abs() <= 2 * tiny).all() and (q[:, :, 1::2].float().abs() > tiny).all()


def test_one_hot_rows_take_one_value() -> None:
    q, k, v = make("one_hot", Shape(2, 4, 50, 64, heads_kv=2))
    out = attention(q, k, v)
    distance = (out[:, :, :, None] - v.double().repeat_interleave(2, 1)[:, :, None]).abs().amax(-1)
    assert (distance.amin(-1) < 1e-12).all()


def test_sinks_take_nearly_all_the_weight() -> None:
    q, k, v = make("sinks", Shape(1, 2, 50, 64))
    weights = logits(Inputs(q, k, v)).softmax(-1)
    assert weights[..., 0].median() > 0.7
    assert v[:, :, 0].abs().max() < 0.1


@pytest.mark.parametrize(("family", "sign"), [("rising", 1), ("falling", -1)])
def test_ramps(family: str, sign: int) -> None:
    scores = logits(make(family, Shape(1, 2, 50, 64, seqlen_k=256)))
    tiles = scores.unflatten(-1, (4, 64)).amax(-1)
    assert ((tiles.diff(dim=-1) * sign) > 3).all()


def test_poisoned_padding() -> None:
    inputs = make("independent", Shape(3, 4, 5, 8, heads_kv=2, seqlen_k=7))
    used = torch.tensor([7, 0, 3])
    q, k, v = poison_padding(inputs, used)
    assert torch.equal(q, inputs.q)
    for before, after in ((inputs.k, k), (inputs.v, v)):
        assert before.isfinite().all()
        for b, n in enumerate(used):
            assert torch.equal(after[b, :, :n], before[b, :, :n]) and after[b, :, n:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_a_contiguous_last_dimension(layout: str) -> None:
    t = torch.arange(2 * 3 * 4 * 8, dtype=torch.float16).view(2, 3, 4, 8)
    got = lay_out(t, layout)
    assert got.shape == t.shape and got.stride(-1) == 1
    if layout.endswith("_broadcast"):
        assert 0 in got.stride() and got.untyped_storage().nbytes() == t.untyped_storage().nbytes()
        assert torch.equal(got[0, 0, 0], t[0, 0, 0])
        return
    assert torch.equal(got, t)
    around = torch.as_strided(got, (got.untyped_storage().nbytes() // 2,), (1,), 0).clone()
    assert around.isnan().sum() == around.numel() - t.numel()
    contiguous = ("contiguous", "offset")
    assert got.is_contiguous() == (layout in contiguous)
    assert (got.data_ptr() % 16 == 0) == (layout != "offset")


@pytest.mark.parametrize("layout", ["contiguous", "bshd", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_guards_notice_every_write_beside_the_output(layout: str, dtype: torch.dtype) -> None:
    guarded = Guarded((2, 3, 4, 8), dtype, layout=layout)
    out = guarded.out
    assert out.shape == (2, 3, 4, 8) and out.isnan().all() and guarded.intact()
    assert out.transpose(1, 2).is_contiguous() == (layout == "bshd")
    out.fill_(1.0)
    assert guarded.intact()
    first = out.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
    beside = [first - 1, last + 1, 0, last + guarded.BAND - 8] + ([first + 8, first + 15] if layout == "padded" else [])
    memory = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    for at in beside:
        for value in (math.nan, 0.0):
            before = memory[at].clone()
            memory[at] = value
            assert not guarded.intact()
            memory[at] = before
    assert guarded.intact()


def around(t: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor is a view of."""
    return torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def test_a_copy_of_a_guarded_output_tells_what_was_written_beside_it() -> None:
    out = Guarded((2, 3, 4, 8), torch.float16, layout="padded").out
    copy = around(out).clone().as_strided(out.shape, out.stride(), out.storage_offset())
    assert intact(copy)
    around(copy)[out.storage_offset() + 8] = 0.0  # between two rows
    assert not intact(copy) and intact(out)


def test_what_is_on_the_cpu_stays_as_it_is() -> None:
    t = torch.zeros(3)
    assert place(t, "cpu") is t and fetch(t, t) == [t, t]


@pytest.mark.gpu
def test_there_and_back() -> None:
    """Each with its strides and the memory around it, also where it is changed on the GPU just before."""
    tensors = [lay_out(make("nan_v", Shape(2, 3, 300, 64)).v, layout) for layout in LAYOUTS]
    tensors += [torch.zeros(0, 3), torch.tensor([True, False]), torch.arange(3, dtype=torch.int32)]
    there = [place(t, "cuda") for t in tensors]
    for want, sent, got in zip(tensors, there, fetch(*there), strict=True):
        assert sent.is_cuda and sent.data_ptr() % 16 == want.data_ptr() % 16
        assert got.stride() == sent.stride() == want.stride() and got.storage_offset() == want.storage_offset()
        assert torch.equal(around(got).nan_to_num(7.0), around(want).nan_to_num(7.0))
    for n in range(20):
        x = torch.zeros(1 << 20, device="cuda")
        for _ in range(n):
            x += 1.0
        (last,) = fetch(x)
        assert (last == n).all()
    guarded = Guarded((2, 3, 4, 8), torch.float16, "cuda")
    assert intact(*fetch(guarded.out))
    around(guarded.out)[-1] = 0.0
    assert not intact(*fetch(guarded.out)) and not guarded.intact()
