"""Layouts whose offsets pass 2^31 elements: what a kernel that counts in 32 bits reads or writes in the wrong place.

One allocation of 7 GB holds one far tensor at a time, of which only the elements in use are ever written; two tests
take tensors of 2^31 elements themselves, 20 GB in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention
from flashcore.fast.varlen import attention_varlen
from flashcore.testing import Shape, check, make

REACH = 2**31
SHAPE = Shape(2, 4, 70, 64, heads_kv=4, seqlen_k=70)
AXES = {"batch": 0, "head": 1, "row": 2}


def far(t: Tensor, axis: int, memory: Tensor, reach: int = REACH) -> Tensor:
    """A copy of `t` in `memory` in which the last index of `axis` lies `reach` elements or more behind the first."""
    strides = list(t.contiguous().stride())
    strides[axis] = _stride(t, axis, reach)
    inner = 1
    for other in sorted((a for a in range(t.dim()) if a != axis), reverse=True):
        strides[other] = inner
        inner *= t.shape[other]
    assert inner <= strides[axis], "the other dimensions fit between two of these"
    return memory.as_strided(t.shape, strides).copy_(t)


def _stride(t: Tensor, axis: int, reach: int) -> int:
    """The smallest multiple of 64 elements with which the last index is far enough; TMA wants multiples of 8."""
    return -(-reach // ((t.shape[axis] - 1) * 64)) * 64


@pytest.mark.parametrize("axis", AXES)
def test_a_far_copy_is_the_same_tensor(axis: str) -> None:
    t = torch.randn(SHAPE.q, generator=torch.Generator().manual_seed(0))
    got = far(t, AXES[axis], torch.empty(2**22), reach=2**20)
    assert torch.equal(got, t)
    assert (t.shape[AXES[axis]] - 1) * got.stride(AXES[axis]) >= 2**20
    assert got.stride(3) == 1 and all(s % 8 == 0 for s in got.stride()[:3])


def test_what_the_far_copies_need_fits() -> None:
    for axis in AXES.values():
        for shape in (SHAPE.q, (2, 4, 70, 72)):
            t = torch.empty(shape, device="meta")
            assert (t.shape[axis] - 1) * _stride(t, axis, REACH) + t.numel() < MEMORY


MEMORY = REACH + REACH // 2  # elements


@pytest.fixture(scope="module")
def memory() -> Iterator[Tensor]:
    made = torch.empty(MEMORY, dtype=torch.float16, device="cuda")
    yield made
    del made
    torch.cuda.empty_cache()


def served(backend: str, call: Any) -> Any:
    try:
        return call()
    except UnsupportedError as refusal:
        pytest.skip(f"{backend}: {refusal}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["portable", "hopper"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_one_far_tensor(name: str, axis: str, backend: str, memory: Tensor) -> None:
    tensors: dict[str, Any] = dict(zip("qkv", make("independent", SHAPE, device="cuda", seed=1), strict=True))
    want = served(backend, lambda: attention(**tensors, backend=backend, block_m=64, block_n=64))
    nan = torch.full(SHAPE.q, float("nan"), dtype=torch.float16, device="cuda")
    given = {**tensors, name: far(tensors.get(name, nan), AXES[axis], memory)}
    got = served(backend, lambda: attention(**given, backend=backend, block_m=64, block_n=64))
    assert torch.equal(got, want)
    verdict = check(got.contiguous(), *tensors.values())
    assert verdict.passed, verdict.failures


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["portable", "hopper"])
@pytest.mark.parametrize("axis", AXES)
def test_a_far_mask(axis: str, backend: str, memory: Tensor) -> None:
    shape = Shape(2, 4, 70, 64, seqlen_k=72)
    q, k, v = make("independent", shape, device="cuda", seed=2)
    bias = torch.randn(2, 4, 70, 72, device="cuda").half()
    want = served(backend, lambda: attention(q, k, v, attn_mask=bias, backend=backend))
    got = served(backend, lambda: attention(q, k, v, attn_mask=far(bias, AXES[axis], memory), backend=backend))
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["portable", "hopper"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_packed_rows_far_apart(name: str, backend: str, memory: Tensor) -> None:
    made = make("independent", Shape(1, 2, 70, 64), device="cuda", seed=3)
    tensors: dict[str, Any] = {n: t[0].transpose(0, 1) for n, t in zip("qkv", made, strict=True)}
    bounds = torch.tensor([0, 30, 70], dtype=torch.int32, device="cuda")
    rest: dict[str, Any] = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 40, "max_seqlen_k": 40}
    want = served(backend, lambda: attention_varlen(**tensors, **rest, backend=backend))
    given = {**tensors, name: far(tensors[name], 0, memory)}
    got = served(backend, lambda: attention_varlen(**given, **rest, backend=backend))
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["portable", "hopper"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_tensors_of_more_than_2_31_elements(layout: str, backend: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    torch.cuda.empty_cache()
    shape = (520, 64, 1024, 64) if layout == "bhsd" else (520, 1024, 64, 64)
    assert REACH < 520 * 64 * 1024 * 64
    try:
        q, k, v = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(3))
        out = served(backend, lambda: attention(q, k, v, layout=layout, backend=backend))
        last = [t[-1:] if layout == "bhsd" else t[-1:].transpose(1, 2) for t in (out, q, k, v)]
        verdict = check(*last)
        assert verdict.passed, verdict.failures
        first = [t[:1] if layout == "bhsd" else t[:1].transpose(1, 2) for t in (out, q, k, v)]
        assert check(*first).passed
    finally:
        q = k = v = out = last = first = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
