"""Attention of some rows over some of their keys: joining such parts, and the gradients of one of them.

Both rest on the log-sum-exp. Parts of one row join with weights exp(lse_part - lse), and the weights of a part's
keys in the whole row are exp(score - lse), so that a part's gradients need the row's output and lse and nothing else
of the other parts (the backward pass of FlashAttention, Dao et al. 2022, over a part of the keys).
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_SCORES = 2**24  # held at a time, in about five temporaries: 320 MiB in fp32
_FLASH_DIM = 192  # torch's backward kernel serves larger heads on some GPUs only


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """What sums over parts are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, into: Tensor | None = None) -> None:
    """Join attention over more keys with `out` and `lse`, in place; computed in fp32, or fp64 for fp64.

    Args:
        out: [B, H, S, D] in any dtype, attention over the keys so far.
        lse: [B, H, S], its log-sum-exp; -inf where a row has seen nothing, whose output is 0.
        part: [B, H, S, D] in any dtype, attention of the same rows over other keys.
        part_lse: [B, H, S], its log-sum-exp.
        into: [B, H, S, D] in any dtype, written instead of `out`.
    """
    into = out if into is None else into
    if out.is_cuda:
        from flashcore.launch import merge  # brings Triton with it

        if merge.serves(out, lse, part, part_lse, into):
            merge.merge_(out, lse, part, part_lse, into)
            return
    behind = (part_lse - lse).masked_fill_(part_lse == -torch.inf, -torch.inf)  # -inf - -inf: nothing to join
    weight = behind.sigmoid().unsqueeze_(-1)
    into.copy_((out * behind.neg_().sigmoid_().unsqueeze_(-1)).addcmul_(part, weight))
    torch.logaddexp(lse, part_lse, out=lse)


def correction(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """sum(grad_out * out) - grad_lse of each row, [B, H, S]: what every weight's gradient is reduced by."""
    precision = precision_of(out.dtype)
    delta = (grad_out.to(precision) * out.to(precision)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse


def gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor | None, *,
    is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What some rows and some of their keys contribute to the gradients of q, k and v.

    Args:
        grad_out, out: [B, Hq, Sq, D], of the rows' attention over all of their keys.
        q: [B, Hq, Sq, D].
        k, v: [B, Hkv, Sk, D], the part's keys and values.
        lse: [B, Hq, Sq], over all keys.
        delta: as `correction` gives it; None where `by_kernel` serves the call.
        is_causal: row i sees keys 0 .. i + Sk - Sq of the part.
        scale: factor of the scores.

    Returns:
        Gradients in the inputs' dtype or in fp32/fp64.
    """
    if delta is None:
        return _by_kernel(grad_out, q, k, v, out, lse, is_causal, scale)
    return _by_tiles(grad_out, q, k, v, lse, delta, is_causal, scale)


def by_kernel(q: Tensor, v: Tensor, grad_lse: Tensor | None) -> bool:
    """Whether torch's own FlashAttention kernel computes these gradients: not those of lse, and 16 bits only."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    dim = q.shape[-1]
    return q.is_cuda and half and grad_lse is None and dim == v.shape[-1] and dim % 8 == 0 and dim <= _FLASH_DIM


def _by_kernel(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (t.contiguous().transpose(1, 2) for t in (grad_out, q, k, v, out))
    random_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: not read
    grads = torch.ops.aten._flash_attention_backward(
        *tensors, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal, random_state,
        torch.empty(0, device=q.device), scale=scale,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (g.transpose(1, 2) for g in grads)
    return grad_q, grad_k, grad_v


def _by_tiles(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    precision = precision_of(q.dtype)
    batch, heads, seqlen_q, _ = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    kh, vh = (t.to(precision).unsqueeze(2) for t in (k, v))  # [B, Hkv, 1, Sk, D]
    grad_q = q.new_empty(q.shape, dtype=precision)
    grad_k, grad_v = (torch.zeros_like(t, dtype=precision) for t in (k, v))
    step = max(1, _TILE_SCORES // max(1, batch * heads * seqlen_k))
    keys = torch.arange(seqlen_k, device=q.device)

    def tile(tensor: Tensor, rows: slice) -> Tensor:  # [B, Hkv, group, rows, ...]
        part: Tensor = tensor[:, :, rows].to(precision).unflatten(1, (heads_kv, -1))
        return part

    for start in range(0, seqlen_q, step):
        rows = slice(start, min(start + step, seqlen_q))
        qt, gt, lt, dt = (tile(t, rows) for t in (q, grad_out, lse, delta))
        scores = (qt @ kh.mT) * scale
        unseen = (lt == -torch.inf).unsqueeze(-1)  # rows that see nothing
        if is_causal:
            last = torch.arange(start, rows.stop, device=q.device) + seqlen_k - seqlen_q
            unseen = unseen | (keys > last[:, None])
        weights = (scores - lt.unsqueeze(-1)).exp().masked_fill(unseen, 0.0)
        grad_scores = weights * (gt @ vh.mT - dt.unsqueeze(-1))
        grad_v += (weights.mT @ gt).sum(2)
        grad_k += (grad_scores.mT @ qt).sum(2) * scale
        grad_q[:, :, rows] = (grad_scores @ kh).flatten(1, 2) * scale
    return grad_q, grad_k, grad_v
