"""What attention() promises, on every route that computes it: values, shapes of any kind, edges, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashcore.testing import FAMILIES, LAYOUTS, Guarded, Inputs, Shape, lay_out, make

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SMALL = {"block_m": 64, "block_n": 32}  # several tiles from few rows; every head dimension and GPU has this one


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_inputs(route: Any, family: str, dtype: torch.dtype, is_causal: bool) -> None:
    inputs = make(family, Shape(1, 2, 70, 32, heads_kv=1, seqlen_k=75), dtype, seed=len(family))
    route.checked(*inputs, is_causal=is_causal, **SMALL)


@pytest.mark.parametrize("rows", range(1, 66))
def test_every_remainder_of_a_tile(route: Any, rows: int) -> None:
    inputs = make("independent", Shape(1, 1, rows, 16, seqlen_k=1 + 7 * rows % 65), seed=rows)
    route.checked(*inputs, is_causal=rows % 2 == 0, **SMALL)


@pytest.mark.parametrize("dim", [8, 16, 24, 40, 64, 72, 80, 96, 128, 136, 192, 248, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions(route: Any, dim: int, dtype: torch.dtype) -> None:
    several_tiles = {} if dtype == torch.float32 else {"block_n": 32}  # fp32 has them by itself
    route.checked(*make("independent", Shape(1, 1, 19, dim, seqlen_k=45), dtype, seed=dim), **several_tiles)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(5, 9), (9, 5), (1, 64), (64, 1), (33, 97), (130, 33), (40, 40), (65, 64), (2, 70)]
)
def test_causal_rows_end_at_the_last_key(route: Any, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = make("independent", Shape(1, 2, seqlen_q, 16, heads_kv=1, seqlen_k=seqlen_k))
    out, lse = route.checked(q, k, v, is_causal=True, **SMALL)
    blind = max(0, seqlen_q - seqlen_k)
    assert (out[:, :, :blind] == 0).all() and (lse[:, :, :blind] == -math.inf).all()
    if seqlen_k <= seqlen_q:  # the first row that reads anything reads the first key alone
        assert torch.equal(out[:, :, blind].cpu(), v[:, [0, 0], 0])
    last, _ = route.checked(q[:, :, -1:], k, v, **SMALL)  # and the last one reads them all
    torch.testing.assert_close(out[:, :, -1:], last, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(4, 1), (6, 3), (6, 2), (3, 3)])
def test_query_heads_share_key_heads_in_order(route: Any, heads_q: int, heads_kv: int) -> None:
    route.checked(*make("independent", Shape(2, heads_q, 20, 16, heads_kv=heads_kv, seqlen_k=24)))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 1e-3, 3, 1e-30])
def test_scale(route: Any, scale: float) -> None:
    inputs = make("independent", Shape(1, 1, 33, 16, seqlen_k=40))
    route.checked(*inputs, scale=scale, **SMALL)
    route.checked(*inputs, scale=scale, is_causal=True, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_that_have_the_lowest_bias_alone(route: Any, dtype: torch.dtype) -> None:
    """Their weights are 1, exactly: near it, all would be rounded the same way, and the sum of them would not."""
    mask = torch.zeros(33, 72, dtype=dtype)
    mask[::2] = mask[:, 1::3] = torch.finfo(dtype).min
    q, k, v = make("independent", Shape(1, 2, 33, 64, seqlen_k=72), dtype)
    route.checked(q, k, v, attn_mask=mask, scale=1e-30)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [Shape(0, 2, 4, 16), Shape(2, 2, 0, 16, seqlen_k=4), Shape(2, 2, 4, 16, seqlen_k=0), Shape(0, 2, 0, 16)],
    ids=["no batch", "no rows", "no keys", "nothing"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sizes(route: Any, shape: Shape, is_causal: bool, dtype: torch.dtype) -> None:
    inputs = make("independent", shape, dtype)
    out, lse = route.checked(*inputs, is_causal=is_causal)
    assert out.shape == shape.q and lse.shape == shape.q[:3]
    assert (out == 0).all() and (lse == -math.inf).all()
    guarded = Guarded(shape.q, dtype, route.device)
    route(*inputs, is_causal=is_causal, out=guarded.out)
    assert (guarded.out == 0).all() and guarded.intact()


def test_lse_only_when_asked_for(route: Any) -> None:
    inputs = make("independent", Shape(1, 2, 20, 16, heads_kv=1, seqlen_k=40))
    out, lse = route.checked(*inputs, **SMALL)
    alone = route(*inputs, **SMALL)
    assert isinstance(alone, Tensor) and torch.equal(alone, out)
    q, k, _ = (t.double() for t in inputs)
    want = (q @ k.mT * 16**-0.5).logsumexp(-1)  # natural logarithm, of scaled scores
    torch.testing.assert_close(lse.double().cpu(), want, rtol=1e-5, atol=1e-5)


# -- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(route: Any, layout: str) -> None:
    inputs = make("independent", Shape(2, 2, 35, 24, seqlen_k=40), seed=5)
    laid_out = Inputs(*(lay_out(t, layout) for t in inputs))
    out, lse = route.checked(*laid_out, **SMALL)
    plain, plain_lse = route.checked(*(t.contiguous() for t in laid_out), **SMALL)
    if route.is_kernel:
        assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


@pytest.mark.parametrize("mixed", [("packed", "offset", "head_broadcast"), ("contiguous", "bshd", "row_broadcast")])
def test_each_input_has_its_own_layout(route: Any, mixed: tuple[str, str, str]) -> None:
    inputs = make("independent", Shape(2, 4, 20, 16, heads_kv=2, seqlen_k=40), seed=6)
    route.checked(*(lay_out(t, layout) for t, layout in zip(inputs, mixed, strict=True)), is_causal=True)


def test_bshd_is_the_same_attention(route: Any) -> None:
    inputs = make("independent", Shape(2, 4, 35, 16, heads_kv=2, seqlen_k=20), seed=7)
    want, want_lse = route.checked(*inputs, is_causal=True, **SMALL)
    swapped = [t.transpose(1, 2).contiguous() for t in inputs]
    out, lse = route.checked(*swapped, is_causal=True, layout="bshd", **SMALL)
    assert out.shape == (2, 35, 4, 16) and out.is_contiguous()
    assert torch.equal(out.transpose(1, 2), want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("layout", ["contiguous", "bshd", "padded"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", [24, 32])
def test_out_is_written_wholly_and_nothing_beside_it(route: Any, layout: str, is_causal: bool, dim: int) -> None:
    q, k, v = make("independent", Shape(2, 2, 70, dim, heads_kv=1, seqlen_k=33))
    guarded = Guarded(tuple(q.shape), q.dtype, route.device, layout)
    given = guarded.out
    got, _ = route.checked(q, k, v, out=given, is_causal=is_causal, **SMALL)
    assert got is given and guarded.intact() and not given.isnan().any()
    assert torch.equal(got, route(q, k, v, is_causal=is_causal, **SMALL))


def test_inputs_stay_as_they_are(route: Any) -> None:
    inputs = [route.place(t) for t in make("independent", Shape(1, 2, 20, 16))]
    before = [t.clone() for t in inputs]
    route(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_nothing_around_an_input_is_used(route: Any) -> None:
    """The memory beside each row, head and batch is NaN ("sliced"): also for rows and keys that end within a tile."""
    for is_causal in (False, True):
        inputs = make("independent", Shape(2, 2, 70, 40, heads_kv=1, seqlen_k=47), seed=8)
        route.checked(*(lay_out(t, "sliced") for t in inputs), is_causal=is_causal, **SMALL)


# -- the same bits ----------------------------------------------------------------------------------------------


def test_a_sequence_does_not_depend_on_its_neighbours(route: Any) -> None:
    if not route.is_kernel:
        pytest.skip("claimed of kernels: a CPU's matrix product may split a batch as it likes")
    q, k, v = make("outliers", Shape(3, 2, 70, 16, heads_kv=1, seqlen_k=40))
    out, lse = route(q, k, v, return_lse=True, **SMALL)
    for b in range(3):
        alone, alone_lse = route(q[b : b + 1], k[b : b + 1], v[b : b + 1], return_lse=True, **SMALL)
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])
    again, again_lse = route(q, k, v, return_lse=True, **SMALL)
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


# -- the whole space --------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, dict[str, Any], str]:
    heads_kv = draw(st.integers(1, 2))
    shape = Shape(
        batch=draw(st.integers(1, 2)), heads_q=heads_kv * draw(st.integers(1, 2)), heads_kv=heads_kv,
        seqlen_q=draw(st.integers(1, 70)), seqlen_k=draw(st.integers(0, 100)), head_dim=8 * draw(st.integers(1, 16)),
    )
    dtype = draw(st.sampled_from(DTYPES))
    inputs = make(draw(st.sampled_from(list(FAMILIES))), shape, dtype, seed=draw(st.integers(0, 2**31)))
    if shape.seqlen_k:
        inputs = Inputs(*(lay_out(t, draw(st.sampled_from(list(LAYOUTS)))) for t in inputs))
    options = {
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, None, 0.5, -0.2])),
        "block_m": draw(st.sampled_from([None, 16 if dtype == torch.float32 else 64])),
    }
    return inputs, options, draw(st.sampled_from(["none", "contiguous", "bshd", "padded"]))


def test_any_call(route: Any) -> None:
    @given(calls())
    @settings(max_examples=route.examples(80))
    def holds(call: tuple[Inputs, dict[str, Any], str]) -> None:
        inputs, options, into = call
        if into == "none":
            route.checked(*inputs, **options)
            return
        guarded = Guarded(tuple(inputs.q.shape), inputs.q.dtype, route.device, into)
        route.checked(*inputs, out=guarded.out, **options)
        assert guarded.intact()

    holds()
