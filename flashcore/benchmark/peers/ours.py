"""FlashCore itself: the call that users make, with its own choice and with each kernel by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashcore.benchmark.peers.peer import Peer, Prepared
from flashcore.benchmark.shapes import Shape
from flashcore.fast.attention_production import attention


def _with(backend: str | None) -> Callable[[Shape, Tensor, Tensor, Tensor], Prepared]:
    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        is_causal = shape.is_causal
        return Prepared(lambda: attention(q, k, v, is_causal=is_causal, backend=backend))

    return prepare


FLASHCORE = Peer("flashcore", "FlashCore", _with(None), "flashcore-attn")
PORTABLE = Peer("flashcore-portable", "FlashCore portable", _with("portable"), "flashcore-attn")
HOPPER = Peer("flashcore-hopper", "FlashCore hopper", _with("hopper"), "flashcore-attn")
