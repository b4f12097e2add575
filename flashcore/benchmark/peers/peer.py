"""What an adapter is: one way to compute attention, made ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashcore.benchmark.shapes import Shape


class NotServedError(Exception):
    """This peer does not compute this shape; the message says why."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A peer bound to one set of inputs.

    `call` is what is timed: the peer's own entry on inputs in the peer's own layout, nothing of ours around it.
    `output` turns its result into [B, H, S, D], for the error gate. `context` is entered around a timed region.
    """

    call: Callable[[], Any]
    output: Callable[[Any], Tensor] = lambda result: result
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to compute attention.

    `prepare(shape, q, k, v)` takes contiguous [B, H, S, D] inputs on a GPU, a bias [1 or B, H, S, S] behind them where
    the shape has one, and converts and plans, all untimed. It raises ImportError where the peer is not installed,
    NotServedError where it doesn't serve the shape; it never arranges for another implementation to step in.
    `refuses` names the features (shapes.FEATURES) that it doesn't serve, each with the reason. `only` names the one
    feature that it is a contestant for: without it, its call would be another contestant's.
    """

    name: str
    title: str
    prepare: Callable[..., Prepared]
    distribution: str = "torch"  # whose version is recorded
    install: str = ""  # for who has it not; "" = it comes with FlashCore's own dependencies
    refuses: Mapping[str, str] = field(default_factory=dict)
    only: str = ""

    def enters(self, shape: Shape) -> bool:
        """Whether it is a contestant for this shape, be it to refuse."""
        return not self.only or self.only in shape.features

    def require(self, shape: Shape) -> None:
        """Raises NotServedError with every reason why this peer does not serve the shape's features."""
        if reasons := dict.fromkeys(self.refuses[name] for name in sorted(shape.features) if name in self.refuses):
            raise NotServedError("; ".join(reasons))


def bshd(*tensors: Tensor) -> list[Tensor]:
    """Copies in the layout that flash-attn and its kin read: contiguous [B, S, H, D]."""
    return [t.transpose(1, 2).contiguous() for t in tensors]


def first(result: Any) -> Tensor:
    """The output where a peer returns more beside it."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def output_of_bshd(result: Any) -> Tensor:
    """[B, H, S, D] of a [B, S, H, D] result."""
    return first(result).transpose(1, 2)
