"""The ring alone, with threads of this process as its ranks: more of them, and on one GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore import attention
from flashcore.integrations.distributed import ring
from flashcore.integrations.distributed.rows import Rows
from flashcore.testing import require

LIMIT_S = 60


class ThreadRing(ring.Ring):
    """Passes copies on through queues; `queues[r]` is what rank r receives."""

    def __init__(self, rank: int, queues: Sequence[Queue[list[Tensor]]]) -> None:
        self.rank, self.size, self.queues = rank, len(queues), queues

    def pass_on(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> list[torch.distributed.Work]:
        assert all(t.is_contiguous() for t in (*send, *receive))
        copies = [t.clone() for t in send]
        self._finish(copies)
        self.queues[(self.rank + 1) % self.size].put(copies)
        for into, arrived in zip(receive, self.queues[self.rank].get(timeout=LIMIT_S), strict=True):
            assert into.shape == arrived.shape and into.dtype == arrived.dtype
            into.copy_(arrived)
        self._finish(receive)
        return []

    @staticmethod
    def _finish(tensors: Sequence[Tensor]) -> None:
        """Whoever reads them next may do so on another stream."""
        if tensors[0].is_cuda:
            torch.cuda.current_stream().synchronize()


def around(ranks: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, is_causal: bool) -> list[Tensor]:
    """out, lse and the gradients of q, k and v."""
    queues: list[Queue[list[Tensor]]] = [Queue() for _ in range(ranks)]
    rows = Rows(q.shape[2], ranks)

    def one(rank: int) -> list[Tensor]:
        call = ring.Call(ThreadRing(rank, queues), rows, is_causal, q.shape[-1] ** -0.5)
        own_q, own_k, own_v, own_grad = (rows.take(t, rank, 2) for t in (q, k, v, grad))
        out, lse, kept = ring.forward(own_q, own_k, own_v, call)
        return [out, lse, *ring.backward(kept, own_grad, None, call)]

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(one, range(ranks), timeout=LIMIT_S))
    return [rows.join(list(parts), 2) for parts in zip(*found, strict=True)]


def tensors(heads_q: int, heads_kv: int, seqlen: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    heads = (heads_q, heads_kv, heads_kv, heads_q)
    return [torch.randn(1, h, seqlen, dim, generator=generator).to(device, dtype) for h in heads]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, is_causal: bool) -> list[Tensor]:
    leaves = [t.double().cpu().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, is_causal=is_causal, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.double().cpu())]


@pytest.mark.parametrize("tile", [1, 3, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("ranks", "seqlen"), [(1, 7), (2, 9), (5, 10), (5, 37), (8, 64)])
def test_any_number_of_ranks(
    ranks: int, seqlen: int, is_causal: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_TILE", tile)
    inputs = tensors(4, 2, seqlen, 8, torch.float64, "cpu")
    for got, want in zip(around(ranks, *inputs, is_causal), exact(*inputs, is_causal), strict=True):
        assert (got - want).abs().max() < 1e-12


class MirrorRing(ring.Ring):
    """The last of several ranks, which receives what it sends."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = size - 1, size

    def pass_on(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> list[torch.distributed.Work]:
        for into, sent in zip(receive, send, strict=True):
            into.copy_(sent)
        return []


@pytest.mark.parametrize("own_calls", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_goes_beside(ranks: int, own_calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first call the transfer, and the last step, which waits for the rest before it joins its part."""
    log: list[str] = []
    monkeypatch.setattr(ring, "_TILE", 1 if own_calls == 3 else 128)

    def logged(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            log.append(name.strip("_"))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    @contextmanager
    def here(self: Any) -> Iterator[None]:
        log.append("beside:")
        yield
        log.append("end")

    for owner, names in ((MirrorRing, "pass_on"), (ring, "attention"), (ring.partial, "merge_"),
                         (ring._Beside, "follow join")):  # fmt: skip
        for name in names.split():
            logged(owner, name)
    monkeypatch.setattr(ring._Beside, "here", here)
    q, k, v, _ = tensors(2, 2, 8, 8, torch.float64, "cpu")
    ring.forward(q, k, v, ring.Call(MirrorRing(ranks), Rows(8 * ranks, ranks), True, 1.0))
    middle = ["pass_on", "attention", "merge"] * (ranks - 2)
    others = [*middle, "beside:", "attention", "follow", "merge", "end"]
    first = ["follow", "attention"]
    own = [*first, "beside:", "pass_on", "end", *["attention"] * (own_calls - 1)]
    assert log == ([*own, *others] if ranks > 1 else first) + ["join"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("ranks", "heads_q", "heads_kv", "seqlen", "dim"),
    [(2, 4, 4, 1024, 64), (4, 8, 2, 1000, 128), (3, 2, 1, 333, 32)],
)
def test_on_one_gpu(
    ranks: int, heads_q: int, heads_kv: int, seqlen: int, dim: int, is_causal: bool, dtype: torch.dtype
) -> None:
    q, k, v, grad = tensors(heads_q, heads_kv, seqlen, dim, dtype, "cuda")
    out, lse, *grads = around(ranks, q, k, v, grad, is_causal)
    require(out, q, k, v, lse=lse, is_causal=is_causal)
    for name, got, want in zip("qkv", grads, exact(q, k, v, grad, is_causal)[2:], strict=True):
        error = (got.double().cpu() - want).norm() / want.norm()
        assert error < (2e-3 if dtype == torch.float16 else 1.6e-2), f"grad_{name}: {error:.3g}"
