"""`attention`: scaled dot-product attention for short sequences at low latency."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flashcore.core.errors import UnsupportedError
from flashcore.launch import cpu, ops
from flashcore.launch.arguments import Options, check

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_m: int | None = None,
    block_n: int | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q @ k^T) @ v for every batch entry and head.

    Args:
        q: [B, Hq, Sq, D] fp16 or bf16, any strides with a contiguous last dimension.
        k: [B, Hkv, Sk, D]; Hq is a multiple of Hkv, and query head h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Sk, D].
        block_m: query rows per tile; None chooses.
        block_n: keys per tile; None chooses.
        is_causal: row i sees keys 0 .. i + Sk - Sq, aligned to the bottom right as in flash-attn 2.1 and later.
        scale: factor of the scores, D ** -0.5 when None.
        window: (left, right), keys before and after the diagonal that a row sees; -1 = unbounded.
        softcap: scores -> softcap * tanh(scores / softcap); 0 = off.
        attn_mask: bool (True = attend) or floating (added to the scores), broadcastable to [B, Hq, Sq, Sk].
        seqused_k: int32 [B], valid keys of each sequence.
        return_lse: also return the log-sum-exp of each row of scores.
        layout: "bhsd", or "bshd" where q, k, v and the output are [B, S, H, D].
        out: write here instead of allocating; must not share memory with an input.
        backend: None chooses; "hopper", "portable" or "reference" is used or raises, it never falls back.

    Returns:
        The output in q's dtype and layout, or (output, lse fp32 [B, Hq, Sq], natural logarithm). A row that
        attends to nothing gives 0 and lse -inf. CPU tensors are computed by the reference path.

    Raises:
        TypeError: an argument is not of its parameter's type.
        ValueError: shapes, strides, devices, dtypes or options that contradict each other.
        UnsupportedError: no kernel serves the problem; the message gives each kernel's reasons.
        RuntimeError: `out` where a gradient would be needed, or a first call inside a CUDA graph capture.
    """
    options = Options(block_m, block_n, is_causal, scale, return_lse, layout, backend)
    inputs = (q, k, v)
    if torch.overrides.has_torch_function(inputs):
        return torch.overrides.handle_torch_function(
            attention, inputs, *inputs, block_m, block_n, is_causal=is_causal, scale=scale, window=window,
            softcap=softcap, attn_mask=attn_mask, seqused_k=seqused_k, return_lse=return_lse, layout=layout, out=out,
            backend=backend,
        )  # fmt: skip
    check(q, k, v, options, out)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise UnsupportedError("attention() has no forward-mode derivative")
    extras = _extras(window, softcap, attn_mask, seqused_k)
    if extras:
        if q.device.type != "cpu":
            raise UnsupportedError("attention()", {"every kernel": [f"{name} is not served yet" for name in extras]})
        out, lse = cpu.forward(q, k, v, out, options, **extras)
    elif out is None:
        out, lse = ops.attention(q, k, v, **options._asdict())
    else:
        lse = ops.attention_out(q, k, v, out, **options._asdict())
    return (out, lse) if return_lse else out


def _extras(
    window: tuple[int, int], softcap: float, attn_mask: Tensor | None, seqused_k: Tensor | None
) -> dict[str, Any]:
    """The options in use that only the reference path serves so far."""
    extras: dict[str, Any] = {}
    if tuple(window) != (-1, -1):
        extras["window"] = tuple(window)
    if softcap != 0:
        extras["softcap"] = softcap
    if attn_mask is not None:
        extras["attn_mask"] = attn_mask
    if seqused_k is not None:
        extras["seqused_k"] = seqused_k
    return extras
