"""The gradients of attention: torch's own backward kernels where they serve a call, elsewhere by definition.

flash       aten::_flash_attention_backward: half precision, no mask, no softcap; also windows and packed sequences
efficient   aten::_efficient_attention_backward: masks and key counts as a bias, fp32, and v of another head dimension
definition  torch operations, from scores computed anew in fp32: softcap, a scale that is not positive, a gradient of
            lse, CPU tensors, second order

The first two read the forward pass's output and log-sum-exp. Neither is deterministic by itself: the order in which
blocks add to one gradient changes its last bits. torch.use_deterministic_algorithms(True) makes the first one so, and
calls that the second would serve are then computed by definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from flashcore.core import target as targets
from flashcore.launch.arguments import ALIGNMENT, Options, bounds

_flash_kernel = torch.ops.aten._flash_attention_backward
_efficient_kernel = torch.ops.aten._efficient_attention_backward
_LSE_ROWS = 32  # the efficient kernel reads the log-sum-exps of a head in units of this many rows
_FLASH_ANYWHERE = 192  # flash's backward of larger heads wants the shared memory of sm_80 or sm_90
_BOTTOM_RIGHT = 2  # the efficient kernel's name for causal with the last row at the last key; 0 = the bias alone

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]  # of q, k, v and the mask
Extra = tuple[Tensor | None, Tensor | None]  # attn_mask and seqused_k, or cu_seqlens_q and cu_seqlens_k


class Call(NamedTuple):
    """What the gradients of a call depend on beside its tensors."""

    options: Options
    longest: tuple[int, int] | None = None  # max_seqlen_q and max_seqlen_k where sequences are packed


def route(call: Call, q: Tensor, k: Tensor, v: Tensor, extra: Extra) -> str | None:
    """What computes the gradients of a call from its output and log-sum-exp; None = by definition, without them."""
    options, packed = call.options, call.longest is not None
    dim, dim_v = q.shape[-1], v.shape[-1]
    if q.device.type != "cuda" or not torch.cuda.is_available() or options.backend == "reference" or options.softcap:
        return None
    if dim % 8 or dim_v % 8 or 0 in (q.numel(), k.numel(), *(call.longest or ())):
        return None
    if options.scale_for(dim) <= 0:  # both kernels scale what they have hidden, -inf
        return None
    arch = targets.current(q.device.index).arch
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and arch >= 80 and dim == dim_v and (packed or extra == (None, None)):
        return "flash" if dim <= (256 if arch in (80, 90) else _FLASH_ANYWHERE) else None
    if packed or not (half or q.dtype == torch.float32) or torch.are_deterministic_algorithms_enabled():
        return None
    # The bias has q's dtype, out of whose range a mask of another one might lead.
    return "efficient" if extra[0] is None or extra[0].dtype in (torch.bool, q.dtype) else None


def backward(
    call: Call, how: str | None, q: Tensor, k: Tensor, v: Tensor, extra: Extra, out: Tensor | None,
    lse: Tensor | None, grad_out: Tensor | None, grad_lse: Tensor | None, *, wants_mask: bool = False,
) -> Gradients:
    """The gradients of q, k, v and the mask from those of the output and of lse, of which one may be None.

    Args:
        how: what `route` said of the call, whose results `out` and `lse` then are.
        wants_mask: whether the mask's gradient is to be computed, too.
    """
    # torch's kernels have no derivative of their own: what is to be differentiated again goes by definition.
    if how is not None and grad_out is not None and grad_lse is None and not torch.is_grad_enabled():
        assert out is not None and lse is not None
        if how == "flash":
            return (*_flash(call, q, k, v, extra, out, lse, grad_out), None)
        return _efficient(call.options, q, k, v, extra, out, lse, grad_out, wants_mask)
    if call.longest is None:
        bshd = call.options.layout == "bshd"
        grad_out = None if grad_out is None else _swap(grad_out, bshd)
        grad_q, grad_k, grad_v, grad_mask = _by_definition(
            _swap(q, bshd), _swap(k, bshd), _swap(v, bshd), extra, grad_out, grad_lse, call.options, wants_mask
        )
        grad_q, grad_k, grad_v = (_swap(g, bshd).to(q.dtype) for g in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v, grad_mask
    cu_seqlens_q, cu_seqlens_k = extra
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    rows = _Sequences.of(cu_seqlens_q, q.shape[0], call.longest[0])
    keys = _Sequences.of(cu_seqlens_k, k.shape[0], call.longest[1])
    grad_out = None if grad_out is None else rows.unpack(grad_out)
    grad_lse = None if grad_lse is None else rows.unpack(grad_lse.mT.unsqueeze(-1)).squeeze(-1)
    grad_q, grad_k, grad_v, _ = _by_definition(
        rows.unpack(q), keys.unpack(k), keys.unpack(v), (None, keys.lengths), grad_out, grad_lse, call.options,
        False, rows.lengths,
    )  # fmt: skip
    return rows.pack(grad_q, q), keys.pack(grad_k, k), keys.pack(grad_v, v), None


# -- by definition ----------------------------------------------------------------------------------------------


def _by_definition(
    q: Tensor, k: Tensor, v: Tensor, extra: Extra, grad_out: Tensor | None, grad_lse: Tensor | None,
    options: Options, wants_mask: bool, seqused_q: Tensor | None = None,
) -> Gradients:
    """From scores computed anew, in fp32 (fp64 for fp64); q, k, v, grad_out and the results are [B, H, S, D].

    Written in torch operations on the inputs alone, so that it can itself be differentiated, compiled and traced.
    It holds the scores [B, Hq, Sq, Sk] of the whole problem several times, unlike the forward pass.
    """
    mask, seqused_k = extra
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads_q, seqlen_q, dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    group = heads_q // heads_kv
    if seqused_k is not None:  # what stands behind the last key in use is anything
        unused = torch.arange(seqlen_k, device=k.device)[:, None] >= seqused_k.view(-1, 1, 1, 1)
        k, v = k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0)
    qh = q.to(precision).unflatten(1, (heads_kv, group))  # [B, Hkv, group, Sq, D]
    kh, vh = (t.to(precision).unsqueeze(2) for t in (k, v))
    scale = options.scale_for(dim)

    scores, slope = (qh @ kh.mT) * scale, None
    if options.softcap:
        capped = (scores / options.softcap).tanh()
        scores, slope = capped * options.softcap, 1 - capped * capped
    hidden = _hidden(options, seqlen_q, seqlen_k, seqused_q, seqused_k, q.device)
    if mask is not None:
        full = mask.expand(batch, heads_q, seqlen_q, seqlen_k).unflatten(1, (heads_kv, group))
        if mask.dtype != torch.bool:
            scores = scores + full.to(precision)
        else:
            hidden = ~full if hidden is None else hidden | ~full
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if hidden is None and mask is None:
        weights = scores.softmax(-1)
    else:  # rows that read no key: their weights are 0, not 0 / 0
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)

    if grad_out is None:
        grad_v = torch.zeros_like(v, dtype=precision)
        grad_scores = torch.zeros_like(weights)
    else:
        g = grad_out.to(precision).unflatten(1, (heads_kv, group))
        grad_v = (weights.mT @ g).sum(2)
        grad_weights = g @ vh.mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    if grad_lse is not None:
        grad_scores = grad_scores + weights * grad_lse.to(precision).unflatten(1, (heads_kv, group)).unsqueeze(-1)
    grad_mask = None
    if wants_mask:
        assert mask is not None
        grad_mask = grad_scores.flatten(1, 2).sum_to_size(mask.shape).to(mask.dtype)
    if slope is not None:
        grad_scores = grad_scores * slope
    return (grad_scores @ kh).flatten(1, 2) * scale, (grad_scores.mT @ qh).sum(2) * scale, grad_v, grad_mask


def _hidden(
    options: Options, seqlen_q: int, seqlen_k: int, seqused_q: Tensor | None, seqused_k: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys a row may not read by is_causal, window and lengths: bool, broadcastable to [B, 1, 1, Sq, Sk]."""
    left, right = options.window
    right = 0 if options.is_causal else right
    j = torch.arange(seqlen_k, device=device)
    used_q, used_k = (
        total if used is None else used.clamp(0, total).view(-1, 1, 1, 1, 1)
        for used, total in ((seqused_q, seqlen_q), (seqused_k, seqlen_k))
    )
    diagonal = torch.arange(seqlen_q, device=device)[:, None] + used_k - used_q
    parts = []
    if seqused_k is not None:
        parts.append(j >= used_k)
    if left >= 0:
        parts.append(j < diagonal - left)
    if right >= 0:
        parts.append(j > diagonal + right)
    hidden = None
    for part in parts:
        hidden = part if hidden is None else hidden | part
    return hidden


class _Sequences(NamedTuple):
    """Packed sequences as a rectangle: where each of its rows is, and which of them there are."""

    rows: Tensor  # int64 [B, longest], of the packed tensor
    valid: Tensor  # bool [B, longest, 1, 1]
    lengths: Tensor  # [B]

    @staticmethod
    def of(cu_seqlens: Tensor, total: int, longest: int) -> _Sequences:
        ends = cu_seqlens.clamp(0, total)  # as kernels clamp them
        lengths = ends.diff().clamp(0, longest)
        at = torch.arange(longest, device=cu_seqlens.device)
        rows = (ends[:-1, None] + at).clamp(max=max(total - 1, 0))
        return _Sequences(rows, (at < lengths[:, None])[..., None, None], lengths)

    def unpack(self, packed: Tensor) -> Tensor:
        """[total, H, D] -> [B, H, longest, D], with 0 where a sequence has no row."""
        return packed[self.rows].masked_fill(~self.valid, 0.0).transpose(1, 2)

    def pack(self, dense: Tensor, like: Tensor) -> Tensor:
        """[B, H, longest, D] -> [total, H, D] as `like`, with 0 in rows of no sequence."""
        rows = dense.transpose(1, 2).masked_fill(~self.valid, 0.0)
        total = torch.zeros_like(like, dtype=dense.dtype, memory_format=torch.contiguous_format)
        return total.index_add(0, self.rows.flatten(), rows.flatten(0, 1)).to(like.dtype)


# -- by torch's kernels, which take [B, S, H, D] ------------------------------------------------------------------


def _flash(
    call: Call, q: Tensor, k: Tensor, v: Tensor, extra: Extra, out: Tensor, lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    options = call.options
    heads_first = call.longest is None and options.layout == "bhsd"
    cu_seqlens: Extra = None, None
    if call.longest is None:
        seqlen_q, seqlen_k = lse.shape[2], k.shape[2 if heads_first else 1]
    else:
        seqlen_q, seqlen_k = call.longest
        assert extra[0] is not None and extra[1] is not None
        # Its kernel believes them, so they are clamped here. In order they are, unless they are wrong.
        cu_q, cu_k = extra[0].clamp(0, q.shape[0]), extra[1].clamp(0, k.shape[0])
        cu_seqlens = cu_q.cummax(0).values, cu_k.cummax(0).values
    is_causal, (left, right) = bounds(options, seqlen_q, seqlen_k)
    tensors = [_by_vectors(_swap(t, heads_first)) for t in (grad_out, q, k, v, out)]
    dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # not read
    grads = _flash_kernel(
        *tensors, lse, *cu_seqlens, seqlen_q, seqlen_k, 0.0, is_causal, *dropout,
        scale=options.scale_for(q.shape[-1]), window_size_left=left, window_size_right=0 if is_causal else right,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (_swap(g, heads_first) for g in grads)
    return grad_q, grad_k, grad_v


def _efficient(
    options: Options, q: Tensor, k: Tensor, v: Tensor, extra: Extra, out: Tensor, lse: Tensor, grad_out: Tensor,
    wants_mask: bool,
) -> Gradients:
    heads_first = options.layout == "bhsd"
    mask, seqused_k = extra
    grad_out, q, k, v, out = (_swap(t, heads_first) for t in (grad_out, q, k, v, out))
    batch, seqlen_q, heads_q, dim = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    group = heads_q // heads_kv
    if group > 1:
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    is_causal, window = bounds(options, seqlen_q, seqlen_k)
    # With a bias beside its own causal mask the kernel gave NaN: then the bias says it all.
    structure = _BOTTOM_RIGHT if is_causal and window == (-1, -1) and extra == (None, None) else 0
    bias = _bias(options, q, seqlen_k, extra, structured=structure == 0)
    rows = -(-seqlen_q // _LSE_ROWS) * _LSE_ROWS
    # A row that reads no key has lse -inf, which would make NaN of its weights; +inf makes 0 of them.
    lse = F.pad(lse.masked_fill(lse == -torch.inf, torch.inf), (0, rows - seqlen_q), value=torch.inf)
    packed = out.contiguous()  # whatever its strides, the kernel takes this one's rows to be heads_q * dim_v apart
    dropout = torch.empty(0, dtype=torch.int64, device=q.device)  # not read
    grad_q, grad_k, grad_v, grad_bias = _efficient_kernel(
        _by_vectors(grad_out), _by_vectors(q), _by_vectors(k), _by_vectors(v), bias, packed, None, None,
        seqlen_q, seqlen_k, lse, 0.0, dropout, dropout, structure, wants_mask, scale=options.scale_for(dim),
    )  # fmt: skip
    if group > 1:
        grad_k, grad_v = (g.unflatten(2, (heads_kv, group)).sum(3) for g in (grad_k, grad_v))
    grad_q, grad_k, grad_v = (_swap(g, heads_first) for g in (grad_q, grad_k, grad_v))
    grad_mask = grad_bias.sum_to_size(mask.shape) if wants_mask and mask is not None else None
    return grad_q, grad_k, grad_v, grad_mask


def _bias(options: Options, q: Tensor, seqlen_k: int, extra: Extra, *, structured: bool) -> Tensor | None:
    """All that hides or shifts scores as one tensor to add: [B, Hq, Sq, Sk], of q's dtype, rows in 16-byte steps."""
    mask, seqused_k = extra
    batch, seqlen_q, heads = q.shape[:3]
    hidden = None
    if structured:
        hidden = _hidden(options, seqlen_q, seqlen_k, None, seqused_k, q.device)
    if hidden is not None:
        hidden = hidden.view(hidden.shape[0] if hidden.dim() == 5 else 1, 1, *hidden.shape[-2:])
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask if hidden is None else hidden | ~mask
        mask = None
    if mask is None and hidden is None:
        return None
    bias = torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else mask
    if hidden is not None:
        bias = torch.where(hidden, -torch.inf, bias)
    bias = bias.expand(*bias.shape[:-1], seqlen_k)
    step = ALIGNMENT // q.dtype.itemsize
    padded = F.pad(bias, (0, -seqlen_k % step)).contiguous()
    return padded[..., :seqlen_k].expand(batch, heads, seqlen_q, seqlen_k)


def _by_vectors(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with rows that can be read by 16 bytes."""
    step = ALIGNMENT // tensor.dtype.itemsize
    first = tensor.storage_offset() % step if type(tensor) not in (Tensor, Parameter) else tensor.data_ptr() % ALIGNMENT
    readable = tensor.stride(-1) == 1 and first == 0 and all(s % step == 0 for s in tensor.stride()[:-1])
    return tensor if readable else tensor.contiguous()


def _swap(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.transpose(1, 2) if wanted else tensor
