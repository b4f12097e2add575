"""The attention problems that are measured, and their inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

SEED = 42
FEATURES = ("causal", "window", "softcap", "gqa", "bias", "padded", "packed")  # what a peer may be unable to serve


@dataclass(frozen=True, slots=True)
class Shape:
    """Self-attention of q [batch, heads, seqlen, head_dim] and k, v [batch, heads_kv, seqlen, head_dim].

    Raises:
        ValueError: options that contradict each other.
    """

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "float16"
    heads_kv: int = 0  # 0 = as many as heads
    window: tuple[int, int] = (-1, -1)  # keys before and after the diagonal that a row sees; -1 = unbounded
    softcap: float = 0.0  # scores -> softcap * tanh(scores / softcap); 0 = off
    bias: int = 0  # batch size of an additive bias [bias, heads, seqlen, seqlen]: 1 or batch; 0 = none
    # "padded": of each sequence the first `sequence_lengths` keys count; peers_text.told says how each one hears it.
    # "packed": sequences of those lengths one after the other, [total, heads, head_dim], without padding.
    lengths: str = ""

    def __post_init__(self) -> None:
        left, right = self.window  # JSON made it a list
        object.__setattr__(self, "window", (left, right))
        if self.is_causal and self.window != (-1, -1):
            raise ValueError(f"window: a causal window is (left, 0) without is_causal, got {self.window} with it")
        if self.bias not in (0, 1, self.batch):
            raise ValueError(f"bias: expected 0, 1 or the batch {self.batch}, got {self.bias}")
        if self.lengths not in ("", "padded", "packed"):
            raise ValueError(f"lengths: expected '', 'padded' or 'packed', got {self.lengths!r}")
        if self.lengths == "padded" and (self.is_causal or self.window != (-1, -1)):
            raise ValueError("lengths: libraries differ in where the diagonal of a padded sequence ends")
        if self.lengths and self.bias:
            raise ValueError("bias: no peer adds one to sequences of different lengths")

    @property
    def kv_heads(self) -> int:
        return self.heads_kv or self.heads

    @property
    def label(self) -> str:
        """As tables name it: "S128 B8", and what differs from H=8, D=64, fp16, full."""
        left, right = self.window
        unusual = [
            f"H{self.heads}" if self.heads != 8 else "",
            f"KV{self.kv_heads}" if self.kv_heads != self.heads else "",
            f"D{self.head_dim}" if self.head_dim != 64 else "",
            "causal" if self.is_causal else "",
            f"window{left},{right}" if self.window != (-1, -1) else "",
            f"softcap{self.softcap:g}" if self.softcap else "",
            f"bias{self.bias}" if self.bias else "",
            self.lengths,
            self.dtype if self.dtype != "float16" else "",
        ]
        return " ".join([f"S{self.seqlen}", f"B{self.batch}", *filter(None, unusual)])

    @property
    def features(self) -> frozenset[str]:
        """Which of FEATURES this problem asks for."""
        used = (
            self.is_causal, self.window != (-1, -1), self.softcap != 0, self.kv_heads != self.heads, self.bias != 0,
            self.lengths == "padded", self.lengths == "packed",
        )  # fmt: skip
        return frozenset(name for name, is_used in zip(FEATURES, used, strict=True) if is_used)

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of each sequence: seqlen, or drawn uniformly from seqlen / 4 .. seqlen where lengths differ."""
        if not self.lengths:
            return [self.seqlen] * self.batch
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randint(-(-self.seqlen // 4), self.seqlen + 1, (self.batch,), generator=generator)
        return [int(length) for length in drawn]

    @property
    def scores(self) -> int:
        """Scores of one head of all sequences that the problem asks for; masked ones and padding are not counted."""
        return sum(self._scores(length) * count for length, count in Counter(self.sequence_lengths).items())

    def _scores(self, length: int) -> int:
        left = length if self.window[0] < 0 else self.window[0]
        right = 0 if self.is_causal else length if self.window[1] < 0 else self.window[1]
        return sum(min(length - 1, i + right) - max(0, i - left) + 1 for i in range(length))

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products on `scores`."""
        return 4.0 * self.heads * self.scores * self.head_dim

    @property
    def input_bytes(self) -> int:
        """q, k, v and the bias together."""
        row = (self.heads + 2 * self.kv_heads) * self.head_dim
        bias = self.bias * self.heads * self.seqlen**2
        return (self._rows * row + bias) * self.torch_dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return self._rows * self.heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def _rows(self) -> int:
        return sum(self.sequence_lengths) if self.lengths == "packed" else self.batch * self.seqlen

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "window": list(self.window)}

    def inputs(self, device: str = "cuda", seed: int = SEED) -> tuple[Tensor, ...]:
        """Independent, normally distributed q, k and v, and the bias where there is one; all contiguous.

        The same for the same seed on the same device, and without numbers on "meta". Packed sequences come padded too:
        `pack` makes of them what a packed call reads.
        """
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(self.torch_dtype)

        heads = (self.heads, self.kv_heads, self.kv_heads)
        sizes = [(self.batch, h, self.seqlen, self.head_dim) for h in heads]
        if self.bias:
            sizes.append((self.bias, self.heads, self.seqlen, self.seqlen))
        return tuple(draw(*size) for size in sizes)

    # -- sequences of different lengths -----------------------------------------------------------------------

    def seqused_k(self, device: torch.device) -> Tensor:
        """int32 [batch]: the keys in use of each sequence."""
        return torch.tensor(self.sequence_lengths, dtype=torch.int32, device=device)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """int32 [batch + 1]: where each packed sequence begins, and where the last one ends."""
        starts = torch.tensor([0, *self.sequence_lengths]).cumsum(0)
        return starts.to(device, torch.int32)

    def in_use(self, device: torch.device) -> Tensor:
        """bool [batch, seqlen]: which positions hold a token."""
        return torch.arange(self.seqlen, device=device) < self.seqused_k(device)[:, None]

    def pack(self, t: Tensor) -> Tensor:
        """[batch, heads, seqlen, head_dim] -> its tokens one after the other, contiguous [total, heads, head_dim]."""
        return t.transpose(1, 2)[self.in_use(t.device)]

    def unpack(self, t: Tensor) -> Tensor:
        """[total, heads, head_dim] -> [batch, heads, seqlen, head_dim], 0 in the padding."""
        padded = t.new_zeros(self.batch, self.seqlen, *t.shape[1:])
        padded[self.in_use(t.device)] = t
        return padded.transpose(1, 2)

    def gate(self, device: torch.device) -> dict[str, Any]:
        """What the error gates and the reference have to know of this problem beside q, k, v and the bias."""
        found: dict[str, Any] = {"is_causal": self.is_causal, "window": self.window, "softcap": self.softcap}
        if self.lengths == "padded":
            found["seqused_k"] = self.seqused_k(device)
        if self.lengths == "packed":  # the rows of padding attend to nothing: 0, as `unpack` has them
            used = self.in_use(device)
            found["attn_mask"] = used[:, None, :, None] & used[:, None, None, :]
        return found


def _grid(
    batches: Sequence[int], seqlens: Sequence[int], head_dims: Sequence[int] = (64,), **options: Any
) -> list[Shape]:
    return [Shape(b, 8, s, d, **options) for d in head_dims for s in seqlens for b in batches]


NINE = _grid((8, 16, 32), (128, 256, 512))

_LONG = (512, 1024, 2048, 4096, 8192, 16384)
_UNEVEN = [Shape(32, 12, s, 64) for s in (256, 512)]
_ODD = (197, 257, 577)  # a vision transformer's patches and its class token

SUITES: dict[str, list[Shape]] = {
    "nine": NINE,
    "mid": _grid((32,), (1024, 2048)),
    "short": _grid((32,), (16, 32, 49, 64, 77, 100, 128, 197, 256, 300, 512, 577, 777, 1024)),
    "causal": _grid((8, 32), (128, 512, 1024, 2048), is_causal=True),
    "b1": _grid((1,), (128, 512, 1024)),
    "dims": _grid((32,), (128, 256, 512, 1024), head_dims=(32, 96, 128)),
    # ESM-2's and AlphaFold 3's, Stable Diffusion's, SigLIP's and DiT's, ViT-g's, ViT-bigG's
    "odd-dims": [Shape(32, 16, s, d) for d in (24, 40, 72, 88, 104) for s in (257, 512, 1024)],
    # 16k tokens in all, and 2048 columns of heads, as flash-attention's own tables
    "long": [
        Shape(16384 // s, 2048 // d, s, d, is_causal) for d in (64, 128) for is_causal in (False, True) for s in _LONG
    ],
    "gqa": [Shape(8, 32, s, 128, True, "bfloat16", 8) for s in (128, 512, 2048)],
    # to both sides, as encoders have it, and backwards, as language models
    "window": [Shape(8, 8, s, 64, window=w) for w in ((128, 128), (128, 0)) for s in (128, 512, 2048)],
    "bias": [Shape(32, 8, s, d, bias=n) for d in (32, 64) for n in (1, 32) for s in (128, 256, 512)],
    # Gemma's, causal
    "softcap": [Shape(8, 8, s, 64, True, softcap=50.0) for s in (128, 512, 2048)],
    # each beside the same batch without lengths: what a call costs that pays for the padding
    "padded": [*(replace(full, lengths="padded") for full in _UNEVEN), *_UNEVEN],
    "varlen": [replace(full, lengths="packed") for full in _UNEVEN],
    # each beside the next multiple of 64
    "odd": [Shape(32, 12, s, 64) for odd in _ODD for s in (odd, -(-odd // 64) * 64)],
}
