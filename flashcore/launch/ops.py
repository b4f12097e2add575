"""torch.ops.flashcore: attention as PyTorch's dispatcher sees it.

`attention()` and `attention_varlen()` come here whenever something has to see the call: autograd, torch.compile and
export, functorch, fake tensors, dispatch modes. An operator allocates its outputs; its twin of the name with `_out`
writes into `out`. Both return a log-sum-exp, an empty tensor where none was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcore.launch import cpu, gradients, launcher, node, shim
from flashcore.launch.arguments import Options, check, check_overlap, check_packed, lse_shape, output_shape
from flashcore.launch.torch_private import apply_function

_TENSORS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = (
    "*, int? block_m=None, int? block_n=None, bool is_causal=False, float? scale=None, bool return_lse=False,"
    " str layout='bhsd', str? backend=None, int[2] window=[-1, -1], float softcap=0.0"
)
_EXTRA = "Tensor? attn_mask=None, Tensor? seqused_k=None"
_PACKED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_library = torch.library.Library("flashcore", "DEF")
for _name, _arguments in (
    ("attention", f"({_TENSORS}, {_EXTRA}, {_OPTIONS}) -> (Tensor, Tensor)"),
    ("attention_out", f"({_TENSORS}, Tensor(a!) out, {_EXTRA}, {_OPTIONS}) -> Tensor"),
    ("attention_varlen", f"({_TENSORS}, {_PACKED}, {_OPTIONS}) -> (Tensor, Tensor)"),
    ("attention_varlen_out", f"({_TENSORS}, Tensor(a!) out, {_PACKED}, {_OPTIONS}) -> Tensor"),
):
    _library.define(
        _name + _arguments, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    )

attention = torch.ops.flashcore.attention.default
attention_out = torch.ops.flashcore.attention_out.default
attention_varlen = torch.ops.flashcore.attention_varlen.default
attention_varlen_out = torch.ops.flashcore.attention_varlen_out.default


def _options(given: dict[str, Any]) -> Options:
    """The dispatcher passes a window as a list, and leaves out what has its default value."""
    left, right = given.get("window", (-1, -1))
    return Options(**given)._replace(window=(left, right))


# -- dense tensors ----------------------------------------------------------------------------------------------


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    o = _options(options)
    check(q, k, v, o, None, attn_mask, seqused_k)
    run, _ = launcher.prepare(q, k, v, None, o, attn_mask, seqused_k)
    return _both(run(q, k, v, None, attn_mask, seqused_k), q)


def _cuda_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    o = _options(options)
    check(q, k, v, o, out, attn_mask, seqused_k)
    run, _ = launcher.prepare(q, k, v, out, o, attn_mask, seqused_k)
    return _both(run(q, k, v, out, attn_mask, seqused_k), q)[1]


def _both(result: launcher.Result, q: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(result, tuple):
        return result
    assert result is not None  # the runner was made for these very tensors
    return result, torch.empty(0, dtype=torch.float32, device=q.device)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    o = _options(options)
    check(q, k, v, o, None, attn_mask, seqused_k)
    return cpu.forward(q, k, v, None, o, attn_mask, seqused_k)


def _cpu_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    o = _options(options)
    check(q, k, v, o, out, attn_mask, seqused_k)
    check_overlap(out, q=q, k=k, v=v, attn_mask=attn_mask)
    return cpu.forward(q, k, v, out, o, attn_mask, seqused_k)[1]


def _fake(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    o = _options(options)
    check(q, k, v, o, None, attn_mask, seqused_k)
    return q.new_empty(output_shape(q, v)), _fake_lse(q, lse_shape(q, o.layout), o)


def _fake_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    o = _options(options)
    check(q, k, v, o, out, attn_mask, seqused_k)
    return _fake_lse(q, lse_shape(q, o.layout), o)


def _fake_lse(q: Tensor, shape: tuple[int, ...], o: Options) -> Tensor:
    return q.new_empty(shape if o.return_lse else (0,), dtype=cpu.lse_dtype(q))


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None, **options: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size

    def mapped(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:  # the mapped dimension joins the batch
        return None if tensor is None else mapped(tensor, dim).flatten(0, 1).contiguous()

    dims = (*in_dims, None, None)[:5]
    folded = [mapped(t, d).flatten(0, 1) for t, d in zip((q, k, v), dims, strict=False)]
    if attn_mask is not None and (dims[3] is not None or (attn_mask.dim() == 4 and attn_mask.shape[0] > 1)):
        attn_mask = mapped(attn_mask, dims[3])
        attn_mask = attn_mask.reshape(size, *[1] * (5 - attn_mask.dim()), *attn_mask.shape[1:])
        attn_mask = attn_mask.expand(-1, folded[0].shape[0] // size, -1, -1, -1).flatten(0, 1)
    out, lse = attention(*folded, attn_mask, fold(seqused_k, dims[4]), **options)
    unfolded = lse.unflatten(0, (size, -1)) if options.get("return_lse") else lse.expand(size, 0)
    return (out.unflatten(0, (size, -1)), unfolded), (0, 0)


def by_operator(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, extra: gradients.Extra, call: gradients.Call
) -> Tensor | tuple[Tensor, Tensor]:
    """A checked call as the operator that torch then sees, with what `attention` returns."""
    given, packed = call.options._asdict(), call.longest is not None
    rest = (*extra, *(call.longest or ()))
    if out is not None:
        lse = (attention_varlen_out if packed else attention_out)(q, k, v, out, *rest, **given)
        return (out, lse) if call.options.return_lse else out
    if q.device.type == "cuda" and torch.is_grad_enabled():  # torch's own backward kernels read the log-sum-exp
        given["return_lse"] |= any(t.requires_grad for t in (q, k, v, extra[0]) if t is not None)
    both: tuple[Tensor, Tensor] = (attention_varlen if packed else attention)(q, k, v, *rest, **given)
    return both if call.options.return_lse else both[0]


# -- packed sequences -------------------------------------------------------------------------------------------


def _packed_cuda(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, **options: Any,
) -> tuple[Tensor, Tensor]:
    o, lengths = _options(options), (cu_seqlens_q, cu_seqlens_k)
    check_packed(q, k, v, *lengths, max_seqlen_q, max_seqlen_k, o)
    run, _ = launcher.prepare_packed(q, k, v, None, *lengths, max_seqlen_q, max_seqlen_k, o)
    return _both(run(q, k, v, None, *lengths), q)


def _packed_cuda_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, **options: Any,
) -> Tensor:
    o, lengths = _options(options), (cu_seqlens_q, cu_seqlens_k)
    check_packed(q, k, v, *lengths, max_seqlen_q, max_seqlen_k, o, out)
    run, _ = launcher.prepare_packed(q, k, v, out, *lengths, max_seqlen_q, max_seqlen_k, o)
    return _both(run(q, k, v, out, *lengths), q)[1]


def _packed_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, **options: Any,
) -> tuple[Tensor, Tensor]:
    o = _options(options)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, o)
    return cpu.packed_forward(q, k, v, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, o)


def _packed_cpu_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, **options: Any,
) -> Tensor:
    o = _options(options)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, o, out)
    check_overlap(out, q=q, k=k, v=v)
    return cpu.packed_forward(q, k, v, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, o)[1]


def _packed_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, **options: Any,
) -> tuple[Tensor, Tensor]:
    o = _options(options)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, o)
    return q.new_empty(output_shape(q, v)), _fake_lse(q, (q.shape[1], q.shape[0]), o)


def _packed_fake_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, **options: Any,
) -> Tensor:
    o = _options(options)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, o, out)
    return _fake_lse(q, (q.shape[1], q.shape[0]), o)


# -- gradients --------------------------------------------------------------------------------------------------


def serve(
    key: launcher.Key, given: launcher.Given, asked: launcher.Key, call: gradients.Call,
    prepare: Callable[[Options], tuple[launcher.Run, launcher.Kernel | None]],
) -> launcher.Run:
    """What runs a call on CUDA tensors in eager mode, from now on found by `key` and by the compiled shim.

    Args:
        asked: the options as the shim is called with them.
        prepare: gives what runs the call with these options.
    """
    run, kernel = prepare(call.options)
    entry = launcher.remember_compiled(given, asked, kernel)
    if any(t is not None and t.requires_grad for t in given):
        q, k, v, out, *extra = given
        how = gradients.route(call, q, k, v, (extra[0], extra[1])) if out is None else None
        inner, inner_entry = run, entry
        if how is not None and not call.options.return_lse:
            inner, with_lse = prepare(call.options._replace(return_lse=True))
            inner_entry = launcher.remember_compiled(given, (*asked[:4], True, *asked[5:]), with_lse)
        compiled = entry is not None and inner_entry is not None
        apply, backward = _graph(inner, call, how, compiled=compiled)
        if compiled:
            node.load()
            shim.differentiate(entry, inner_entry, apply, backward, keeps=how is not None)
        run = _with_gradients(run, apply)
    launcher.remember(key, given, run)
    return run


def _with_gradients(run: launcher.Run, apply: Callable[..., Any]) -> launcher.Run:
    """`run` for tensors of which one requires grad, whatever the grad mode is when it is called."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, a: Tensor | None = None, b: Tensor | None = None
    ) -> Any:
        if not torch.is_grad_enabled():
            return run(q, k, v, out, a, b)
        if out is not None:
            return None  # refused by what looks at the call next
        return apply(q, k, v) if a is None and b is None else apply(q, k, v, a, b)

    return call


def _graph(
    run: launcher.Run, call: gradients.Call, how: str | None, *, compiled: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """apply(q, k, v[, extra, extra]) and backward of an autograd.Function for calls that look like one seen before.

    The operators have the same gradients registered but take longer to get there.

    Args:
        run: computes the call, with lse where `how` or the caller wants it.
        how: what gradients.route says.
        compiled: whether the compiled shim serves it, too.
    """
    gives_lse, keeps = call.options.return_lse, how is not None

    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *extra: Tensor | None) -> Any:
        result: Any = run(q, k, v, None, *(extra or (None, None)))
        ctx.save_for_backward(q, k, v, *extra, *(result if keeps else ()))
        if gives_lse:
            ctx.set_materialize_grads(False)
        return result[0] if keeps and not gives_lse else result

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        found = (*_backward(ctx, call, how, grad_out, grad_lse), None)
        return found[: len(ctx.needs_input_grad)]

    outer = shim.forward(forward, keeps=keeps, gives_lse=gives_lse) if compiled else forward
    methods = {"forward": staticmethod(outer), "backward": staticmethod(backward)}
    return apply_function(type("Attention", (torch.autograd.Function,), methods)), backward


class Transformable(torch.autograd.Function):
    """A call under functorch, which can't differentiate an operator registered from Python.

    Its separate set-up, which functorch asks for, costs 30 microseconds a call.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, call: gradients.Call
    ) -> Any:
        return by_operator(q, k, v, None, (a, b), call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.call = inputs[5]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, ctx.call, None, grad_out, grad_lse), None, None)


def _backward(
    ctx: Any, call: gradients.Call, how: str | None, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and the mask from what a context has kept: q, k, v, two more if the call has them, and
    output and lse if `how` reads them.
    """
    grad_lse = grad_lse if call.options.return_lse else None
    if grad_out is None and grad_lse is None:
        return (None,) * 4
    q, k, v, *rest = ctx.saved_tensors
    out, lse = (rest.pop(-2), rest.pop()) if how is not None else (None, None)
    a, b = rest or (None, None)
    wants_mask = call.longest is None and a is not None and ctx.needs_input_grad[3]
    return gradients.backward(call, how, q, k, v, (a, b), out, lse, grad_out, grad_lse, wants_mask=wants_mask)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    q, k, v, a, b, *longest = inputs
    ctx.call = gradients.Call(_options(keyword_only_inputs), tuple(longest) or None)
    ctx.how = gradients.route(ctx.call, q, k, v, (a, b)) if ctx.call.options.return_lse else None
    ctx.save_for_backward(q, k, v, a, b, *(output if ctx.how else ()))
    ctx.set_materialize_grads(False)


def _registered(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) if ctx.call.longest is None else (None, None, None)
    return (*_backward(ctx, ctx.call, ctx.how, grad_out, grad_lse), *rest)


for _name, _kernels, _fakes in (
    ("attention", {"CUDA": _cuda, "CPU": _cpu}, _fake),
    ("attention_out", {"CUDA": _cuda_out, "CPU": _cpu_out}, _fake_out),
    ("attention_varlen", {"CUDA": _packed_cuda, "CPU": _packed_cpu}, _packed_fake),
    ("attention_varlen_out", {"CUDA": _packed_cuda_out, "CPU": _packed_cpu_out}, _packed_fake_out),
):
    for _device, _kernel in _kernels.items():
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"flashcore::{_name}", _fakes, lib=_library)
for _name in ("attention", "attention_varlen"):
    torch.library.register_autograd(f"flashcore::{_name}", _registered, setup_context=_save, lib=_library)
torch.library.register_vmap("flashcore::attention", _vmap, lib=_library)
