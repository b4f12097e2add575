"""Attention over one sequence whose rows are spread over ranks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcore.integrations.distributed import exchange, ring
from flashcore.integrations.distributed.rows import Group, agreed, group_of

_METHODS = {"ring": ring, "all_to_all": exchange}


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    method: str = "ring",
    seqlen: int | None = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q @ k^T) @ v, where every rank holds the rows that `shard` gives it. A collective call.

    Args:
        q: [B, Hq, S_rank, D], this rank's rows; dtypes and devices as for `flashcore.attention`.
        k, v: [B, Hkv, S_rank, D], keys and values of the same rows; Hq is a multiple of Hkv.
        group: the ranks; a process group, a mesh of one dimension, or None for all processes.
        is_causal: rows see the keys up to their own place in the whole sequence.
        scale: factor of the scores, D ** -0.5 when None.
        method: "ring" passes keys and values around, for any number of heads, and hides the transfer behind
            computation. "all_to_all" exchanges rows for heads, of which the ranks must get equally many.
        seqlen: rows of the whole sequence. None: the ranks tell each other, which waits for the GPU in every call.
        return_lse: also return the log-sum-exp of each row of scores.
        layout: "bhsd", or "bshd" where q, k, v and the output are [B, S_rank, H, D].
        backend: as for `flashcore.attention`.

    Returns:
        This rank's rows of the output in q's dtype and layout, or (output, lse fp32 [B, Hq, S_rank]). Differentiable
        once. Each rank joins parts in an order of its own, so that last bits may differ from those of one GPU.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes or options that contradict each other, rows that are not those of `shard`, heads that
            "all_to_all" can't share, or a group without this process. All ranks raise for what all can see;
            for what only one can see, the others wait until the group's timeout.
        UnsupportedError: no kernel serves the problem.

    References:
        "ring": Ring Attention (Liu, Zaharia, Abbeel, 2023). "all_to_all": DeepSpeed Ulysses (Jacobs and others, 2023).
    """
    _check(q, k, v, method, layout)
    device = q.device.type
    if q.dtype == torch.float32 and torch.is_autocast_enabled(device):  # as attention does
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    found = group_of(group)
    way = ring.Ring(found)
    rows = agreed(q.shape[2], seqlen, found, q.device)
    if method == "all_to_all":
        exchange.check_heads(q, k, way.size)
    call = ring.Call(way, rows, is_causal, q.shape[-1] ** -0.5 if scale is None else float(scale), backend)
    with torch.autocast(device, enabled=False):  # the precision of every step is chosen here
        out, lse = _ContextParallel.apply(q, k, v, call, _METHODS[method])  # type: ignore[no-untyped-call]
    if layout == "bshd":
        out = out.transpose(1, 2).contiguous()
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, method: str, layout: str) -> None:
    inputs = (("q", q), ("k", k), ("v", v))
    for name, tensor in inputs:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got {list(tensor.shape)}")
    if method not in _METHODS:
        raise ValueError(f"method: expected {' or '.join(map(repr, _METHODS))}, got {method!r}")
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: expected 'bhsd' or 'bshd', got {layout!r}")
    h, s = (1, 2) if layout == "bhsd" else (2, 1)
    for name, tensor in inputs[1:]:
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(f"{name}: expected {q.dtype} on {q.device}, got {tensor.dtype} on {tensor.device}")
        if (tensor.shape[0], tensor.shape[s]) != (q.shape[0], q.shape[s]):
            raise ValueError(
                f"{name}: expected q's batch and rows, {q.shape[0]} and {q.shape[s]}, got {list(tensor.shape)}"
            )
    if k.shape[h] == 0 or q.shape[h] % k.shape[h] or v.shape[h] != k.shape[h]:
        raise ValueError(
            f"k: expected as many heads as v, of which q's are a multiple, got {q.shape[h]}, {k.shape[h]} and "
            f"{v.shape[h]} in q, k and v"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected q's head dimension, {q.shape[3]}, got {k.shape[3]}")


class _ContextParallel(torch.autograd.Function):
    """A method's two passes as one step of autograd: both are collective, so no rank may leave one out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: ring.Call, way: ModuleType) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.way = call, way
        out, lse, kept = way.forward(q, k, v, call)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None
        q, _, v, *_ = kept = ctx.saved_tensors
        if grad_out is None:
            assert grad_lse is not None
            grad_out = grad_lse.new_zeros(*grad_lse.shape, v.shape[-1], dtype=q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            return (*ctx.way.backward(kept, grad_out, grad_lse, ctx.call), None, None)
