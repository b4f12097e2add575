"""The pairs of classes whose times are compared: inputs of the same shape that differ in their values alone."""

from __future__ import annotations

from collections.abc import Callable
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
