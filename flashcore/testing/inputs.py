"""Makers of q, k and v: ordinary values, and the ones that break attention kernels; memory layouts; guarded outputs.

Everything is drawn from a seed on the device it is made for, so one device gives the same values every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one problem; what is None equals its neighbour: Hkv = Hq, Sk = Sq, Dv = D."""

    batch: int
    heads_q: int
    seqlen_q: int
    head_dim: int
    heads_kv: int | None = None
    seqlen_k: int | None = None
    head_dim_v: int | None = None

    @property
    def q(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads_q, self.seqlen_q, self.head_dim

    @property
    def k(self) -> tuple[int, int, int, int]:
        heads = self.heads_q if self.heads_kv is None else self.heads_kv
        seqlen = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        return self.batch, heads, seqlen, self.head_dim

    @property
    def v(self) -> tuple[int, int, int, int]:
        return *self.k[:3], self.head_dim if self.head_dim_v is None else self.head_dim_v


class Draw:
    """Random numbers of one seed, and the numbers of the dtype they are going to be rounded to."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def sign(self, *shape: int) -> Tensor:
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def index(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self.generator, device=self.device))


def independent(s: Shape, draw: Draw) -> Inputs:
    """N(0, 1), each on its own."""
    return Inputs(draw.normal(*s.q), draw.normal(*s.k), draw.normal(*s.v))


def shared(s: Shape, draw: Draw) -> Inputs:
    """q = k = v, as far as the shapes allow: every row attends to itself most."""
    size = [max(dims) for dims in zip(s.q, s.k, s.v, strict=True)]
    x = draw.normal(*size)
    q, k, v = (x[:b, :h, :n, :d].clone() for b, h, n, d in (s.q, s.k, s.v))
    return Inputs(q, k, v)


def large_logits(s: Shape, draw: Draw) -> Inputs:
    """Logits of about +-1e4: past the range in which fp16 resolves them, one key takes nearly all."""
    return Inputs(100.0 * draw.normal(*s.q), 100.0 * draw.normal(*s.k), draw.normal(*s.v))


def huge_logits(s: Shape, draw: Draw) -> Inputs:
    """Logits of about +-1e7: past the range of fp16, and one unit in the last place of fp32 is about 1."""
    return Inputs(3e3 * draw.normal(*s.q), 3e3 * draw.normal(*s.k), draw.normal(*s.v))


def equal(s: Shape, draw: Draw) -> Inputs:
    """One value everywhere: all weights are the same, and the result is that value."""
    return Inputs(*(torch.full(shape, 0.7, device=draw.device) for shape in (s.q, s.k, s.v)))


def one_hot(s: Shape, draw: Draw) -> Inputs:
    """Each row matches one random key exactly and is far from the others: weights of 1 and 0."""
    codes = 8.0 * draw.sign(*s.k)
    if 0 in s.k:
        return Inputs(draw.normal(*s.q), codes, draw.normal(*s.v))
    head = torch.arange(s.q[1], device=draw.device) // max(1, s.q[1] // s.k[1])
    key = torch.randint(s.k[2], s.q[:3], generator=draw.generator, device=draw.device)
    batch = torch.arange(s.batch, device=draw.device).view(-1, 1, 1)
    return Inputs(codes[batch, head.view(1, -1, 1), key], codes, draw.normal(*s.v))


def outliers(s: Shape, draw: Draw) -> Inputs:
    """N(0, 1) with N(0, 100) added to one element in a thousand, as activations of language models have them."""
    def mixed(shape: tuple[int, ...]) -> Tensor:
        return draw.normal(*shape) + 10.0 * draw.normal(*shape) * (draw.uniform(*shape) < 1e-3)

    return Inputs(mixed(s.q), mixed(s.k), mixed(s.v))


def sinks(s: Shape, draw: Draw) -> Inputs:
    """The first key takes nearly all the weight of every row and has a small value: what counts are the tiny rest."""
    q, k, v = independent(s, draw)
    direction = draw.sign(s.head_dim)
    q = q + direction
    k[:, :, :1] = 8.0 * direction * s.head_dim**-0.5 + 0.01 * k[:, :, :1]
    v[:, :, :1] *= 0.01
    return Inputs(q, k, v)


def rising(s: Shape, draw: Draw) -> Inputs:
    """Scores that rise from key to key: the running maximum changes in every tile, and all before it fades."""
    return _ramp(s, draw, 1.0)


def falling(s: Shape, draw: Draw) -> Inputs:
    """Scores that fall from key to key: the first tile holds the maximum."""
    return _ramp(s, draw, -1.0)


def overflow_edge(s: Shape, draw: Draw) -> Inputs:
    """v, and q or k, at fp16's end (+-60,000); products q * k and logits of about +-1e6 far beyond it."""
    def edge(top: float, shape: tuple[int, ...]) -> Tensor:
        return top * draw.sign(*shape) * (0.5 + 0.5 * draw.uniform(*shape))

    tops = (6e4, 30.0) if draw.index(2) else (30.0, 6e4)
    return Inputs(edge(tops[0], s.q), edge(tops[1], s.k), edge(6e4, s.v))


def subnormal(s: Shape, draw: Draw) -> Inputs:
    """v wholly, q and k in every other row, of the dtype's subnormal numbers."""
    tiny = torch.finfo(draw.dtype).tiny
    q, k = draw.normal(*s.q), draw.normal(*s.k)
    q[:, :, ::2] *= tiny / 4
    k[:, :, ::2] *= tiny / 4
    return Inputs(q, k, draw.sign(*s.v) * draw.uniform(*s.v) * tiny)


def _ramp(s: Shape, draw: Draw, sign: float) -> Inputs:
    q, k, v = independent(s, draw)
    direction = draw.sign(s.head_dim)
    height = torch.linspace(-1.0, 1.0, s.k[2], device=draw.device).view(-1, 1)
    # scores: +-30 times |q|'s part along `direction`, which is made 1
    return Inputs(0.3 * q + direction, 0.3 * k + sign * 30.0 * height * direction * s.head_dim**-0.5, v)


def _spoiled(name: str, value: float) -> Callable[[Shape, Draw], Inputs]:
    def family(s: Shape, draw: Draw) -> Inputs:
        inputs = independent(s, draw)
        rows = getattr(inputs, name)
        if rows.numel():
            rows[tuple(draw.index(size) for size in rows.shape[:3])] = value
        return inputs

    family.__doc__ = f"N(0, 1) with {value} in all of one random row of {name}."
    return family


FAMILIES: dict[str, Callable[[Shape, Draw], Inputs]] = {
    "independent": independent,
    "shared": shared,
    "large_logits": large_logits,
    "huge_logits": huge_logits,
    "equal": equal,
    "one_hot": one_hot,
    "outliers": outliers,
    "sinks": sinks,
    "rising": rising,
    "falling": falling,
    "overflow_edge": overflow_edge,
    "subnormal": subnormal,
    "nan_q": _spoiled("q", float("nan")),
    "nan_k": _spoiled("k", float("nan")),
    "nan_v": _spoiled("v", float("nan")),
    "inf_q": _spoiled("q", float("inf")),
    "inf_k": _spoiled("k", float("inf")),
    "inf_v": _spoiled("v", float("inf")),
}


def make(
    family: str, shape: Shape, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """q, k and v of a named family (the keys of FAMILIES), contiguous, in `dtype` on `device`."""
    made = FAMILIES[family](shape, Draw(seed, dtype, torch.device(device)))
    return Inputs(*(t.to(dtype) for t in made))


def poison_padding(inputs: Inputs, seqused_k: Tensor) -> Inputs:
    """Copies of k and v that hold NaN from seqused_k [B] on."""
    unused = torch.arange(inputs.k.shape[2], device=seqused_k.device) >= seqused_k.view(-1, 1, 1)
    k, v = (t.masked_fill(unused.unsqueeze(-1).to(t.device), float("nan")) for t in (inputs.k, inputs.v))
    return Inputs(inputs.q, k, v)


# -- memory layouts ---------------------------------------------------------------------------------------------


def _inside(tensor: Tensor, size: list[int], start: list[int]) -> Tensor:
    """A copy of `tensor` within a larger allocation that is NaN everywhere else."""
    view = tensor.new_full(size, float("nan"))[tuple(slice(a, a + n) for a, n in zip(start, tensor.shape, strict=True))]
    return view.copy_(tensor)


def _bshd(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(t: Tensor) -> Tensor:
    """The middle third of a projection [B, S, H, 3 * D], as a fused QKV layer leaves it."""
    b, h, s, d = t.shape
    return _inside(t.transpose(1, 2), [b, s, h, 3 * d], [0, 0, 0, d]).transpose(1, 2)


def _sliced(t: Tensor) -> Tensor:
    b, h, s, d = t.shape
    return _inside(t, [b + 1, h + 2, s + 3, d + 8], [1, 1, 2, 8])


def _odd_rows(t: Tensor) -> Tensor:
    """Rows D + 1 elements apart: no two neighbours are aligned alike."""
    b, h, s, d = t.shape
    return _inside(t, [b, h, s, d + 1], [0, 0, 0, 0])


def _offset(t: Tensor) -> Tensor:
    """Contiguous, one element past an aligned address: aligned for its dtype and nothing more."""
    return t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "bshd": _bshd,
    "packed": _packed,
    "sliced": _sliced,
    "odd_rows": _odd_rows,
    "offset": _offset,
    "batch_broadcast": lambda t: t[:1].expand(t.shape),
    "head_broadcast": lambda t: t[:, :1].expand(t.shape),
    "row_broadcast": lambda t: t[:, :, :1].expand(t.shape),
}


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` [B, H, S, D] in a named memory layout (the keys of LAYOUTS), its last dimension contiguous.

    The values are the same except in the broadcast layouts, which repeat the first entry with stride 0.
    Where memory around the result is part of the same allocation it holds NaN, so that reading it shows.
    """
    return LAYOUTS[layout](tensor)


def place(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device` with its strides, its alignment and the memory around it; itself if it is there already.

    A GPU's copy is made on its current stream, and not waited for.
    """
    if tensor.device == torch.device(device):
        return tensor
    memory = _memory(tensor)
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return _like(tensor, memory.pin_memory().to(device, non_blocking=True))
    return _like(tensor, memory.to(device))


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one device on the CPU, as `place` has them there; the device is waited for once."""
    if tensors[0].device.type != "cuda":
        return [place(t, "cpu") for t in tensors]
    fetched = [_like(t, _memory(t).to("cpu", non_blocking=True)) for t in tensors]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return fetched


def _memory(tensor: Tensor) -> Tensor:
    """All of what `tensor` is a view of."""
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# -- guarded outputs --------------------------------------------------------------------------------------------


class Guarded:
    """An output [B, H, S, D] filled with NaN, in the middle of memory that nothing may write to.

    NaN that is still there after a call is an element that was not written; `intact` tells whether anything was
    written beside it, the gaps between its own rows included.
    """

    GUARD = 1984.0  # exact in every dtype, and nothing a kernel would write by itself
    BAND = 4096  # elements before and after

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu",
        layout: str = "contiguous",
    ) -> None:
        """`layout`: "contiguous", "bshd" (rows of all heads together), "padded" (8 elements between rows)."""
        b, h, s, d = shape
        gap = 8 if layout == "padded" else 0
        order = (b, s, h, d) if layout == "bshd" else (b, h, s, d)
        rows = [max(1, n) for n in order[1:3]]  # torch, too, counts an empty dimension as 1
        strides = [rows[0] * rows[1] * (d + gap), rows[1] * (d + gap), d + gap, 1]
        if layout == "bshd":
            strides[1], strides[2] = strides[2], strides[1]
        memory = torch.full((b * h * s * (d + gap) + 2 * self.BAND,), self.GUARD, dtype=dtype, device=device)
        self.out = memory.as_strided(shape, strides, self.BAND).fill_(float("nan"))

    def intact(self) -> bool:
        """Whether everything around `out` is as it was."""
        return intact(self.out)


def intact(out: Tensor) -> bool:
    """Whether everything around a guarded output, or a copy that `fetch` made of it, is as it was."""
    rest = _memory(out).clone()
    _like(out, rest).fill_(Guarded.GUARD)
    return bool((rest == Guarded.GUARD).all())
