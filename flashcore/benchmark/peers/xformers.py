"""xformers' memory_efficient_attention, with the operator it chooses."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from flashcore.benchmark.peers.peer import Peer, Prepared, bshd, output_of_bshd
from flashcore.benchmark.shapes import Shape


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Prepared:
    ops = import_module("xformers.ops")
    mask = None if bias is None else bias.expand(shape.batch, -1, -1, -1)
    if shape.is_causal:
        mask = ops.LowerTriangularMask() if mask is None else ops.LowerTriangularMaskWithTensorBias(mask)
    q, k, v = bshd(q, k, v)
    return Prepared(lambda: ops.memory_efficient_attention(q, k, v, attn_bias=mask), output_of_bshd)


_LENGTHS = "its masks for lengths and windows are not measured here"
XFORMERS = Peer(
    "xformers", "xformers", _prepare, "xformers", "pip install xformers",
    {
        "gqa": "takes shared key and value heads only in a 5-D layout of its own", "softcap": "has no soft cap",
        "padded": _LENGTHS, "packed": _LENGTHS, "window": _LENGTHS,
    },
)  # fmt: skip
