"""Masks, key counts and packed sequences on the fake GPU of conftest.py, by both launch paths."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore import attention_varlen, reference
from flashcore.fast import attention_production, varlen
from flashcore.fast.attention_production import attention
from flashcore.launch import cpu, gradients, launcher, ops, shim
from flashcore.launch.arguments import Options

F16 = torch.float16


def make(*shape: int, dtype: torch.dtype = F16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return make(2, 4, 24, 16, seed=seed), make(2, 2, 40, 16, seed=seed + 1), make(2, 2, 40, 16, seed=seed + 2)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def expect(out: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    assert torch.equal(out.detach(), reference.cpu(q.detach(), k.detach(), v.detach(), **options))


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    memory = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    return memory[1 : 1 + tensor.numel()].view_as(tensor).copy_(tensor)


MASK = make(2, 4, 24, 40, seed=9)
VARIATIONS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "mask": {"attn_mask": MASK},
    "mask of another dtype": {"attn_mask": MASK.float()},
    "mask of bool": {"attn_mask": MASK > 0},
    "mask of rows and keys": {"attn_mask": MASK[0, 0]},
    "mask of keys": {"attn_mask": MASK[0, 0, 0]},
    "mask of one number": {"attn_mask": MASK[0, 0, 0, 0]},
    "mask of a batch": {"attn_mask": MASK[:, :1, :1]},
    "mask of heads": {"attn_mask": MASK[0, :, :, :1]},
    "mask with other strides": {"attn_mask": MASK.mT.contiguous().mT},
    "mask that was expanded": {"attn_mask": MASK[:1, :1].expand(2, 4, 24, 40)},
    "mask off alignment": {"attn_mask": shifted(MASK)},
    "lengths": {"seqused_k": lengths(7, 33)},
    "mask and lengths": {"attn_mask": MASK, "seqused_k": lengths(7, 33)},
    "window": {"window": (5, 3)},
    "causal window": {"window": (5, 3), "is_causal": True},
    "softcap": {"softcap": 3.0},
    "everything": {"attn_mask": MASK, "seqused_k": lengths(20, 40), "window": (9, -1), "softcap": 2.0, "scale": 0.3},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_no_call_is_served_by_the_plan_of_another(gpu, name):
    q, k, v = qkv()
    options = VARIATIONS[name]
    for other in VARIATIONS.values():
        expect(attention(q, k, v, **other), q, k, v, **other)
        expect(attention(q, k, v, **options), q, k, v, **options)
    assert len(gpu.launches) == 2 * len(VARIATIONS)


@pytest.mark.parametrize("extra", ["attn_mask", "seqused_k", "both"])
@pytest.mark.parametrize("into", [False, True])
def test_a_call_seen_before_goes_its_own_path(gpu, monkeypatch, extra, into):
    both = {"attn_mask": MASK, "seqused_k": lengths(7, 33)}
    q, k, v = qkv()
    options = both if extra == "both" else {extra: both[extra]}
    out = {"out": torch.empty_like(q)} if into else {}
    attention(q, k, v, **options, **out)
    unexpected(monkeypatch, attention_production)
    fresh = {name: t.clone() for name, t in options.items()}
    expect(attention(*qkv(seed=10), **fresh, **out), *qkv(seed=10), **fresh)


def unexpected(monkeypatch: Any, module: Any) -> None:
    """Calls that the path they were made for does not serve fail from here on."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the call was looked at again")

    monkeypatch.setattr(module, "_attend", refuse)
    if shim.attend is not None:
        monkeypatch.setattr(module, "recall", refuse)
        if module is attention_production:
            monkeypatch.setattr(module, "find", refuse)


def test_numbers_on_the_device_are_no_part_of_a_plan(gpu):
    q, k, v = qkv()
    mask, used = MASK.clone(), lengths(1, 2)
    for a, b in ((1, 2), (40, 0), (17, 39)):
        used.copy_(lengths(a, b))
        mask.add_(0.5)
        expect(attention(q, k, v, attn_mask=mask, seqused_k=used), q, k, v, attn_mask=mask, seqused_k=used)
    assert len(gpu.bindings) == len(launcher._plans) == 1


def test_the_mask_s_alignment_is_judged_by_itself(gpu):
    q, k, v = qkv()
    for _ in range(2):
        for mask in (MASK, shifted(MASK)):
            for keys in (k, shifted(k)):
                expect(attention(q, keys, v, attn_mask=mask), q, k, v, attn_mask=mask)
    pointers = {(b.args["q"].aligned, b.args["mask"].aligned) for b in gpu.bindings}
    assert len(pointers) == len(gpu.bindings) == 4


@pytest.mark.parametrize(("window", "is_causal"), [((39, -1), False), ((-1, 23), False), ((50, 50), False)])
def test_bounds_that_hide_nothing_are_left_out(gpu, window, is_causal):
    q, k, v = qkv()
    expect(attention(q, k, v, window=window, is_causal=is_causal), q, k, v)
    expect(attention(q, k, v), q, k, v)
    (problem,) = {key[1] for key in launcher._plans}
    assert problem.window == (-1, -1) and not problem.is_causal


def test_equal_bounds_share_a_kernel(gpu):
    q, k, v = qkv()
    for options in ({"is_causal": True}, {"window": (-1, 0)}, {"is_causal": True, "window": (39, 7)}):
        expect(attention(q, k, v, **options), q, k, v, is_causal=True)
        expect(attention(q[:, :, :1], k, v, **options), q[:, :, :1], k, v)  # one row ends at the last key
    assert len(gpu.bindings) == 2


def test_an_out_that_overlaps_the_mask_is_refused(gpu):
    q, k, v = qkv()
    mask = torch.zeros(2, 4, 24, 40, dtype=F16)
    out = mask.view(-1)[: q.numel()].view_as(q)
    attention(q, k, v, attn_mask=mask, out=torch.empty_like(q))
    for _ in range(2):
        with pytest.raises(ValueError, match="out: expected memory apart from attn_mask's"):
            attention(q, k, v, attn_mask=mask, out=out)


@pytest.mark.parametrize("options", [{}, {"seqused_k": lengths(7, 33)}, {"window": (5, 5)}], ids=["", "len", "win"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients(gpu, options, return_lse):
    tensors = [t.requires_grad_() for t in (*qkv(), MASK[0].clone())]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    reference.attention(*doubles[:3], attn_mask=doubles[3], **options).sum().backward()
    for _ in range(3):
        for t in tensors:
            t.grad = None
        result = attention(*tensors[:3], attn_mask=tensors[3], return_lse=return_lse, **options)
        (result[0] if return_lse else result).sum().backward()
        for t, want in zip(tensors, doubles, strict=True):
            torch.testing.assert_close(t.grad.double(), want.grad, rtol=2e-2, atol=4e-3)
    with torch.no_grad():
        assert not attention(*tensors[:3], attn_mask=tensors[3], **options).requires_grad


def test_a_mask_that_requires_grad_is_never_taken_for_one_that_does_not(gpu):
    q, k, v = qkv()
    for _ in range(2):
        assert not attention(q, k, v, attn_mask=MASK).requires_grad
        asked = MASK.clone().requires_grad_()
        assert attention(q, k, v, attn_mask=asked).requires_grad
        with pytest.raises(RuntimeError, match="out: writing into a tensor has no gradient"):
            attention(q, k, v, attn_mask=asked, out=torch.empty_like(q))


@pytest.mark.parametrize("how", [None, "flash"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_call_with_gradients_goes_its_own_path(gpu, monkeypatch, how, return_lse):
    """Where torch's kernel is to compute them, the forward pass has the log-sum-exp written for it."""
    given: list[Any] = []
    monkeypatch.setattr(gradients, "route", lambda *call: how)
    backward = gradients.backward

    def seen(call, how, *rest, **options):
        given.append((how, rest[4], rest[5]))
        return backward(call, None, *rest, **options)

    monkeypatch.setattr(gradients, "backward", seen)
    attention(*(t.requires_grad_() for t in qkv()), return_lse=return_lse)
    if shim.attend is not None:
        unexpected(monkeypatch, attention_production)
        monkeypatch.setattr(attention_production, "recent", {})
    q, k, v = (t.requires_grad_() for t in qkv(seed=10))
    result = attention(q, k, v, return_lse=return_lse)
    out = result[0] if return_lse else result
    assert isinstance(result, tuple) == return_lse and out.grad_fn is not None
    expect(out, q, k, v)
    out.sum().backward()
    ((found, saved, lse),) = given
    assert found == how and (lse is None) == (how is None)
    if how is not None:
        assert torch.equal(saved, out)
        torch.testing.assert_close(lse, reference.cpu(q.detach(), k.detach(), v.detach(), return_lse=True)[1])
    with torch.no_grad():
        again = attention(q, k, v, return_lse=return_lse)
        assert (again[0] if return_lse else again).grad_fn is None


def test_documented_functions_serve_as_well(gpu, documented, monkeypatch):
    monkeypatch.setattr(ops, "apply_function", lambda function: function.apply)
    q, k, v = qkv()
    mask = MASK.clone().requires_grad_()
    for _ in range(2):
        expect(attention(q, k, v, attn_mask=MASK, window=(4, 4)), q, k, v, attn_mask=MASK, window=(4, 4))
        out = attention(q, k, v, attn_mask=mask)
        expect(out, q, k, v, attn_mask=MASK)
        out.sum().backward()
    assert mask.grad is not None


def test_a_torch_whose_function_class_changed_is_served_by_its_documented_apply(monkeypatch):
    from flashcore.launch import torch_private

    apply = torch_private.apply_function(ops.Transformable)
    assert "builtin" in type(apply).__name__  # past the wrapper, which torch has up to 2.13

    class Moved:
        @classmethod
        def apply(cls) -> str:
            return "documented"

    monkeypatch.setattr(torch_private.torch.autograd, "Function", Moved)
    assert torch_private.apply_function(type("Ours", (Moved,), {}))() == "documented"


def test_vmap_over_masks_and_lengths(gpu):
    q, k, v = (torch.stack([t, t * 2]) for t in qkv())
    masks, used = torch.stack([MASK[0, 0], MASK[1, 1]]), torch.stack([lengths(5, 9), lengths(40, 1)])

    def call(q, k, v, mask, used):
        return attention(q, k, v, attn_mask=mask, seqused_k=used)

    for dims in ((0, 0, 0, 0, 0), (0, 0, 0, None, 0), (0, None, None, 0, None), (0, 0, 0, None, None)):
        given = [t if d == 0 else t[0] for t, d in zip((q, k, v, masks, used), dims, strict=True)]
        both = torch.vmap(call, in_dims=dims)(*given)
        for i in range(2):
            one = [t[i] if d == 0 else t for t, d in zip(given, dims, strict=True)]
            expect(both[i], *one[:3], attn_mask=one[3], seqused_k=one[4])
    wide = torch.vmap(lambda q: call(q, k[0], v[0], MASK, None))(q)
    expect(wide[1], q[1], k[0], v[0], attn_mask=MASK)
    grad = torch.func.grad(lambda mask: call(q[0], k[0], v[0], mask, used[0]).sum())(masks[0])
    doubles = [t.double() for t in (q[0], k[0], v[0])]
    mask = masks[0].double().requires_grad_()
    reference.attention(*doubles, attn_mask=mask, seqused_k=used[0]).sum().backward()
    torch.testing.assert_close(grad.double(), mask.grad, rtol=2e-2, atol=4e-3)


def test_the_shim_replaces_its_oldest_calls(gpu):
    if shim.attend is None:
        pytest.skip("the Python path has bounds of its own")
    first = qkv()
    attention(*first)
    for length in range(1, 520):
        attention(*(make(1, 1, length, 8) for _ in range(3)))
    asked = (None, None, False, None, False, "bhsd", None, (-1, -1), 0.0)
    assert shim.attend(*first, None, None, None, *asked) is None
    recent = [make(1, 1, 519, 8, seed=i) for i in range(3)]
    expect(shim.attend(*recent, None, None, None, *asked), *recent)
    expect(attention(*first), *first)


# -- packed sequences -------------------------------------------------------------------------------------------


def packed(rows: tuple[int, ...], keys: tuple[int, ...] | None = None, seed: int = 0) -> tuple[Any, ...]:
    keys = keys or rows
    cu = [torch.tensor([0, *n]).cumsum(0).int() for n in (rows, keys)]
    total_q, total_k = sum(rows), sum(keys)
    tensors = make(total_q, 4, 16, seed=seed), make(total_k, 2, 16, seed=seed + 1), make(total_k, 2, 16, seed=seed + 2)
    return *tensors, *cu, max(rows), max(keys)


def expect_packed(result: Any, call: tuple[Any, ...], **options: Any) -> None:
    want, lse = cpu.packed_reference(*(t.detach() for t in call[:3]), None, *call[3:], Options(**options))
    if isinstance(result, tuple):
        assert torch.equal(result[1], lse)
        result = result[0]
    assert torch.equal(result.detach(), want)


BATCHES = [(5, 9, 2), (5, 9, 3), (4, 4), (16,), (1, 1, 1, 1), (9, 0, 5, 2)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 1), "softcap": 2.0}], ids=str)
def test_packed_sequences_of_ever_other_totals(gpu, options):
    for _ in range(2):
        for i, rows in enumerate(BATCHES):
            call = packed(rows, seed=i)
            expect_packed(attention_varlen(*call, **options), call, **options)
            expect_packed(attention_varlen(*call, return_lse=True, **options), call, **options)
            keys = packed(rows, tuple(n + 3 for n in rows), seed=20 + i)
            out = torch.empty_like(keys[0])
            assert attention_varlen(*keys, out=out, **options) is out
            expect_packed(out, keys, **options)
    assert len(gpu.launches) == 6 * len(BATCHES)


def test_a_changed_total_compiles_nothing(gpu):
    for i, rows in enumerate(BATCHES):
        attention_varlen(*packed(rows, seed=i), block_m=64, block_n=64)
    assert len(gpu.bindings) == 1


def test_only_sizes_are_part_of_a_packed_plan(gpu):
    call = packed((5, 9, 2))
    expect_packed(attention_varlen(*call), call)
    call[3].copy_(lengths(0, 1, 7, 16))
    expect_packed(attention_varlen(*call), call)
    assert len(launcher._plans) == 1


def test_a_packed_call_seen_before_goes_its_own_path(gpu, monkeypatch):
    attention_varlen(*packed((5, 9, 2)))
    attention_varlen(*packed((5, 9, 2)), return_lse=True, is_causal=True)
    unexpected(monkeypatch, varlen)
    call = packed((9, 5, 2), seed=5)
    expect_packed(attention_varlen(*call), call)
    expect_packed(attention_varlen(*call, return_lse=True, is_causal=True), call, is_causal=True)


def test_the_choice_of_a_tile_does_not_depend_on_calls_before(gpu):
    """Plans of close totals share one choice: it is made for rounded sizes, not for the sizes of whoever came first."""
    def chosen() -> list[Any]:
        return [plan.config for plan in launcher._plans.values()]

    batches = [(100, 3), (128, 3), (65, 66), (128, 128)]
    for rows in batches:
        attention_varlen(*packed(rows))
    forward = chosen()
    launcher.forget()
    launcher._select_once.cache_clear()
    for rows in reversed(batches):
        attention_varlen(*packed(rows))
    assert chosen() == forward[::-1]


@pytest.mark.parametrize("how", [None, "flash"])
def test_packed_gradients(gpu, monkeypatch, how):
    backward = gradients.backward
    monkeypatch.setattr(gradients, "route", lambda *call: how)
    monkeypatch.setattr(gradients, "backward", lambda call, how, *rest, **o: backward(call, None, *rest, **o))
    for seed in range(3):
        q, k, v, *rest = packed((5, 9, 2), (7, 3, 9), seed=seed)
        tensors = [t.requires_grad_() for t in (q, k, v)]
        out = attention_varlen(*tensors, *rest, is_causal=True)
        expect_packed(out, (*tensors, *rest), is_causal=True)
        out.sum().backward()
        doubles = [t.detach().double().requires_grad_() for t in tensors]
        attention_varlen(*doubles, *rest, is_causal=True, backend="reference").sum().backward()
        for t, want in zip(tensors, doubles, strict=True):
            torch.testing.assert_close(t.grad.double(), want.grad, rtol=2e-2, atol=4e-3)
        with torch.no_grad():
            assert attention_varlen(*tensors, *rest, is_causal=True).grad_fn is None


def test_nothing_to_do_launches_nothing(gpu):
    q, k, v, cu_q, cu_k, *longest = packed((5, 9, 2))
    for call in (
        (q, k[:0], v[:0], cu_q, torch.zeros_like(cu_k), *longest),
        (q, k, v, cu_q, cu_k, 9, 0),
        (q, k, v, cu_q[:1], cu_k[:1], 9, 9),
        (q[:0], k, v, torch.zeros_like(cu_q), cu_k, *longest),
    ):
        for _ in range(2):
            out, lse = attention_varlen(*call, return_lse=True)
            assert out.shape == call[0].shape and not out.any() and bool((lse == -torch.inf).all())
    assert not gpu.launches


@pytest.mark.parametrize(
    ("cu_seqlens_q", "longest_q", "zeroed"),
    [((0, 2, 5), 3, range(5)), ((1, 2, 4), 0, ()), ((3, 3), 4, ()), ((-4, 2, 99), 2, range(4)), ((2, 6), 2, (2, 3))],
)
def test_without_keys_only_rows_of_a_sequence_are_written(gpu, cu_seqlens_q, longest_q, zeroed):
    q, nothing, out = make(6, 4, 16), make(0, 2, 16), torch.full((6, 4, 16), 7.0, dtype=F16)
    none = lengths(*[0] * len(cu_seqlens_q))
    attention_varlen(q, nothing, nothing, lengths(*cu_seqlens_q), none, longest_q, 0, out=out)
    assert [i for i in range(6) if not out[i].any()] == list(zeroed)
    assert set(out.unique().tolist()) <= {0.0, 7.0}


def test_packed_threads(gpu):
    wrong: list[str] = []

    def work(i: int) -> None:
        try:
            for round in range(10):
                call = packed(BATCHES[(i + round) % len(BATCHES)], seed=100 * i + round)
                expect_packed(attention_varlen(*call), call)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_serves_gradients_goes_with_the_plans(gpu):
    def functions() -> int:
        gpu.allocated.clear()
        gc.collect()
        return sum(function.__name__ == "Attention" for function in torch.autograd.Function.__subclasses__())

    before = functions()
    for length in (8, 16, 24):
        q = make(1, 2, length, 16).requires_grad_()
        for _ in range(2):
            out = attention(q, q, q)
    assert functions() == before + 3
    launcher.forget()
    expect(attention(q, q, q), q, q, q)
    launcher.forget()
    of_out = isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)  # a node in C++ has no Function
    assert functions() == before + of_out
    out.sum().backward()
    assert q.grad is not None and q.grad.any()
    del out
    assert functions() == before
