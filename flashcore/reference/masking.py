"""Which key a query row may read: causal, window, lengths and masks as one question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Masking:
    """Every option that hides keys, for one problem.

    Row i of a sequence with `length` keys sees key j when j < length and
    i + length - seqlen_q - left <= j <= i + length - seqlen_q + right: the last row is aligned with the last key,
    as in flash-attn 2.1 and later; with `seqused_k` the last key is the last one in use, as in flash-attn 3.
    """

    seqlen_q: int
    seqlen_k: int
    left: int | None  # keys before the diagonal that a row still sees, None = all
    right: int | None  # keys after the diagonal that a row still sees, None = all
    lengths: Tensor | None  # int64 [B], already within 0 .. seqlen_k
    mask: Tensor | None  # bool or float, expanded to [B, Hkv, group, Sq, Sk] without a copy
    device: torch.device

    @staticmethod
    def of(
        q: Tensor, k: Tensor, is_causal: bool, window: tuple[int, int], attn_mask: Tensor | None,
        seqused_k: Tensor | None,
    ) -> Masking:
        """Read the options of `flashcore.reference.attention`."""
        batch, heads_q, seqlen_q, _ = q.shape
        heads_kv, seqlen_k = k.shape[1], k.shape[2]
        most = seqlen_q + seqlen_k  # hides nothing; larger ones may not fit a tensor
        left, right = (None if side < 0 else min(side, most) for side in window)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.device).expand(batch, heads_q, seqlen_q, seqlen_k)
            attn_mask = attn_mask.unflatten(1, (heads_kv, heads_q // heads_kv))
        if seqused_k is not None:
            seqused_k = seqused_k.to(q.device, torch.int64).clamp(0, seqlen_k)
        return Masking(seqlen_q, seqlen_k, left, 0 if is_causal else right, seqused_k, attn_mask, q.device)

    def bias(self, batch: slice, heads: slice, rows: slice) -> Tensor | None:
        """What an additive mask adds to the scores of this block, broadcastable to [b, h, group, rows, Sk]."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return None
        return self.mask[batch, heads, :, rows]

    def visible(self, batch: slice, heads: slice, rows: slice) -> Tensor | None:
        """Whether each row reads each key: bool, broadcastable to [b, h, group, rows, Sk]; None = all of them."""
        j = torch.arange(self.seqlen_k, device=self.device)
        i = torch.arange(self.seqlen_q, device=self.device)[rows, None]
        diagonal = i + self._length(batch) - self.seqlen_q
        parts = []
        if self.lengths is not None:
            parts.append(j < self._length(batch))
        if self.left is not None:
            parts.append(j >= diagonal - self.left)
        if self.right is not None:
            parts.append(j <= diagonal + self.right)
        if self.mask is not None:
            block = self.mask[batch, heads, :, rows]
            parts.append(block if block.dtype == torch.bool else block != -torch.inf)
        return _all(parts)

    def in_use(self, batch: slice) -> Tensor | None:
        """Whether each key is one of its sequence's: bool, broadcastable to [b, h, group, 1, Sk]; None = all are."""
        if self.lengths is None:
            return None
        return torch.arange(self.seqlen_k, device=self.device) < self._length(batch)

    def _length(self, batch: slice) -> Tensor | int:
        return self.seqlen_k if self.lengths is None else self.lengths[batch].view(-1, 1, 1, 1, 1)


def _all(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    both = parts[0]
    for part in parts[1:]:
        both = both & part
    return both
