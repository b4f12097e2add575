"""torch.nn.functional.scaled_dot_product_attention: its own choice, and each of its backends by name.

The lengths of a padded batch are a bool mask: [B, 1, 1, S], which is as little as says them, or [B, 1, S, S], as models
that make one mask for all kinds of attention hand it over. Contestants named "-square" get the second.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.benchmark.peers.peer import Peer, Prepared
from flashcore.benchmark.shapes import Shape

_MASKED = {"softcap": "has no soft cap", "packed": "its packed form is nested tensors, which are not measured here"}
_NO_MASK = dict.fromkeys(("bias", "padded", "window"), "takes no mask")


def _with(backend: SDPBackend | None, square: bool = False) -> Callable[..., Prepared]:
    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Prepared:
        attend = torch.nn.functional.scaled_dot_product_attention
        is_causal, enable_gqa = shape.is_causal, shape.kv_heads != shape.heads
        mask = _mask(shape, q.device, bias, square)
        if mask is None:
            call = lambda: attend(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)  # noqa: E731
        else:
            call = lambda: attend(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)  # noqa: E731
        return Prepared(call, context=nullcontext if backend is None else lambda: sdpa_kernel(backend))

    return prepare


def _mask(shape: Shape, device: torch.device, bias: Tensor | None, square: bool) -> Tensor | None:
    """What SDPA gets as attn_mask: the bias, or the shape's lengths or window as bool (True = attend).

    Lengths: [B, 1, 1, S] or, `square`, [B, 1, S, S]; a window: [S, S], with the rest of what is_causal would say.
    """
    mask = bias
    if shape.lengths:
        mask = shape.in_use(device)[:, None, None, :]
        if square:
            mask = mask.expand(-1, -1, shape.seqlen, -1).contiguous()
    if shape.window != (-1, -1):
        rows = torch.arange(shape.seqlen, device=device)
        left, right = (shape.seqlen if side < 0 else side for side in shape.window)
        mask = (rows >= rows[:, None] - left) & (rows <= rows[:, None] + right)
    if mask is not None and shape.is_causal:
        causal = torch.ones(shape.seqlen, shape.seqlen, dtype=torch.bool, device=device).tril()
        mask = mask.masked_fill(~causal, -torch.inf)
    return mask


DEFAULT = Peer("sdpa", "SDPA", _with(None), refuses=_MASKED)
FLASH = Peer("sdpa-flash", "SDPA flash", _with(SDPBackend.FLASH_ATTENTION), refuses=_MASKED | _NO_MASK)
CUDNN = Peer("sdpa-cudnn", "SDPA cuDNN", _with(SDPBackend.CUDNN_ATTENTION), refuses=_MASKED)
EFFICIENT = Peer(
    "sdpa-efficient", "SDPA efficient", _with(SDPBackend.EFFICIENT_ATTENTION),
    refuses=_MASKED | {"gqa": "needs as many key heads as query heads"},
)  # fmt: skip
CUDNN_SQUARE = Peer(
    "sdpa-cudnn-square", "SDPA cuDNN, mask [B, 1, S, S]", _with(SDPBackend.CUDNN_ATTENTION, square=True),
    refuses=CUDNN.refuses, only="padded",
)  # fmt: skip
EFFICIENT_SQUARE = Peer(
    "sdpa-efficient-square", "SDPA efficient, mask [B, 1, S, S]", _with(SDPBackend.EFFICIENT_ATTENTION, square=True),
    refuses=EFFICIENT.refuses, only="padded",
)  # fmt: skip
MATH = Peer("sdpa-math", "SDPA math", _with(SDPBackend.MATH), refuses=_MASKED)
