"""The pairs of classes whose times are compared: inputs of the same shape that differ in their values alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]  # q [B, H, Sq, D], k and v [B, H, Sk, D]


@dataclass(frozen=True, slots=True)
class Sizes:
    """A problem of equal heads, contiguous, fp16."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int

    @property
    def query(self) -> tuple[int, int, int, int]:
        """The shape of q."""
        return self.batch, self.heads, self.seqlen_q, self.head_dim

    @property
    def key(self) -> tuple[int, int, int, int]:
        """The shape of k, and of v."""
        return self.batch, self.heads, self.seqlen_k, self.head_dim


Draw = Callable[[Sizes, torch.Generator], tuple[Inputs, Inputs]]


def _random(sizes: Sizes, generator: torch.Generator) -> Inputs:
    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float16)

    return normal(sizes.query), normal(sizes.key), normal(sizes.key)


def _each(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    q, k, v = inputs
    return change(q), change(k), change(v)


def fixed_random(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, Inputs]:
    """One input for every item, and one drawn for each."""
    drawn = _random(sizes, generator)
    return _each(lambda t: t[:1, :1].expand_as(t), _random(sizes, generator)), drawn


def rising_falling(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, Inputs]:
    """Scores that rise from key to key, so that every tile raises the maximum, and the same keys the other way round.

    From one tile of 64 keys of 512 to the next a score grows by more than 50 in units of log2.
    """
    q, k, v = _random(sizes, generator)
    level = torch.linspace(-20, 20, sizes.seqlen_k, device=k.device, dtype=k.dtype)[:, None]
    q, k = 1 + 0.1 * q, level + 0.1 * k
    return (q, k, v), (q, k.flip(2), v.flip(2))


def subnormal_normal(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, Inputs]:
    """Numbers below 2^-14, which fp16 holds with fewer digits, and ordinary ones."""
    drawn = _random(sizes, generator)
    return _each(lambda t: t.clamp(-4, 4) * 2.0**-17, drawn), drawn


def nan_finite(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, Inputs]:
    """A first key that is NaN, so that every score's maximum and every result is, and an ordinary one."""
    q, k, v = _random(sizes, generator)
    poisoned = k.clone()
    poisoned[:, :, 0] = torch.nan
    return (q, poisoned, v), (q, k, v)


def zeros_random(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, Inputs]:
    """Zeros, which draw the least power, and random numbers."""
    drawn = _random(sizes, generator)
    return _each(torch.zeros_like, drawn), drawn


PAIRS: dict[str, Draw] = {
    "fixed/random": fixed_random,
    "rising/falling": rising_falling,
    "subnormal/normal": subnormal_normal,
    "nan/finite": nan_finite,
    "zeros/random": zeros_random,
}


class Either:
    """Two inputs, of which either can be shown at one address, by the same loads and stores whichever it is.

    What is shown is base ^ (differs & chosen), on words of four numbers: bits, so that a NaN and a subnormal number
    stay what they are. Both operands are read whole, so that what lies in the L2 afterwards can't depend on the choice,
    within a launch as over many. A copy from one of two places reads another address for either: behind such a copy an
    H100's cycles differed by 0.3 to 1%, with the same sign whatever the values were.
    """

    def __init__(self, places: Sequence[Tensor]) -> None:
        self._places = [place.view(torch.int64) for place in places]
        self._base = [torch.zeros_like(place) for place in self._places]
        self._differs = [torch.zeros_like(place) for place in self._places]

    def hold(self, zero: Sequence[Tensor], one: Sequence[Tensor]) -> None:
        """Let these be the two."""
        for base, differs, of_zero, of_one in zip(self._base, self._differs, zero, one, strict=True):
            base.copy_(of_zero.contiguous().view(torch.int64))
            torch.bitwise_xor(base, of_one.contiguous().view(torch.int64), out=differs)

    def show(self, chosen: Tensor) -> None:
        """Write `zero` where this is 0 and `one` where it is -1: int64, of a shape that broadcasts to theirs."""
        for place, base, differs in zip(self._places, self._base, self._differs, strict=True):
            torch.bitwise_and(differs, chosen, out=place)
            place.bitwise_xor_(base)
