"""Attention of CPU tensors: the reference path, and the portable kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Problem
from flashcore.launch.arguments import Options, lse_shape, output_shape, packed_problem_of, problem_of


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of checked CPU tensors. Returns (out, lse); lse is empty unless `options.return_lse`."""
    if options.backend in (None, "reference"):
        out, lse = reference(q, k, v, out, options, attn_mask, seqused_k)
    else:
        if out is None:
            out = torch.empty(output_shape(q, v), dtype=q.dtype)
        lse = torch.empty(lse_shape(q, options.layout), dtype=torch.float32)
        tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse, "mask": attn_mask, "seqused_k": seqused_k}
        interpret(problem_of(q, k, v, out, options, attn_mask, seqused_k), tensors, options)
    return out, lse if options.return_lse else lse.new_empty(0)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, options: Options,
) -> tuple[Tensor, Tensor]:
    """`forward` for packed sequences; lse is [Hq, total_q]."""
    sequences = cu_seqlens_q.shape[0] - 1
    if options.backend in (None, "reference") or 0 in (sequences, max_seqlen_q, k.numel(), max_seqlen_k):
        out, lse = packed_reference(
            q, k, v, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options
        )
    else:
        if out is None:
            out = torch.zeros(output_shape(q, v), dtype=q.dtype)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf)
        tensors = {
            "q": q, "k": k, "v": v, "o": out, "lse": lse, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k
        }  # fmt: skip
        interpret(packed_problem_of(q, k, v, out, sequences, max_seqlen_q, max_seqlen_k, options), tensors, options)
    return out, lse if options.return_lse else lse.new_empty(0)


def reference(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: Options, attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """flashcore.reference in the call's layout, on the tensors' own device. Returns (out, lse)."""
    from flashcore.reference import cpu

    bshd = options.layout == "bshd"
    qh, kh, vh = (t.transpose(1, 2) if bshd else t for t in (q, k, v))
    into = out.transpose(1, 2) if out is not None and bshd else out
    result, lse = cpu(
        qh, kh, vh, is_causal=options.is_causal, scale=options.scale, return_lse=True, window=options.window,
        softcap=options.softcap, attn_mask=attn_mask, seqused_k=seqused_k, out=into,
    )  # fmt: skip
    if out is not None:
        return out, lse
    return result.transpose(1, 2).contiguous() if bshd else result, lse


def packed_reference(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, options: Options,
) -> tuple[Tensor, Tensor]:
    """`reference`, one packed sequence after the other; rows of no sequence are left alone, and 0 in a new output."""
    if out is None:
        out = q.new_zeros(output_shape(q, v))
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=lse_dtype(q))
    sides = (_ranges(cu_seqlens_q, q.shape[0], max_seqlen_q), _ranges(cu_seqlens_k, k.shape[0], max_seqlen_k))
    for rows, keys in zip(*sides, strict=True):
        qs, ks, vs = (t.transpose(0, 1).unsqueeze(0) for t in (q[rows], k[keys], v[keys]))
        result, result_lse = reference(qs, ks, vs, None, options._replace(layout="bhsd"))
        out[rows] = result[0].transpose(0, 1)
        lse[:, rows] = result_lse[0]
    return out, lse


def lse_dtype(q: Tensor) -> torch.dtype:
    """fp32, but fp64 for fp64 inputs, which the reference path alone computes."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _ranges(cu_seqlens: Tensor, total: int, longest: int) -> list[slice]:
    """The rows of each sequence, within what there is, as kernels clamp them."""
    bounds = [min(max(at, 0), total) for at in cu_seqlens.tolist()]
    return [slice(a, max(a, min(b, a + longest))) for a, b in zip(bounds, bounds[1:], strict=False)]


def interpret(problem: Problem, tensors: Mapping[str, Tensor | None], options: Options) -> None:
    """Run the portable kernel in Triton's interpreter, with the tile an H100 would get.

    Args:
        tensors: by their names in binding.TENSORS; o and lse are written.

    Raises:
        UnsupportedError: another kernel was asked for, or Triton was not told to interpret.
    """
    if options.backend != "portable":
        raise UnsupportedError("attention on CPU tensors", {str(options.backend): ["runs on NVIDIA GPUs only"]})
    from flashcore.launch import compiled, portable
    from flashcore.launch.select import select

    config = select(problem, targets.H100, backend="portable", block_m=options.block_m, block_n=options.block_n)
    binding = portable.bind(problem, config, options.scale_for(problem.head_dim))
    if not compiled.interpreted(binding):
        why = "on CPU tensors it runs only in Triton's interpreter; set TRITON_INTERPRET=1 before the first import"
        raise UnsupportedError("attention on CPU tensors", {"portable": [why]})
    out, mask = tensors["o"], tensors.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        tensors = {**tensors, "mask": mask.view(torch.uint8)}
    assert out is not None
    if 0 not in out.shape:
        compiled.interpret(binding, tensors)
