"""Parts of attention over some keys: joined through lse, and their gradients from the whole row's lse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashcore import attention
from flashcore.integrations.distributed import partial
from flashcore.integrations.distributed.rows import Rows


def tensors(dtype: torch.dtype = torch.float64, heads: int = 4, rows: int = 7, keys: int = 12) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, heads, rows, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_merge_is_attention_of_all_keys(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    want, want_lse = attention(q.double(), k.double(), v.double(), return_lse=True)
    out, lse = attention(q, k[:, :, :5], v[:, :, :5], return_lse=True)
    out = out.to(partial.precision_of(dtype))
    for keys in (slice(5, 6), slice(6, 12)):
        partial.merge_(out, lse, *attention(q, k[:, :, keys], v[:, :, keys], return_lse=True))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    assert (out - want).abs().max() < tolerance
    assert (lse - want_lse).abs().max() < max(tolerance / 100, 1e-6 if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    """Results in 16 bits are joined in fp32 and rounded at the end, in place or into another tensor."""
    out, lse, part, part_lse = results(dtype)
    exact, exact_lse = out.double(), lse.double()
    partial.merge_(exact, exact_lse, part.double(), part_lse.double())
    sums, sums_lse = torch.empty_like(out, dtype=torch.float32), lse.clone()
    partial.merge_(out, sums_lse, part, part_lse, into=sums)
    assert (sums - exact).abs().max() < 1e-6
    partial.merge_(out, lse, part, part_lse)
    assert torch.equal(out, sums.to(dtype)) and torch.equal(lse, sums_lse)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-6)


def results(dtype: torch.dtype, rows: int = 37, dim: int = 16, device: str = "cpu") -> list[Tensor]:
    """out, lse and as much over other keys; some rows saw nothing in one of them, or in both."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for blind in (slice(2, 6), slice(4, 8)):
        lse = 5 * torch.randn(2, 3, rows, generator=generator)
        out = torch.randn(2, 3, rows, dim, generator=generator)
        lse[:, :, blind], out[:, :, blind] = -torch.inf, 0.0
        found += [out.to(device, dtype), lse.to(device)]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "dim"), [(1000, 64), (333, 72), (517, 128), (64, 12)])
def test_the_kernel_merges_as_torch_does(
    dtype: torch.dtype, rows: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashcore.launch import merge

    out, lse, part, part_lse = results(dtype, rows, dim, "cuda")
    part_lse[0, 0, 9], lse[0, 1, 9], part[0, 0, 10, 0], out[0, 1, 10, 1] = torch.nan, torch.nan, torch.nan, torch.nan
    for sums in (None, torch.float32, dtype):
        for some in (slice(None), slice(7, rows - 3)):
            found = []
            for by_kernel in (True, False):
                monkeypatch.setattr(merge, "serves", lambda *_, by_kernel=by_kernel: by_kernel)
                into = out.clone() if sums is None else torch.full_like(out, 7.0, dtype=sums)
                whole_lse = lse.clone()
                before = into if sums is None else out
                partial.merge_(
                    before[:, :, some], whole_lse[:, :, some], part[:, :, some], part_lse[:, :, some],
                    into=into[:, :, some],
                )  # fmt: skip
                found += [into, whole_lse]
            tolerance = {"rtol": torch.finfo(into.dtype).eps, "atol": 2e-6, "equal_nan": True}
            torch.testing.assert_close(found[0], found[2], **tolerance)
            torch.testing.assert_close(found[1], found[3], rtol=1e-6, atol=2e-6, equal_nan=True)


def test_merge_of_rows_that_saw_nothing() -> None:
    inf = torch.inf
    lse = torch.tensor([[[-inf, -inf, 1.0, 1.0, 1e4, -1e4]]])
    part_lse = torch.tensor([[[-inf, 2.0, -inf, 1.0, -1e4, 1e4]]])
    out = torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0, 3.0]).view(1, 1, 6, 1)
    part = torch.tensor([0.0, 5.0, 0.0, 5.0, 5.0, 5.0]).view(1, 1, 6, 1)
    partial.merge_(out, lse, part, part_lse)
    assert out.flatten().tolist() == [0.0, 5.0, 3.0, 4.0, 3.0, 5.0]
    torch.testing.assert_close(lse[0, 0], torch.tensor([-inf, 2.0, 1.0, 1.0 + torch.tensor(2.0).log(), 1e4, 1e4]))


def test_merge_does_not_hide_nan() -> None:
    out, lse = torch.tensor([[[[torch.nan], [1.0]]]]), torch.tensor([[[torch.nan, 0.0]]])
    partial.merge_(out, lse, torch.ones(1, 1, 2, 1), torch.tensor([[[0.0, torch.nan]]]))
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("tile", [1, 50, 2**24])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_parts_add_up(tile: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "_TILE_SCORES", tile)
    q, k, v = (t.requires_grad_() for t in tensors(rows=12))
    out, lse = attention(q, k, v, is_causal=is_causal, return_lse=True)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad([out, lse], (q, k, v), [grad_out, grad_lse])
    q, k, v, out, lse = (t.detach() for t in (q, k, v, out, lse))
    delta = partial.correction(grad_out, out, grad_lse)
    found = [torch.zeros_like(t) for t in (q, k, v)]
    # rows, keys, and whether the diagonal is in the block
    blocks = [(slice(0, 5), slice(0, 5), True), (slice(5, 12), slice(5, 12), True), (slice(5, 12), slice(0, 5), False)]
    if not is_causal:
        blocks = [(slice(0, 12), slice(0, 5), False), (slice(0, 12), slice(5, 12), False)]
    for rows, keys, diagonal in blocks:
        grads = partial.gradients(
            grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows],
            delta[:, :, rows], is_causal=diagonal, scale=8**-0.5,
        )
        for into, at, grad in zip(found, (rows, keys, keys), grads, strict=True):
            into[:, :, at] += grad
    for got, expected in zip(found, want, strict=True):
        assert (got - expected).abs().max() < 1e-12


def test_gradients_of_rows_that_saw_nothing_are_zero() -> None:
    q, k, v = tensors()
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    delta = partial.correction(torch.ones_like(q), out, None)
    grads = partial.gradients(torch.ones_like(q), q, k, v, out, lse, delta, is_causal=False, scale=1.0)
    assert all(not grad.any() for grad in grads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads_q", "heads_kv", "dim"), [(4, 4, 64), (8, 2, 128), (4, 4, 40)])
def test_gradients_by_kernel(dtype: torch.dtype, is_causal: bool, heads_q: int, heads_kv: int, dim: int) -> None:
    """torch's kernel and the tiles agree on a part of the keys, with the output and lse of all of them."""
    torch.manual_seed(0)
    shapes = [(2, heads_q, 256, dim), (2, heads_kv, 512, dim), (2, heads_kv, 512, dim), (2, heads_q, 256, dim)]
    q, k, v, grad_out = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    out, lse = (t.to(d) for t, d in zip(
        attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), return_lse=True), (dtype, torch.float32),
        strict=True,
    ))  # fmt: skip
    out, lse = out.cuda(), lse.cuda()
    assert partial.by_kernel(q, v, None) and not partial.by_kernel(q, v, lse)
    part = [t[:, :, 256:] for t in (k, v)]
    options = {"is_causal": is_causal, "scale": dim**-0.5}
    found = partial.gradients(grad_out, q, *part, out, lse, None, **options)
    delta = partial.correction(grad_out, out, None)
    want = partial.gradients(
        *(t.double() for t in (grad_out, q, *part, out, lse, delta)), **options
    )
    for got, expected in zip(found, want, strict=True):
        assert got.shape == expected.shape
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (2e-3 if dtype == torch.float16 else 1.6e-2), error


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_rows(ranks: int) -> None:
    for seqlen in range(2 * ranks, 6 * ranks):
        rows = Rows(seqlen, ranks)
        whole = torch.arange(seqlen)
        parts = [rows.take(whole, rank, 0) for rank in range(ranks)]
        assert [len(p) for p in parts] == [rows.of(rank) for rank in range(ranks)]
        assert rows.most == max(map(len, parts)) <= min(map(len, parts)) + 1
        assert all((p.diff() > 0).all() for p in parts)
        assert torch.equal(rows.join(parts, 0), whole)
