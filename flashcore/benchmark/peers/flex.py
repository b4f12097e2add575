"""torch's FlexAttention, compiled for each shape: static shapes are its fastest form."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flashcore.benchmark.peers.peer import Peer, Prepared
from flashcore.benchmark.shapes import Shape


@lru_cache(maxsize=1)
def _compiled(shape: Shape, device: torch.device) -> tuple[Any, Any]:
    torch.compiler.reset()  # a shape is a recompilation, and after a few of those torch.compile gives up silently
    mask = None
    if shape.is_causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.seqlen, shape.seqlen, device=device)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True), mask


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    attend, mask = _compiled(shape, q.device)
    enable_gqa = shape.kv_heads != shape.heads
    return Prepared(lambda: attend(q, k, v, block_mask=mask, enable_gqa=enable_gqa))


FLEX = Peer("flex", "FlexAttention", _prepare)
