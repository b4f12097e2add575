"""Dao-AILab's flash-attn 2 and 3 and flash-attn-4, each by its own package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from flashcore.benchmark.peers.peer import Peer, Prepared, bshd, output_of_bshd
from flashcore.benchmark.shapes import Shape


def _from(module: str) -> Callable[[Shape, Tensor, Tensor, Tensor], Prepared]:
    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        try:
            attend = import_module(module).flash_attn_func
        except AttributeError as other:  # flash-attn-4 alone leaves a `flash_attn` that holds only `cute`
            raise ImportError(f"{module} has no flash_attn_func") from other
        q, k, v = bshd(q, k, v)
        causal = shape.is_causal
        return Prepared(lambda: attend(q, k, v, causal=causal), output_of_bshd)

    return prepare


FA2 = Peer("fa2", "flash-attn 2", _from("flash_attn"), "flash-attn", "pip install flash-attn --no-build-isolation")
FA3 = Peer(
    "fa3", "flash-attn 3", _from("flash_attn_interface"), "flash-attn-3",
    "pip install ./hopper from a checkout of github.com/Dao-AILab/flash-attention",
)  # fmt: skip
FA4 = Peer("fa4", "flash-attn 4", _from("flash_attn.cute"), "flash-attn-4", "pip install --pre flash-attn-4")
