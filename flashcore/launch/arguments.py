"""What a call of attention may look like: every check that needs no kernel, and the Problem it describes.

All of it reads metadata only, so that it costs no synchronisation and also holds for fake tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.core.problem import Mask, Problem, Strides

LAYOUTS = ("bhsd", "bshd")
BACKENDS = (None, "hopper", "portable", "reference")
LARGEST = 1e18  # of scale, softcap and 1 / softcap: their products fit float32, in which kernels take them
MOST = 2**63 - 1  # of any int: what an operator's schema holds
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
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    def scale_for(self, head_dim: int) -> float:
        """The factor of the scores: D ** -0.5 where the caller named none."""
        return float(head_dim) ** -0.5 if self.scale is None else float(self.scale)


def check_tensors(**arguments: Tensor | None) -> None:
    """Refuse what is no tensor; None is an argument that was left out, except for q, k and v.

    Raises:
        TypeError: an argument is none.
    """
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("q", "k", "v")):
            raise TypeError(_message(name, "a torch.Tensor", type(tensor).__name__))


def check(
    q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None = None, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> None:
    """Refuse what is no attention problem.

    Raises:
        TypeError: an argument is not of its parameter's type.
        ValueError: shapes, strides, devices, dtypes or options that contradict each other.
        RuntimeError: `out` is given where a gradient would be needed.
    """
    check_tensors(q=q, k=k, v=v, out=out, attn_mask=attn_mask, seqused_k=seqused_k)
    _check_options(options)
    _check_inputs(q, k, v, 4, "[B, H, S, D]" if options.layout == "bhsd" else "[B, S, H, D]")
    b, h, s = _order(options.layout)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[b] != q.shape[b]:
            raise ValueError(_message(name, f"q's batch, {q.shape[b]}", f"{tensor.shape[b]} in {list(tensor.shape)}"))
    _check_sizes(q, k, v, h, s)
    if attn_mask is not None:
        _check_mask(attn_mask, q, (q.shape[b], q.shape[h], q.shape[s], k.shape[s]))
    if seqused_k is not None:
        _check_lengths("seqused_k", seqused_k, q, q.shape[b])
    if out is not None:
        _check_out(q, k, v, out, attn_mask)


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, options: Options, out: Tensor | None = None,
) -> None:
    """Refuse what is no attention problem of packed sequences, [total, H, D].

    Raises:
        As `check`.
    """
    check_tensors(q=q, k=k, v=v, out=out)
    _check_options(options)
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(most, (int, torch.SymInt)) or isinstance(most, bool):
            raise TypeError(_message(name, "an int", repr(most)))
        if most < 0:
            raise ValueError(_message(name, "an int of at least 0", repr(most)))
    _check_inputs(q, k, v, 3, "[total, H, D]")
    _check_sizes(q, k, v, 1, 0)
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(lengths, Tensor):
            raise TypeError(_message(name, "a torch.Tensor", type(lengths).__name__))
        if lengths.dim() != 1 or lengths.shape[0] == 0:
            raise ValueError(_message(name, "int32 [B + 1]", f"{lengths.dtype} {list(lengths.shape)}"))
        _check_lengths(name, lengths, q, cu_seqlens_q.shape[0])
    if out is not None:
        _check_out(q, k, v, out)


def output_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """The output's shape, in the caller's layout."""
    return (*q.shape[:-1], v.shape[-1])


def lse_shape(q: Tensor, layout: str) -> tuple[int, int, int]:
    """[B, Hq, Sq], whatever the layout of q."""
    b, h, s = _order(layout)
    return q.shape[b], q.shape[h], q.shape[s]


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Problem:
    """Describe a call that `check` passed; without `out`, the output is contiguous in the call's layout."""
    b, h, s = _order(options.layout)
    shape = output_shape(q, v)
    if out is None:
        row = shape[3]
        stride_out: tuple[int, ...] = (shape[1] * shape[2] * row, shape[2] * row, row)
    else:
        stride_out = out.stride()
    is_causal, window = bounds(options, q.shape[s], k.shape[s])
    mask = None
    if attn_mask is not None:
        mask = Mask(attn_mask.dtype, _mask_strides(attn_mask), attn_mask.data_ptr() % ALIGNMENT == 0)

    def strides(of: tuple[int, ...]) -> Strides:
        return of[b], of[h], of[s]

    return Problem(
        dtype=q.dtype, batch=q.shape[b], heads_q=q.shape[h], heads_kv=k.shape[h], seqlen_q=q.shape[s],
        seqlen_k=k.shape[s], head_dim=q.shape[3], head_dim_v=v.shape[3],
        stride_q=strides(q.stride()), stride_k=strides(k.stride()), stride_v=strides(v.stride()),
        stride_o=strides(stride_out), aligned=_aligned(q, k, v, out), is_causal=is_causal,
        return_lse=options.return_lse, window=window, softcap=float(options.softcap), mask=mask,
        seqused_k=seqused_k is not None,
    )  # fmt: skip


def packed_problem_of(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, sequences: int, max_seqlen_q: int, max_seqlen_k: int,
    options: Options,
) -> Problem:
    """Describe a call that `check_packed` passed; without `out`, the output is contiguous."""
    heads, columns = q.shape[1], v.shape[2]
    stride_out = (heads * columns, columns) if out is None else out.stride()
    is_causal, window = bounds(options, max_seqlen_q, max_seqlen_k)

    def strides(of: tuple[int, ...]) -> Strides:
        return 0, of[1], of[0]

    return Problem(
        dtype=q.dtype, batch=sequences, heads_q=heads, heads_kv=k.shape[1], seqlen_q=max_seqlen_q,
        seqlen_k=max_seqlen_k, head_dim=q.shape[2], head_dim_v=columns, stride_q=strides(q.stride()),
        stride_k=strides(k.stride()), stride_v=strides(v.stride()), stride_o=strides(stride_out),
        aligned=_aligned(q, k, v, out), is_causal=is_causal, return_lse=options.return_lse, window=window,
        softcap=float(options.softcap), packed=(q.shape[0], k.shape[0]),
    )  # fmt: skip


def _aligned(*tensors: Tensor | None) -> bool:
    return all(t.data_ptr() % ALIGNMENT == 0 for t in tensors if t is not None)  # what torch allocates always is


def bounds(options: Options, seqlen_q: int, seqlen_k: int) -> tuple[bool, tuple[int, int]]:
    """is_causal and window with every bound left out that hides nothing: others would cost another kernel.

    The last row's diagonal is the last key, the first row's is at most seqlen_q - 1 keys before it.
    """
    left, right = options.window
    right = 0 if options.is_causal else right
    left = -1 if left >= seqlen_k - 1 else left
    right = -1 if right >= seqlen_q - 1 else right
    return right == 0, (left, -1 if right == 0 else right)


def _mask_strides(mask: Tensor) -> tuple[int, int, int, int]:
    strides = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    batch, head, row, key = [0] * (4 - len(strides)) + strides
    return batch, head, row, key


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
        if block is not None and abs(block) > MOST:
            raise ValueError(_message(name, f"an int of at most {MOST}", _short(block)))
    for name, flag in (("is_causal", o.is_causal), ("return_lse", o.return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(_message(name, "a bool", repr(flag)))
    if o.scale is not None:
        if not isinstance(o.scale, (int, float)) or isinstance(o.scale, bool):
            raise TypeError(_message("scale", "a number or None", repr(o.scale)))
        if not -LARGEST <= o.scale <= LARGEST:  # NaN fails; symbols compare, math.isfinite refuses them
            raise ValueError(_message("scale", f"a finite number of at most {LARGEST:g}", _short(o.scale)))
    window: Any = o.window  # whatever the caller gave
    if not isinstance(window, (tuple, list)):
        raise TypeError(_message("window", "two ints, (left, right)", repr(window)))
    if len(window) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and -1 <= n <= MOST for n in window):
        least = f"two ints from -1 to {MOST}, (left, right)"
        raise ValueError(_message("window", least, f"({', '.join(map(_short, window))})"))
    if not isinstance(o.softcap, (int, float)) or not (o.softcap == 0 or 1 / LARGEST <= o.softcap <= LARGEST):
        between = f"0 or a finite number from {1 / LARGEST:g} to {LARGEST:g}"
        raise ValueError(_message("softcap", between, _short(o.softcap)))
    if o.layout not in LAYOUTS:
        raise ValueError(_message("layout", " or ".join(map(repr, LAYOUTS)), repr(o.layout)))
    if o.backend not in BACKENDS:
        raise ValueError(_message("backend", f"one of {', '.join(map(repr, BACKENDS))}", repr(o.backend)))


def _short(value: object) -> str:
    """repr of what may be an int of any length, which Python refuses to print."""
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > LARGEST else repr(value)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, dims: int, axes: str) -> None:
    inputs = (("q", q), ("k", k), ("v", v))
    for name, tensor in inputs:
        if tensor.dim() != dims:
            raise ValueError(_message(name, f"{dims} dimensions, {axes}", f"{list(tensor.shape)}"))
    for name, tensor in inputs[1:]:
        _check_device(name, tensor, q)
        if tensor.dtype != q.dtype:
            raise ValueError(_message(name, f"q's dtype, {q.dtype}", f"{tensor.dtype}"))
    if not q.dtype.is_floating_point:
        raise ValueError(_message("q", "a floating-point dtype", f"{q.dtype}"))
    for name, tensor in inputs:
        _check_last_dimension(name, tensor)


def _check_sizes(q: Tensor, k: Tensor, v: Tensor, h: int, s: int) -> None:
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(_message("k", f"q's head dimension, {q.shape[-1]}", f"{k.shape[-1]} in {list(k.shape)}"))
    for axis, what in ((h, "heads"), (s, "length")):
        if v.shape[axis] != k.shape[axis]:
            raise ValueError(_message("v", f"k's {what}, {k.shape[axis]}", f"{v.shape[axis]} in {list(v.shape)}"))
    if k.shape[h] == 0 or q.shape[h] % k.shape[h] != 0:
        raise ValueError(_message("q", f"a multiple of k's {k.shape[h]} heads", f"{q.shape[h]} in {list(q.shape)}"))
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[-1] == 0:
            raise ValueError(_message(name, "a head dimension of at least 1", f"{list(tensor.shape)}"))


def _check_mask(mask: Tensor, q: Tensor, scores: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(_message("attn_mask", "a bool or floating-point dtype", f"{mask.dtype}"))
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(padded) != 4 or any(m not in (1, n) for m, n in zip(padded, scores, strict=True)):
        raise ValueError(_message("attn_mask", f"a shape that broadcasts to {list(scores)}", list(mask.shape)))
    _check_device("attn_mask", mask, q)


def _check_lengths(name: str, lengths: Tensor, q: Tensor, count: int) -> None:
    if lengths.dtype != torch.int32 or tuple(lengths.shape) != (count,):
        raise ValueError(_message(name, f"int32 [{count}]", f"{lengths.dtype} {list(lengths.shape)}"))
    if not lengths.is_contiguous():
        raise ValueError(_message(name, "a contiguous tensor", f"strides {list(lengths.stride())}"))
    _check_device(name, lengths, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(_message(name, f"q's device, {q.device}", f"{tensor.device}"))


def _check_last_dimension(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1 and tensor.numel() != 0:
        raise ValueError(_message(name, "a contiguous last dimension (stride 1)", f"strides {list(tensor.stride())}"))


def _check_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None = None) -> None:
    shape = output_shape(q, v)
    if tuple(out.shape) != shape:
        raise ValueError(_message("out", f"shape {list(shape)}", f"{list(out.shape)}"))
    _check_device("out", out, q)
    if out.dtype != q.dtype:
        raise ValueError(_message("out", f"q's dtype, {q.dtype}", f"{out.dtype}"))
    _check_last_dimension("out", out)
    extent = 1  # elements that the dimensions so far reach
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < extent and out.numel() != 0:
            raise ValueError(_message("out", "elements that do not share memory", f"strides {list(out.stride())}"))
        extent += stride * (size - 1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, out, mask) if t is not None):
        raise RuntimeError("out: writing into a tensor has no gradient, but an argument requires one")


def check_overlap(out: Tensor, **inputs: Tensor | None) -> None:
    """Refuse an `out` whose range of memory meets an input's: kernels read some rows after writing others.

    Raises:
        ValueError: it does; ranges are compared, so interleaved tensors count as meeting.
    """
    first, last = span(out)
    for name, tensor in inputs.items():
        start, end = (0, 0) if tensor is None else span(tensor)
        if first < end and start < last:
            raise ValueError(_message("out", f"memory apart from {name}'s", "an overlap"))


def _order(layout: str) -> tuple[int, int, int]:
    return (0, 1, 2) if layout == "bhsd" else (0, 2, 1)


def _message(name: str, expected: str, got: Any) -> str:
    return f"{name}: expected {expected}, got {got}"
