"""`attention`: scaled dot-product attention for short sequences at low latency."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from flashcore.core.errors import UnsupportedError
from flashcore.launch import ops, shim
from flashcore.launch.arguments import Options, check, check_tensors
from flashcore.launch.gradients import Call
from flashcore.launch.launcher import find, prepare, recall, recent, recent_into
from flashcore.launch.torch_private import dispatch_modes, functorch_is_active, is_plain

__all__ = ["attention"]

KERNEL_DEVICES = ("cuda",)  # whose tensors kernels read; the reference path serves the others


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
        q: [B, Hq, Sq, D] fp16, bf16 or fp32, any strides with a contiguous last dimension; D and Dv are multiples of
            8 up to 256. fp32 is multiplied in IEEE precision, by the portable kernel.
        k: [B, Hkv, Sk, D]; Hq is a multiple of Hkv, and query head h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Sk, Dv].
        block_m: query rows per tile; None chooses.
        block_n: keys per tile; None chooses.
        is_causal: row i sees keys 0 .. i + Sk - Sq, aligned to the bottom right as in flash-attn 2.1 and later.
        scale: factor of the scores, D ** -0.5 when None. Scaled scores are meant to stay below 2^27 in magnitude, where
            fp32 still tells neighbours apart; a row of larger ones may come out as NaN.
        window: (left, right), keys before and after the diagonal that a row sees; -1 = unbounded.
        softcap: scores -> softcap * tanh(scores / softcap), before a mask is added; 0 = off.
        attn_mask: bool (True = attend), or fp16, bf16 or fp32 to be added to the scaled scores, where -inf hides a
            key even if its score is NaN; broadcastable to [B, Hq, Sq, Sk], any strides, stride 0 is never expanded.
            Its values are read and never branched on: a key that it hides is computed, and a NaN in its v may spread.
        seqused_k: int32 [B] on q's device, valid keys of each sequence, clamped to 0 .. Sk there. The diagonal of
            is_causal and window ends at the last valid key, as in flash-attn 3; what lies behind it is never used.
        return_lse: also return the log-sum-exp of each row of scores.
        layout: "bhsd", or "bshd" where q, k, v and the output are [B, S, H, D].
        out: write here instead of allocating; must not share memory with an input.
        backend: None chooses; "hopper", "portable" or "reference" is used or raises, it never falls back.

    Returns:
        The output in q's dtype and layout, or (output, lse fp32 [B, Hq, Sq], natural logarithm). A row that
        attends to nothing gives 0 and lse -inf. CPU tensors are computed by the reference path. Every option goes
        with every other; docs/support-matrix.md lists what each kernel serves.

    Raises:
        TypeError: an argument is not of its parameter's type.
        ValueError: shapes, strides, devices, dtypes or options that contradict each other.
        UnsupportedError: no kernel serves the problem; the message gives each kernel's reasons.
        RuntimeError: `out` where a gradient would be needed, or a first call inside a CUDA graph capture.

    References:
        FlashAttention-2 (Dao, 2023), with the online softmax of Milakov and Gimelshein (2018).
    """
    compiling = is_dynamo_compiling()  # a constant to Dynamo, which then never sees the ways around the operator
    if not compiling and shim.attend is not None:
        result = shim.attend(
            q, k, v, out, attn_mask, seqused_k,
            block_m, block_n, is_causal, scale, return_lse, layout, backend, window, softcap,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    key = block_m, block_n, is_causal, scale, return_lse, layout, backend, window, softcap
    if attn_mask is not None or seqused_k is not None:
        if not compiling:
            result = recall((*key, attn_mask is None, seqused_k is None), q, k, v, out, attn_mask, seqused_k)
            if result is not None:
                return result
        return _attend(q, k, v, out, attn_mask, seqused_k, key)
    if not (compiling or dispatch_modes() or forward_ad._current_level >= 0):
        try:
            entry = recent.get(key) if out is None else recent_into.get(key)
            if entry is None or not (entry.guard(q, k, v) if out is None else entry.guard(q, k, v, out)):
                entry = find(key, q, k, v, out)
        except (TypeError, AttributeError):  # an option without a hash, as a list; an argument that is no tensor
            entry = None
        if entry is not None:
            result = entry.run(q, k, v, out)
            if result is not None:
                return result
    return _attend(q, k, v, out, None, None, key)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, attn_mask: Tensor | None, seqused_k: Tensor | None,
    asked: tuple[Any, ...],
) -> Tensor | tuple[Tensor, Tensor]:
    """A call seen for the first time, or one that something else has to see as an operator."""
    options, extra = Options(*asked), (attn_mask, seqused_k)
    everything = (q, k, v, out, *extra)
    named = {"attn_mask": attn_mask, "seqused_k": seqused_k, **options._asdict()}
    if torch.overrides.has_torch_function(everything):
        override: Any = torch.overrides.handle_torch_function
        return override(attention, everything, q, k, v, out=out, **named)  # type: ignore[no-any-return]
    check_tensors(q=q, k=k, v=v, out=out, attn_mask=attn_mask, seqused_k=seqused_k)
    device = q.device.type
    if out is None and any(t.dtype == torch.float32 for t in (q, k, v)) and is_autocast(device):
        # As torch's own attention, except that half precision of either kind stays what it is.
        dtype = torch.get_autocast_dtype(device)
        return attention(q.to(dtype), k.to(dtype), v.to(dtype), **named)
    check(q, k, v, options, out, *extra)
    options = options._replace(window=(options.window[0], options.window[1]))  # of a list, too
    tensors = [t for t in everything if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UnsupportedError("attention() has no forward-mode derivative")

    direct = device in KERNEL_DEVICES and not is_dynamo_compiling()
    if not direct or any(type(t) not in (Tensor, Parameter) for t in tensors) or not is_plain():
        if not is_dynamo_compiling() and functorch_is_active() and out is None:
            return ops.Transformable.apply(q, k, v, *extra, Call(options))  # type: ignore[no-untyped-call, no-any-return]
        return ops.by_operator(q, k, v, out, extra, Call(options))
    key = options if extra == (None, None) else (*options, attn_mask is None, seqused_k is None)
    run = ops.serve(
        key, everything, options, Call(options), lambda o: prepare(q, k, v, out, o, *extra)
    )  # fmt: skip
    result = run(*everything)
    assert result is not None  # it was prepared for these very tensors
    return result


def is_autocast(device: str) -> bool:
    return device in ("cuda", "cpu") and torch.is_autocast_enabled(device)
