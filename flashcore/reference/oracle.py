"""Attention by its definition, block by block: softmax(scale * q @ k^T + bias) @ v with everything in one precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from flashcore.reference.masking import Masking

# Scores held at a time. A block of them costs about 8 temporaries of this many fp64: 1 GiB.
BLOCK_SCORES = 2**24


@dataclass(frozen=True, slots=True)
class Block:
    """The scores of some batches, heads and query rows, with all that is needed to finish them.

    Shapes put the query heads that share a key/value head in a dimension of their own:
    q [b, h, group, rows, D], k [b, h, Sk, D], v [b, h, Sk, Dv], scores [b, h, group, rows, Sk].
    """

    batch: slice
    heads_q: slice
    heads_kv: slice
    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor  # after scale, softcap and bias; -inf where the row may not read the key
    masking: Masking
    v_is_finite: bool

    @property
    def group(self) -> int:
        return self.q.shape[2]

    def times(self, weights: Tensor, values: Tensor) -> Tensor:
        """weights [b, h, group, rows, Sk] @ values [b, h, Sk, x], cast to the weights' dtype."""
        return _matmul(weights, values.to(weights.dtype))

    def softmax(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised weights [.., rows, Sk], their sums and lse [.., rows, 1]; sums are 1 for rows that read nothing.

        The weights of a row are relative to its largest score, so each is at most 1.
        """
        # The result doesn't depend on the shift: no gradient goes through it.
        top = self.scores.detach().amax(-1, keepdim=True)
        nothing = top == -torch.inf
        top = top.masked_fill(nothing, 0.0)
        weights = (self.scores - top).exp()
        sums = weights.sum(-1, keepdim=True).masked_fill(nothing, 1.0)
        return weights, sums, (top + sums.log()).masked_fill(nothing, -torch.inf)

    def weigh(self, weights: Tensor) -> Tensor:
        """weights [b, h, group, rows, Sk] @ v, where a key that a row may not read contributes nothing: 0 * NaN is 0.

        A NaN or infinity in a key that the row does read stays, however small its weight.
        """
        if self.v_is_finite:
            return self.times(weights, self.v)
        reads = self.masking.visible(self.batch, self.heads_kv, self.rows)
        reads = torch.ones_like(weights) if reads is None else reads.expand(weights.shape).to(weights.dtype)
        nan = self.times(reads, self.v.isnan()) > 0
        up = self.times(reads, self.v == torch.inf) > 0
        down = self.times(reads, self.v == -torch.inf) > 0
        result = self.times(weights, self.v.nan_to_num(0.0, 0.0, 0.0))
        result = torch.where(up, torch.inf, torch.where(down, -torch.inf, result))
        return torch.where(nan | (up & down), torch.nan, result)


def blocks(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None,
    window: tuple[int, int] = (-1, -1), softcap: float = 0.0, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None, compute_dtype: torch.dtype = torch.float64,
) -> Iterator[Block]:
    """Yield the scores of a problem in blocks of at most about BLOCK_SCORES; arguments as for `attention`."""
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    if 0 in (batch, heads_q, seqlen_q):
        return
    if seqlen_k == 0:  # no keys at all is the same as one key of length 0, which nobody reads
        k, v = k.new_zeros(batch, heads_kv, 1, head_dim), v.new_zeros(batch, heads_kv, 1, v.shape[-1])
        seqlen_k, attn_mask, seqused_k = 1, None, torch.zeros(batch, dtype=torch.int32)
    masking = Masking.of(q, k, is_causal, window, attn_mask, seqused_k)
    scale = float(head_dim**-0.5 if scale is None else scale)  # an int may be too large for a tensor
    group = heads_q // heads_kv

    step_rows = min(seqlen_q, max(1, BLOCK_SCORES // (group * seqlen_k)))
    step_heads = min(heads_kv, max(1, BLOCK_SCORES // (group * seqlen_q * seqlen_k)))
    step_batch = max(1, BLOCK_SCORES // (heads_q * seqlen_q * seqlen_k))
    for bs in _slices(batch, step_batch):
        for hs in _slices(heads_kv, step_heads):
            hq = slice(hs.start * group, hs.stop * group)
            kb, vb = k[bs, hs].to(compute_dtype), v[bs, hs].to(compute_dtype)
            finite = bool(vb.isfinite().all())
            for rows in _slices(seqlen_q, step_rows):
                qb = q[bs, hq, rows].to(compute_dtype).unflatten(1, (-1, group))
                scores = _matmul(qb, kb.mT) * scale
                if softcap > 0:
                    scores = softcap * (scores / softcap).tanh()
                bias = masking.bias(bs, hs, rows)
                if bias is not None:
                    scores = scores + bias.to(compute_dtype)
                visible = masking.visible(bs, hs, rows)
                if visible is not None:
                    scores = scores.masked_fill(~visible, -torch.inf)
                yield Block(bs, hq, hs, rows, qb, kb, vb, scores, masking, finite)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = ..., scale: float | None = ...,
    return_lse: Literal[False] = ..., window: tuple[int, int] = ..., softcap: float = ...,
    attn_mask: Tensor | None = ..., seqused_k: Tensor | None = ..., compute_dtype: torch.dtype = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = ..., scale: float | None = ...,
    return_lse: Literal[True], window: tuple[int, int] = ..., softcap: float = ...,
    attn_mask: Tensor | None = ..., seqused_k: Tensor | None = ..., compute_dtype: torch.dtype = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = ..., scale: float | None = ...,
    return_lse: bool, window: tuple[int, int] = ..., softcap: float = ...,
    attn_mask: Tensor | None = ..., seqused_k: Tensor | None = ..., compute_dtype: torch.dtype = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None,
    return_lse: bool = False, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    attn_mask: Tensor | None = None, seqused_k: Tensor | None = None, compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in `compute_dtype`, by its definition and in blocks that fit memory; differentiable.

    Args:
        q: [B, Hq, Sq, D], any floating dtype, any strides, any device.
        k: [B, Hkv, Sk, D]; Hq is a multiple of Hkv and query head h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Sk, Dv].
        is_causal: row i reads key j only when j <= i + Sk - Sq: the last row is aligned with the last key.
        scale: factor of the scores, D ** -0.5 when None.
        return_lse: also return the natural logarithm of the softmax's denominator.
        window: (left, right): keys before and after the diagonal that a row reads, -1 = all of them.
        softcap: scores -> softcap * tanh(scores / softcap), before any mask; 0 = off.
        attn_mask: broadcastable to [B, Hq, Sq, Sk]; bool (True = attend) or floating (added to the scores).
        seqused_k: integers [B], the keys in use of each sequence, clamped to 0 .. Sk. The diagonal of is_causal
            and window ends at the last key in use.
        compute_dtype: precision of every intermediate and of the result.

    Returns:
        out [B, Hq, Sq, Dv], or (out, lse [B, Hq, Sq]), in compute_dtype. A row that reads no key, or whose scores
        are all -inf, gives 0 and lse -inf. NaN and infinity reach exactly the rows that read them.
    """
    heads_q, dim_v = q.shape[1], v.shape[-1]
    out = q.new_zeros(q.shape[0], heads_q, q.shape[2], dim_v, dtype=compute_dtype)
    lse = q.new_zeros(out.shape[:3], dtype=compute_dtype)
    for block in blocks(
        q, k, v, is_causal=is_causal, scale=scale, window=window, softcap=softcap, attn_mask=attn_mask,
        seqused_k=seqused_k, compute_dtype=compute_dtype,
    ):
        weights, sums, block_lse = block.softmax()
        at = (block.batch, block.heads_q, block.rows)
        out[at] = (block.weigh(weights) / sums).flatten(1, 2)
        lse[at] = block_lse.squeeze(-1).flatten(1, 2)
    return (out, lse) if return_lse else out


def cpu(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None,
    return_lse: bool = False, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    attn_mask: Tensor | None = None, seqused_k: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as CPU tensors get it: `attention` in fp32 (fp64 for fp64 inputs), returned in q's dtype.

    Arguments and conventions as for `attention`; `out` [B, Hq, Sq, Dv] in q's dtype is written and returned when given.
    lse is fp32 (fp64 for fp64 inputs).
    """
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    result, lse = attention(
        q, k, v, is_causal=is_causal, scale=scale, return_lse=True, window=window, softcap=softcap,
        attn_mask=attn_mask, seqused_k=seqused_k, compute_dtype=precision,
    )
    result = result.to(q.dtype) if out is None else out.copy_(result)
    return (result, lse) if return_lse else result


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """[b, h, group, rows, x] @ [b, h, x, y]: the group shares b without a copy of it."""
    product: Tensor = (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])
    return product


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
