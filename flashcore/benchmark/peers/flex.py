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
    """The compiled call, and the block mask it gets."""
    torch.compiler.reset()  # a shape is a recompilation, and after a few of those torch.compile gives up silently
    attend = _biased(shape) if shape.bias or shape.softcap else flex_attention
    return torch.compile(attend, dynamic=False, fullgraph=True), _block_mask(shape, device)


def _biased(shape: Shape) -> Any:
    """FlexAttention with the shape's soft cap and bias: `bias` is an argument, so that other inputs compile nothing."""
    softcap, of_each = shape.softcap, shape.bias > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, **options: Any) -> Any:
        def score_mod(score: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Any:
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            if bias is None:
                return score
            return score + (bias[b, h, i, j] if of_each else bias[0, h, i, j])

        return flex_attention(q, k, v, score_mod=score_mod, **options)

    return attend


def _block_mask(shape: Shape, device: torch.device) -> Any:
    """Which keys a row reads: causal, within the window, of its own sequence."""
    batch, rows = (None, shape.seqlen)
    left, right = shape.window
    rules: list[Any] = []
    if shape.is_causal:
        rules.append(lambda b, h, i, j: i >= j)
    if left >= 0:
        rules.append(lambda b, h, i, j: j >= i - left)
    if right >= 0:
        rules.append(lambda b, h, i, j: j <= i + right)
    if shape.lengths == "padded":
        batch, used = shape.batch, shape.seqused_k(device)
        rules.append(lambda b, h, i, j: j < used[b])
    if shape.lengths == "packed":  # positions within a sequence differ as those in the packed rows do
        lengths = shape.seqused_k(device)
        owner = torch.repeat_interleave(torch.arange(shape.batch, device=device), lengths)
        rows = int(owner.numel())
        rules.append(lambda b, h, i, j: owner[i] == owner[j])
    if not rules:
        return None

    def reads(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed: Tensor = rules[0](b, h, i, j)
        for rule in rules[1:]:
            allowed = allowed & rule(b, h, i, j)
        return allowed

    return create_block_mask(reads, batch, None, rows, rows, device=device)


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Prepared:
    attend, mask = _compiled(shape, q.device)
    enable_gqa = shape.kv_heads != shape.heads
    if shape.lengths == "packed":
        q, k, v = (shape.pack(t).transpose(0, 1).contiguous()[None] for t in (q, k, v))
        return Prepared(
            lambda: attend(q, k, v, block_mask=mask, enable_gqa=enable_gqa),
            lambda out: shape.unpack(out[0].transpose(0, 1)),
        )
    return Prepared(lambda: attend(q, k, v, *bias, block_mask=mask, enable_gqa=enable_gqa))


FLEX = Peer("flex", "FlexAttention", _prepare)
