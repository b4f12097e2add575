"""xformers' memory_efficient_attention, with the operator it chooses."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from flashcore.benchmark.peers.peer import NotServedError, Peer, Prepared, bshd, output_of_bshd
from flashcore.benchmark.shapes import Shape


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    ops = import_module("xformers.ops")
    if shape.kv_heads != shape.heads:
        raise NotServedError("takes shared key and value heads only in a 5-D layout of its own")
    q, k, v = bshd(q, k, v)
    mask = ops.LowerTriangularMask() if shape.is_causal else None
    return Prepared(lambda: ops.memory_efficient_attention(q, k, v, attn_bias=mask), output_of_bshd)


XFORMERS = Peer("xformers", "xformers", _prepare, "xformers", "pip install xformers")
