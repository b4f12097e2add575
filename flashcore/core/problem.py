"""One attention problem, described completely and without a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Strides = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """Shapes, strides and options of one call of attention.

    Sizes follow flash-attention's names. Strides are in elements and always in the order
    (batch, head, row) whatever the layout of the caller's tensors; the last dimension is
    contiguous. A size-1 dimension and a broadcast one may have any stride, 0 included.
    """

    dtype: torch.dtype
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    stride_q: Strides
    stride_k: Strides
    stride_v: Strides
    stride_o: Strides
    aligned: bool = True  # every base address is a multiple of 16 bytes
    is_causal: bool = False
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key/value head (1 = MHA)."""
        return self.heads_q // self.heads_kv

    @property
    def aligned_rows(self) -> bool:
        """Whether every row of every tensor starts at a multiple of 16 bytes (of 8 elements of two bytes)."""
        strides = (*self.stride_q, *self.stride_k, *self.stride_v, *self.stride_o)
        return self.aligned and all(s % 8 == 0 for s in strides)

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products, counting only unmasked scores."""
        if not self.is_causal:
            scores = self.seqlen_q * self.seqlen_k
        else:  # bottom-right: row i sees keys 0 .. i + seqlen_k - seqlen_q
            shift = self.seqlen_k - self.seqlen_q
            first = max(0, -shift)  # rows above see nothing
            rows = self.seqlen_q - first
            scores = rows * (first + shift + 1) + rows * (rows - 1) // 2 if rows > 0 else 0
        return 2.0 * self.batch * self.heads_q * scores * (self.head_dim + self.head_dim_v)
