"""torch.ops.flashcore: attention as PyTorch's dispatcher sees it.

`attention()` comes here whenever something has to see the call: autograd, torch.compile and export, functorch,
fake tensors, dispatch modes. `attention` allocates its outputs, `attention_out` writes into `out`. Both return a
log-sum-exp, an empty tensor where none was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcore.launch import cpu, launcher
from flashcore.launch.arguments import Options, check, check_overlap, lse_shape, output_shape

_OPTIONS = (
    "*, int? block_m=None, int? block_n=None, bool is_causal=False, float? scale=None, bool return_lse=False,"
    " str layout='bhsd', str? backend=None"
)
_library = torch.library.Library("flashcore", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", tags=_tags)
_library.define(f"attention_out(Tensor q, Tensor k, Tensor v, Tensor(a!) out, {_OPTIONS}) -> Tensor", tags=_tags)

attention = torch.ops.flashcore.attention.default
attention_out = torch.ops.flashcore.attention_out.default


def _cuda(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    o = Options(**options)
    run, _ = launcher.prepare(q, k, v, None, o)
    return _both(run(q, k, v, None), q)


def _cuda_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **options: Any) -> Tensor:
    o = Options(**options)
    run, _ = launcher.prepare(q, k, v, out, o)
    return _both(run(q, k, v, out), q)[1]


def _both(result: launcher.Result, q: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(result, tuple):
        return result
    assert result is not None  # the runner was made for these very tensors
    return result, torch.empty(0, dtype=torch.float32, device=q.device)


def _cpu(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    o = Options(**options)
    check(q, k, v, o)
    return cpu.forward(q, k, v, None, o)


def _cpu_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **options: Any) -> Tensor:
    o = Options(**options)
    check(q, k, v, o, out)
    check_overlap(q, k, v, out)
    return cpu.forward(q, k, v, out, o)[1]


def _fake(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    o = Options(**options)
    check(q, k, v, o)
    return q.new_empty(output_shape(q, v)), _fake_lse(q, o)


def _fake_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **options: Any) -> Tensor:
    o = Options(**options)
    check(q, k, v, o, out)
    return _fake_lse(q, o)


def _fake_lse(q: Tensor, o: Options) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(lse_shape(q, o.layout) if o.return_lse else (0,), dtype=dtype)


# -- gradients --------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = Options(**keyword_only_inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    o: Options = ctx.options
    if grad_out is None and (grad_lse is None or not o.return_lse):
        return None, None, None
    return gradients(q, k, v, grad_out, grad_lse if o.return_lse else None, o)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of attention by its definition, from scores computed anew.

    Written in torch operations on the inputs alone, so that it can itself be differentiated, compiled and traced.
    It holds the fp32 scores [B, Hq, Sq, Sk] of the whole problem, unlike the forward pass.
    """
    bshd = options.layout == "bshd"
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    qh, kh, vh = (_heads_first(t, bshd).to(precision) for t in (q, k, v))
    heads_kv, seqlen_k = kh.shape[1], kh.shape[2]
    qh = qh.unflatten(1, (heads_kv, qh.shape[1] // heads_kv))  # [B, Hkv, group, Sq, D]
    kh, vh = kh.unsqueeze(2), vh.unsqueeze(2)
    scale = options.scale_for(q.shape[-1])

    scores = (qh @ kh.mT) * scale
    if options.is_causal:
        seqlen_q = qh.shape[3]
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(seqlen_k - seqlen_q + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        blind = hidden.all(-1, keepdim=True)  # rows that read no key: their weights are 0, not 0 / 0
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    else:
        weights = scores.softmax(-1)

    if grad_out is None:
        grad_v = torch.zeros_like(v)
        grad_scores = torch.zeros_like(weights)
    else:
        g = _heads_first(grad_out, bshd).to(precision).unflatten(1, (heads_kv, -1))
        grad_v = _restore((weights.mT @ g).sum(2), v, bshd)
        grad_weights = g @ vh.mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    if grad_lse is not None:
        grad_scores = grad_scores + weights * grad_lse.to(precision).unflatten(1, (heads_kv, -1)).unsqueeze(-1)
    grad_q = _restore((grad_scores @ kh).flatten(1, 2) * scale, q, bshd)
    grad_k = _restore((grad_scores.mT @ qh).sum(2) * scale, k, bshd)
    return grad_q, grad_k, grad_v


def _heads_first(tensor: Tensor, bshd: bool) -> Tensor:
    return tensor.transpose(1, 2) if bshd else tensor


def _restore(gradient: Tensor, of: Tensor, bshd: bool) -> Tensor:
    return _heads_first(gradient, bshd).to(of.dtype)


class Differentiable(torch.autograd.Function):
    """attention() of inputs that require grad, in eager mode; `run` computes it.

    The operator has the same gradients registered but takes longer to get there.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, run: Callable[..., Any]) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return run(q, k, v, None)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grad_out, grad_lse), None, None)


# -- functorch --------------------------------------------------------------------------------------------------


class Transformable(torch.autograd.Function):
    """attention() under functorch, which can't differentiate an operator registered from Python.

    Its separate set-up, which functorch asks for, costs 30 microseconds a call.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
        out, lse = attention(q, k, v, **options._asdict())
        return (out, lse) if options.return_lse else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs[:3], inputs[3]._asdict(), output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grad_out, grad_lse), None)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    def fold(tensor: Tensor, dim: int | None) -> Tensor:  # the mapped dimension becomes part of the batch
        moved = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return moved.flatten(0, 1)

    out, lse = attention(*(fold(t, d) for t, d in zip((q, k, v), in_dims, strict=False)), **options)
    unfolded = lse.unflatten(0, (info.batch_size, -1)) if options.get("return_lse") else lse.expand(info.batch_size, 0)
    return (out.unflatten(0, (info.batch_size, -1)), unfolded), (0, 0)




_library.impl("attention", _cuda, "CUDA")
_library.impl("attention_out", _cuda_out, "CUDA")
_library.impl("attention", _cpu, "CPU")
_library.impl("attention_out", _cpu_out, "CPU")
torch.library.register_fake("flashcore::attention", _fake, lib=_library)
torch.library.register_fake("flashcore::attention_out", _fake_out, lib=_library)
torch.library.register_autograd("flashcore::attention", _backward, setup_context=_save, lib=_library)
torch.library.register_vmap("flashcore::attention", _vmap, lib=_library)
