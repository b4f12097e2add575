"""One attention problem, described completely and without a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Strides = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask over the scores [B, Hq, Sq, Sk]: bool (True = attend) or numbers added to the scaled scores."""

    dtype: torch.dtype
    strides: tuple[int, int, int, int]  # elements, in the order of the scores; 0 = the dimension is broadcast
    aligned: bool = True  # its base address is a multiple of 16 bytes


@dataclass(frozen=True, slots=True)
class Problem:
    """Shapes, strides and options of one call of attention.

    Sizes follow flash-attention's names. Strides are in elements and always in the order
    (batch, head, row) whatever the layout of the caller's tensors; the last dimension is
    contiguous. A size-1 dimension and a broadcast one may have any stride, 0 included.

    Packed sequences: batch counts them, seqlen_q and seqlen_k are the longest there may be, the batch strides are 0
    and sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1]. Lengths on the device are no part of a problem.
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
    window: tuple[int, int] = (-1, -1)  # keys before and after the diagonal that a row sees; -1 = unbounded
    softcap: float = 0.0  # scores -> softcap * tanh(scores / softcap), before a mask is added; 0 = off
    mask: Mask | None = None
    seqused_k: bool = False  # an int32 [B] on the device says how many keys of each sequence there are
    packed: tuple[int, int] | None = None  # rows of q and of k in all, where sequences are packed

    @property
    def ragged(self) -> bool:
        """Whether a sequence's number of keys is known on the device only."""
        return self.seqused_k or self.packed is not None

    @property
    def options(self) -> tuple[str, ...]:
        """The options in use beyond is_causal and return_lse, by the names of `attention`'s parameters."""
        used = {
            "window": self.window != (-1, -1), "softcap": self.softcap != 0, "attn_mask": self.mask is not None,
            "seqused_k": self.seqused_k, "cu_seqlens": self.packed is not None,
        }  # fmt: skip
        return tuple(name for name, is_used in used.items() if is_used)

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right): row i sees keys i + Sk - Sq - left .. i + Sk - Sq + right; None = unbounded."""
        left, right = (None if side < 0 else side for side in self.window)
        return left, 0 if self.is_causal else right

    @property
    def group(self) -> int:
        """Query heads that share one key/value head (1 = MHA)."""
        return self.heads_q // self.heads_kv

    @property
    def aligned_rows(self) -> bool:
        """Whether every row of every tensor starts at a multiple of 16 bytes."""
        strides = (*self.stride_q, *self.stride_k, *self.stride_v, *self.stride_o)
        return self.aligned and all(s * self.dtype.itemsize % 16 == 0 for s in strides)

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products, counting only scores that lengths known here allow."""
        left, right = self.bounds
        scores = self.seqlen_q * self.seqlen_k
        if left is not None or right is not None:
            diagonal = torch.arange(self.seqlen_q) + self.seqlen_k - self.seqlen_q
            first = torch.zeros_like(diagonal) if left is None else (diagonal - left).clamp(min=0)
            last = torch.full_like(diagonal, self.seqlen_k - 1)
            if right is not None:
                last = torch.minimum(last, diagonal + right)
            scores = int((last - first + 1).clamp(min=0).sum())
        return 2.0 * self.batch * self.heads_q * scores * (self.head_dim + self.head_dim_v)
