"""`attention_varlen`: attention of sequences of different lengths, packed one after the other without padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from flashcore.core.errors import UnsupportedError
from flashcore.fast import attention_production
from flashcore.launch import ops, shim
from flashcore.launch.arguments import Options, check_packed, check_tensors
from flashcore.launch.gradients import Call
from flashcore.launch.launcher import Key, prepare_packed, recall
from flashcore.launch.torch_private import functorch_is_active, is_plain

__all__ = ["attention_varlen"]

_LAYOUT = "packed"  # keeps these calls apart from those of `attention`


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q @ k^T) @ v for every head of every sequence, which reads its own keys only.

    Args:
        q: [total_q, Hq, D] fp16, bf16 or fp32, as `attention` takes it.
        k: [total_k, Hkv, D]; Hq is a multiple of Hkv, and query head h reads key head h // (Hq // Hkv).
        v: [total_k, Hkv, Dv].
        cu_seqlens_q: int32 [B + 1] on q's device: sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1].
        cu_seqlens_k: the same of k and v; a sequence may be empty in either.
        max_seqlen_q: at least the number of rows of the longest sequence in q.
        max_seqlen_k: the same of k and v.
        is_causal: row i of a sequence with lq rows and lk keys sees keys 0 .. i + lk - lq.
        scale, window, softcap, backend, block_m, block_n: as `attention` takes them.
        return_lse: also return the log-sum-exp of each row of scores.
        out: [total_q, Hq, Dv], write here instead of allocating; must not share memory with an input.

    Returns:
        The output [total_q, Hq, Dv] in q's dtype, or (output, lse fp32 [Hq, total_q], natural logarithm). A row that
        attends to nothing gives 0 and lse -inf; rows that belong to no sequence are not written.

        Only metadata is looked at. What cu_seqlens holds is clamped on the device: a sequence ends where it begins if
        not later, lies within q, k and v, and is no longer than max_seqlen says.

    Raises:
        As `attention` does.
    """
    key: Key = (
        block_m, block_n, is_causal, scale, return_lse, _LAYOUT, backend, window, softcap, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    compiling = is_dynamo_compiling()
    if not compiling and shim.attend is not None:
        result = shim.attend(q, k, v, out, cu_seqlens_q, cu_seqlens_k, *key)
        if result is not None:
            return result  # type: ignore[no-any-return]
    if not compiling:
        result = recall(key, q, k, v, out, cu_seqlens_q, cu_seqlens_k)
        if result is not None:
            return result
    return _attend(q, k, v, out, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), key)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int],
    asked: Key,
) -> Tensor | tuple[Tensor, Tensor]:
    """A call seen for the first time, or one that something else has to see as an operator."""
    options = Options(*asked[:9])._replace(layout="bhsd")
    named = options._asdict()
    del named["layout"]
    everything = (q, k, v, out, *cu_seqlens)
    if torch.overrides.has_torch_function(everything):
        override: Any = torch.overrides.handle_torch_function
        return override(  # type: ignore[no-any-return]
            attention_varlen, everything, q, k, v, *cu_seqlens, *longest, out=out, **named
        )
    check_tensors(q=q, k=k, v=v, out=out)
    device = q.device.type
    if out is None and any(t.dtype == torch.float32 for t in (q, k, v)) and attention_production.is_autocast(device):
        dtype = torch.get_autocast_dtype(device)
        return attention_varlen(q.to(dtype), k.to(dtype), v.to(dtype), *cu_seqlens, *longest, **named)
    check_packed(q, k, v, *cu_seqlens, *longest, options, out)
    options = options._replace(window=(options.window[0], options.window[1]))  # of a list, too
    tensors = [t for t in everything if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v)):
        raise UnsupportedError("attention_varlen() has no forward-mode derivative")

    direct = device in attention_production.KERNEL_DEVICES and not is_dynamo_compiling()
    if not direct or any(type(t) not in (Tensor, Parameter) for t in tensors) or not is_plain():
        if not is_dynamo_compiling() and functorch_is_active() and out is None:
            return ops.Transformable.apply(  # type: ignore[no-untyped-call, no-any-return]
                q, k, v, *cu_seqlens, Call(options, longest)
            )
        return ops.by_operator(q, k, v, out, cu_seqlens, Call(options, longest))
    key = (*options._replace(layout=_LAYOUT), *longest)
    run = ops.serve(
        key, everything, key, Call(options, longest), lambda o: prepare_packed(q, k, v, out, *cu_seqlens, *longest, o)
    )
    result = run(*everything)
    assert result is not None  # it was prepared for these very tensors
    return result
