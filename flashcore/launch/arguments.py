"""What a call of attention may look like: every check that needs no kernel, and the Problem it describes.

All of it reads metadata only, so that it costs no synchronisation and also holds for fake tensors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.core.problem import Problem, Strides

LAYOUTS = ("bhsd", "bshd")
BACKENDS = (None, "hopper", "portable", "reference")
ALIGNMENT = 16  # bytes that one vector load, and one TMA box row, start at a multiple of


class Options(NamedTuple):
    """The options of a call that kernels serve, as the operator's schema names them."""

    block_m: int | None = None
    block_n: int | None = None
    is_causal: bool = False
    scale: float | None = None
    return_lse: bool = False
    layout: str = "bhsd"
    backend: str | None = None

    def scale_for(self, head_dim: int) -> float:
        """The factor of the scores: D ** -0.5 where the caller named none."""
        return float(head_dim) ** -0.5 if self.scale is None else float(self.scale)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: an argument is none.
    """
    inputs = (("q", q), ("k", k), ("v", v))
    for name, tensor in inputs if out is None else (*inputs, ("out", out)):
        if not isinstance(tensor, Tensor):
            raise TypeError(_message(name, "a torch.Tensor", type(tensor).__name__))


def check(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None = None) -> None:
    """Refuse what is no attention problem.

    Raises:
        TypeError: an argument is not of its parameter's type.
        ValueError: shapes, strides, devices, dtypes or options that contradict each other.
        RuntimeError: `out` is given where a gradient would be needed.
    """
    check_tensors(q, k, v, out)
    _check_options(options)
    inputs = (("q", q), ("k", k), ("v", v))
    for name, tensor in inputs:
        if tensor.dim() != 4:
            raise ValueError(_message(name, f"4 dimensions, {_axes(options.layout)}", f"{list(tensor.shape)}"))
    for name, tensor in inputs[1:]:
        if tensor.device != q.device:
            raise ValueError(_message(name, f"q's device, {q.device}", f"{tensor.device}"))
        if tensor.dtype != q.dtype:
            raise ValueError(_message(name, f"q's dtype, {q.dtype}", f"{tensor.dtype}"))
    if not q.dtype.is_floating_point:
        raise ValueError(_message("q", "a floating-point dtype", f"{q.dtype}"))
    _check_shapes(q, k, v, options.layout)
    for name, tensor in inputs:
        _check_last_dimension(name, tensor)
    if out is not None:
        _check_out(q, k, v, out)


def check_extras(
    q: Tensor, k: Tensor, layout: str, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,
) -> None:
    """Refuse options of a checked call that make no sense, whether or not a kernel serves them.

    Raises:
        TypeError, ValueError: as `check`.
    """
    if len(window) != 2 or not all(isinstance(side, int) and side >= -1 for side in window):
        raise ValueError(_message("window", "two ints of at least -1, (left, right)", repr(window)))
    if not isinstance(softcap, (int, float)) or not 0 <= softcap < math.inf:
        raise ValueError(_message("softcap", "a finite number of at least 0", repr(softcap)))
    b, h, s = _order(layout)
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(_message("attn_mask", "a torch.Tensor", type(attn_mask).__name__))
        if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
            raise ValueError(_message("attn_mask", "a bool or floating-point dtype", f"{attn_mask.dtype}"))
        scores = (q.shape[b], q.shape[h], q.shape[s], k.shape[s])
        padded = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if len(padded) != 4 or any(m not in (1, n) for m, n in zip(padded, scores, strict=True)):
            raise ValueError(_message("attn_mask", f"a shape that broadcasts to {list(scores)}", list(attn_mask.shape)))
        if attn_mask.device != q.device:
            raise ValueError(_message("attn_mask", f"q's device, {q.device}", f"{attn_mask.device}"))
    if seqused_k is not None:
        if not isinstance(seqused_k, Tensor):
            raise TypeError(_message("seqused_k", "a torch.Tensor", type(seqused_k).__name__))
        if seqused_k.dtype != torch.int32 or tuple(seqused_k.shape) != (q.shape[b],):
            got = f"{seqused_k.dtype} {list(seqused_k.shape)}"
            raise ValueError(_message("seqused_k", f"int32 [{q.shape[b]}]", got))
        if seqused_k.device != q.device:
            raise ValueError(_message("seqused_k", f"q's device, {q.device}", f"{seqused_k.device}"))


def output_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """The output's shape, in the caller's layout."""
    return (*q.shape[:-1], v.shape[-1])


def lse_shape(q: Tensor, layout: str) -> tuple[int, int, int]:
    """[B, Hq, Sq], whatever the layout of q."""
    b, h, s = _order(layout)
    return q.shape[b], q.shape[h], q.shape[s]


def problem_of(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options) -> Problem:
    """Describe a call that `check` passed; without `out`, the output is contiguous in the call's layout."""
    b, h, s = _order(options.layout)
    shape = output_shape(q, v)
    if out is None:
        row = shape[3]
        stride_out: tuple[int, ...] = (shape[1] * shape[2] * row, shape[2] * row, row)
    else:
        stride_out = out.stride()
    addresses = [t.data_ptr() for t in (q, k, v, out) if t is not None]  # what torch allocates is aligned

    def strides(of: tuple[int, ...]) -> Strides:
        return of[b], of[h], of[s]

    return Problem(
        dtype=q.dtype, batch=q.shape[b], heads_q=q.shape[h], heads_kv=k.shape[h], seqlen_q=q.shape[s],
        seqlen_k=k.shape[s], head_dim=q.shape[3], head_dim_v=v.shape[3],
        stride_q=strides(q.stride()), stride_k=strides(k.stride()), stride_v=strides(v.stride()),
        stride_o=strides(stride_out), aligned=all(a % ALIGNMENT == 0 for a in addresses),
        is_causal=options.is_causal, return_lse=options.return_lse,
    )  # fmt: skip


def span(tensor: Tensor) -> tuple[int, int]:
    """The bytes [first, last) of memory that a tensor reaches; equal ends where it has no elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


# -- the checks -------------------------------------------------------------------------------------------------


def _check_options(o: Options) -> None:
    for name, block in (("block_m", o.block_m), ("block_n", o.block_n)):
        if block is not None and (not isinstance(block, int) or isinstance(block, bool)):
            raise TypeError(_message(name, "an int or None", repr(block)))
    for name, flag in (("is_causal", o.is_causal), ("return_lse", o.return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(_message(name, "a bool", repr(flag)))
    if o.scale is not None:
        if not isinstance(o.scale, (int, float)) or isinstance(o.scale, bool):
            raise TypeError(_message("scale", "a number or None", repr(o.scale)))
        if not math.isfinite(o.scale):
            raise ValueError(_message("scale", "a finite number", repr(o.scale)))
    if o.layout not in LAYOUTS:
        raise ValueError(_message("layout", " or ".join(map(repr, LAYOUTS)), repr(o.layout)))
    if o.backend not in BACKENDS:
        raise ValueError(_message("backend", f"one of {', '.join(map(repr, BACKENDS))}", repr(o.backend)))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    b, h, s = _order(layout)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[b] != q.shape[b]:
            raise ValueError(_message(name, f"q's batch, {q.shape[b]}", f"{tensor.shape[b]} in {list(tensor.shape)}"))
    if k.shape[3] != q.shape[3]:
        raise ValueError(_message("k", f"q's head dimension, {q.shape[3]}", f"{k.shape[3]} in {list(k.shape)}"))
    for axis, what in ((h, "heads"), (s, "length")):
        if v.shape[axis] != k.shape[axis]:
            raise ValueError(_message("v", f"k's {what}, {k.shape[axis]}", f"{v.shape[axis]} in {list(v.shape)}"))
    if k.shape[h] == 0 or q.shape[h] % k.shape[h] != 0:
        raise ValueError(_message("q", f"a multiple of k's {k.shape[h]} heads", f"{q.shape[h]} in {list(q.shape)}"))
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] == 0:
            raise ValueError(_message(name, "a head dimension of at least 1", f"{list(tensor.shape)}"))


def _check_last_dimension(name: str, tensor: Tensor) -> None:
    if tensor.stride(3) != 1 and tensor.shape[3] != 1 and tensor.numel() != 0:
        raise ValueError(_message(name, "a contiguous last dimension (stride 1)", f"strides {list(tensor.stride())}"))


def _check_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    shape = output_shape(q, v)
    if tuple(out.shape) != shape:
        raise ValueError(_message("out", f"shape {list(shape)}", f"{list(out.shape)}"))
    if out.device != q.device:
        raise ValueError(_message("out", f"q's device, {q.device}", f"{out.device}"))
    if out.dtype != q.dtype:
        raise ValueError(_message("out", f"q's dtype, {q.dtype}", f"{out.dtype}"))
    _check_last_dimension("out", out)
    extent = 1  # elements that the dimensions so far reach
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < extent and out.numel() != 0:
            raise ValueError(_message("out", "elements that do not share memory", f"strides {list(out.stride())}"))
        extent += stride * (size - 1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, out)):
        raise RuntimeError("out: writing into a tensor has no gradient, but an argument requires one")


def check_overlap(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Refuse an `out` whose range of memory meets an input's: kernels read some rows after writing others.

    Raises:
        ValueError: it does; ranges are compared, so interleaved tensors count as meeting.
    """
    first, last = span(out)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        start, end = span(tensor)
        if first < end and start < last:
            raise ValueError(_message("out", f"memory apart from {name}'s", "an overlap"))


def _order(layout: str) -> tuple[int, int, int]:
    return (0, 1, 2) if layout == "bhsd" else (0, 2, 1)


def _axes(layout: str) -> str:
    return "[B, H, S, D]" if layout == "bhsd" else "[B, S, H, D]"


def _message(name: str, expected: str, got: Any) -> str:
    return f"{name}: expected {expected}, got {got}"
