"""The attention problems that are measured, and their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

SEED = 42


@dataclass(frozen=True, slots=True)
class Shape:
    """Self-attention of q [batch, heads, seqlen, head_dim] and k, v [batch, heads_kv, seqlen, head_dim]."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "float16"
    heads_kv: int = 0  # 0 = as many as heads

    @property
    def kv_heads(self) -> int:
        return self.heads_kv or self.heads

    @property
    def label(self) -> str:
        """As tables name it: "S128 B8", and what differs from H=8, D=64, fp16, full."""
        unusual = [
            f"H{self.heads}" if self.heads != 8 else "",
            f"KV{self.kv_heads}" if self.kv_heads != self.heads else "",
            f"D{self.head_dim}" if self.head_dim != 64 else "",
            "causal" if self.is_causal else "",
            self.dtype if self.dtype != "float16" else "",
        ]
        return " ".join([f"S{self.seqlen}", f"B{self.batch}", *filter(None, unusual)])

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products, masked scores not counted."""
        scores = self.seqlen * (self.seqlen + 1) // 2 if self.is_causal else self.seqlen**2
        return 4.0 * self.batch * self.heads * scores * self.head_dim

    @property
    def input_bytes(self) -> int:
        """q, k and v together."""
        rows = self.batch * self.seqlen * (self.heads + 2 * self.kv_heads)
        return rows * self.head_dim * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def inputs(self, device: str = "cuda", seed: int = SEED) -> tuple[Tensor, Tensor, Tensor]:
        """Independent, normally distributed q, k and v, contiguous; the same for the same seed on the same device."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads: int) -> Tensor:
            size = (self.batch, heads, self.seqlen, self.head_dim)
            return torch.randn(size, generator=generator, device=device).to(self.torch_dtype)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)


def _grid(
    batches: Sequence[int], seqlens: Sequence[int], head_dims: Sequence[int] = (64,), is_causal: bool = False
) -> list[Shape]:
    return [Shape(b, 8, s, d, is_causal) for d in head_dims for s in seqlens for b in batches]


NINE = _grid((8, 16, 32), (128, 256, 512))

_LONG = (512, 1024, 2048, 4096, 8192, 16384)

SUITES: dict[str, list[Shape]] = {
    "nine": NINE,
    "mid": _grid((32,), (1024, 2048)),
    "causal": _grid((8, 32), (128, 512, 1024, 2048), is_causal=True),
    "b1": _grid((1,), (128, 512, 1024)),
    "dims": _grid((32,), (128, 256, 512, 1024), head_dims=(32, 96, 128)),
    # 16k tokens in all, and 2048 columns of heads, as flash-attention's own tables
    "long": [
        Shape(16384 // s, 2048 // d, s, d, is_causal) for d in (64, 128) for is_causal in (False, True) for s in _LONG
    ],
}
