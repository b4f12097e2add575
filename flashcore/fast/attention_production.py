"""`attention`: scaled dot-product attention for short sequences at low latency."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from flashcore.core.errors import UnsupportedError
from flashcore.launch import cpu, ops, shim
from flashcore.launch.arguments import Options, check, check_extras, check_tensors
from flashcore.launch.launcher import Key, Run, find, prepare, recent, recent_into, remember
from flashcore.launch.torch_private import dispatch_modes, functorch_is_active, is_plain

__all__ = ["attention"]

_KERNEL_DEVICES = ("cuda",)  # whose tensors kernels read; the reference path serves the others

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
    compiling = is_dynamo_compiling()  # a constant to Dynamo, which then never sees the ways around the operator
    if not compiling and shim.attend is not None:
        result = shim.attend(
            q, k, v, out, block_m, block_n, is_causal, scale, return_lse, layout, backend,
            window, softcap, attn_mask, seqused_k,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    key = (
        block_m, block_n, is_causal, scale, return_lse, layout, backend, window, softcap, attn_mask, seqused_k,
    )  # fmt: skip
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
    return _attend(q, k, v, out, key)


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, key: Key) -> Tensor | tuple[Tensor, Tensor]:
    """A call seen for the first time, or one that something else has to see as an operator."""
    inputs = (q, k, v)
    options, extras = Options(*key[:7]), _extras(*key[7:])
    if torch.overrides.has_torch_function(inputs):
        override: Any = torch.overrides.handle_torch_function
        return override(attention, inputs, *inputs, out=out, **options._asdict(), **extras)  # type: ignore[no-any-return]
    check_tensors(q, k, v, out)
    device = q.device.type
    if out is None and any(t.dtype == torch.float32 for t in inputs) and _is_autocast(device):
        # As torch's own attention, except that half precision of either kind stays what it is.
        dtype = torch.get_autocast_dtype(device)
        return attention(q.to(dtype), k.to(dtype), v.to(dtype), **options._asdict(), **extras)
    check(q, k, v, options, out)
    check_extras(q, k, options.layout, **extras)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise UnsupportedError("attention() has no forward-mode derivative")
    if extras:
        if device != "cpu":
            raise UnsupportedError("attention()", {"every kernel": [f"{name} is not served yet" for name in extras]})
        return _pick(cpu.forward(q, k, v, out, options, **extras), options)

    if is_dynamo_compiling() or any(type(t) not in (Tensor, Parameter) for t in inputs):
        return _operator(q, k, v, out, options)
    if not is_plain():
        if functorch_is_active() and out is None:
            return ops.Transformable.apply(q, k, v, options)  # type: ignore[no-untyped-call, no-any-return]
        return _operator(q, k, v, out, options)
    if device not in _KERNEL_DEVICES:
        return _operator(q, k, v, out, options)
    run, kernel = prepare(q, k, v, out, options)
    if any(t.requires_grad for t in inputs) or (out is not None and out.requires_grad):
        run = _with_gradient(run, options)
    remember(key, q, k, v, out, run, kernel)
    result = run(q, k, v, out)
    assert result is not None  # it was prepared for these very tensors
    return result


def _is_autocast(device: str) -> bool:
    return device in ("cuda", "cpu") and torch.is_autocast_enabled(device)


def _with_gradient(run: Run, options: Options) -> Run:
    """`run` for tensors of which one requires grad, whatever the grad mode is when it is called."""

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return run(q, k, v, out)
        if out is not None:
            return None  # refused by what looks at the call next
        return ops.Differentiable.apply(q, k, v, options, run)  # type: ignore[no-untyped-call]

    return call


def _operator(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options) -> Tensor | tuple[Tensor, Tensor]:
    if out is None:
        return _pick(ops.attention(q, k, v, **options._asdict()), options)
    return _pick((out, ops.attention_out(q, k, v, out, **options._asdict())), options)


def _pick(both: tuple[Tensor, Tensor], options: Options) -> Tensor | tuple[Tensor, Tensor]:
    return both if options.return_lse else both[0]


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
