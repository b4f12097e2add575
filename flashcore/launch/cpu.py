"""Attention of CPU tensors: the reference path, and the portable kernel in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.errors import UnsupportedError
from flashcore.launch.arguments import Options, lse_shape, output_shape, problem_of


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options, **extras: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention of checked CPU tensors.

    `extras` are the options that only the reference path serves: window, softcap, attn_mask, seqused_k.
    Returns (out, lse), where lse is empty unless `options.return_lse`.
    """
    if options.backend in (None, "reference"):
        out, lse = reference(q, k, v, out, options, **extras)
    else:
        if extras:
            raise UnsupportedError("attention on CPU tensors", {str(options.backend): [f"no {', '.join(extras)}"]})
        if out is None:
            out = torch.empty(output_shape(q, v), dtype=q.dtype)
        lse = interpret(q, k, v, out, options)
    return out, lse if options.return_lse else lse.new_empty(0)


def reference(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options, **extras: Any
) -> tuple[Tensor, Tensor]:
    """flashcore.reference in the call's layout, on the tensors' own device. Returns (out, lse)."""
    from flashcore.reference import cpu

    bshd = options.layout == "bshd"
    qh, kh, vh = (t.transpose(1, 2) if bshd else t for t in (q, k, v))
    into = out.transpose(1, 2) if out is not None and bshd else out
    result, lse = cpu(
        qh, kh, vh, is_causal=options.is_causal, scale=options.scale, return_lse=True, out=into, **extras
    )  # fmt: skip
    if out is not None:
        return out, lse
    return result.transpose(1, 2).contiguous() if bshd else result, lse


def interpret(q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: Options) -> Tensor:
    """Run the portable kernel in Triton's interpreter, into `out`, with the tile an H100 would get. Returns lse.

    Raises:
        UnsupportedError: another kernel was asked for, or Triton was not told to interpret.
    """
    if options.backend != "portable":
        raise UnsupportedError("attention on CPU tensors", {str(options.backend): ["runs on NVIDIA GPUs only"]})
    from flashcore.launch import compiled, portable
    from flashcore.launch.select import select

    problem = problem_of(q, k, v, out, options)
    config = select(problem, targets.H100, backend="portable", block_m=options.block_m, block_n=options.block_n)
    binding = portable.bind(problem, config, options.scale_for(q.shape[-1]))
    if not compiled.interpreted(binding):
        why = "on CPU tensors it runs only in Triton's interpreter; set TRITON_INTERPRET=1 before the first import"
        raise UnsupportedError("attention on CPU tensors", {"portable": [why]})
    lse = torch.empty(lse_shape(q, options.layout), dtype=torch.float32)
    if 0 not in out.shape:
        compiled.interpret(binding, {"q": q, "k": k, "v": v, "o": out, "lse": lse})
    return lse
