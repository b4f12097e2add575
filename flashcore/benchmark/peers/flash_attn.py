"""Dao-AILab's flash-attn 2 and 3 and flash-attn-4, each by its own package."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from torch import Tensor

from flashcore.benchmark.peers.peer import NotServedError, Peer, Prepared, bshd, first, output_of_bshd
from flashcore.benchmark.shapes import Shape


def _from(module: str, unbounded: int | None) -> Callable[..., Prepared]:
    """`unbounded`: how this package says that a window has no end on one side."""

    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Prepared:
        try:
            package = import_module(module)
            attend = package.flash_attn_varlen_func if shape.lengths else package.flash_attn_func
        except AttributeError as other:  # flash-attn-4 alone leaves a `flash_attn` that holds only `cute`
            raise ImportError(f"{module} has no flash_attn_func") from other
        options: dict[str, Any] = {"causal": shape.is_causal}
        if shape.window != (-1, -1):
            options["window_size"] = tuple(unbounded if side < 0 else side for side in shape.window)
        if shape.softcap:
            options["softcap"] = shape.softcap
        if bias is not None:  # of flash-attn-4 alone, as the others refuse it
            if shape.softcap:
                raise NotServedError("its soft cap is a score_mod as a bias is, and there is one score_mod")
            options |= {"score_mod": _adding(len(bias) > 1), "aux_tensors": [bias]}
        if shape.lengths == "packed":
            starts, longest = shape.cu_seqlens(q.device), max(shape.sequence_lengths)
            options |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
            q, k, v = (shape.pack(t) for t in (q, k, v))
            return Prepared(lambda: attend(q, k, v, **options), lambda out: shape.unpack(first(out)))
        if shape.lengths == "padded":  # likewise
            options["seqused_k"] = shape.seqused_k(q.device)
        q, k, v = bshd(q, k, v)
        return Prepared(lambda: attend(q, k, v, **options), output_of_bshd)

    return prepare


@lru_cache
def _adding(of_each: bool) -> Any:
    """A score_mod in CuTe's language that adds a bias [1 or B, H, S, S], the only aux tensor, number by number.

    That is how flash-attn-4 reads aux tensors unless it is told otherwise.
    """
    cutlass, cute = import_module("cutlass"), import_module("cutlass.cute")

    def add(score: Any, b_idx: Any, h_idx: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        bias = aux_tensors[0]
        number = cute.make_rmem_tensor(1, bias.element_type)
        number[0] = bias[b_idx[0] if of_each else 0, h_idx[0], q_idx[0], kv_idx[0]]
        return score + number.load().to(cutlass.Float32)

    return cute.jit(add)


_REFUSES = {
    "bias": "adds no tensor to the scores",
    "padded": "takes key counts in its call for a key-value cache, which is not measured here",
}
FA2 = Peer(
    "fa2", "flash-attn 2", _from("flash_attn", -1), "flash-attn", "pip install flash-attn --no-build-isolation",
    _REFUSES,
)  # fmt: skip
FA3 = Peer(
    "fa3", "flash-attn 3", _from("flash_attn_interface", -1), "flash-attn-3",
    "pip install ./hopper from a checkout of github.com/Dao-AILab/flash-attention", _REFUSES,
)  # fmt: skip
FA4 = Peer("fa4", "flash-attn 4", _from("flash_attn.cute", None), "flash-attn-4", "pip install --pre flash-attn-4")
