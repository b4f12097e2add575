"""FlashCore itself: the call that users make, with its own choice and with each kernel by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashcore.benchmark.peers.peer import Peer, Prepared
from flashcore.benchmark.shapes import Shape
from flashcore.fast.attention_production import attention
from flashcore.fast.varlen import attention_varlen


def _with(backend: str | None) -> Callable[..., Prepared]:
    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Prepared:
        is_causal, window, softcap = shape.is_causal, shape.window, shape.softcap
        if shape.lengths == "packed":
            starts, longest = shape.cu_seqlens(q.device), max(shape.sequence_lengths)
            q, k, v = (shape.pack(t) for t in (q, k, v))
            return Prepared(
                lambda: attention_varlen(
                    q, k, v, starts, starts, longest, longest, is_causal=is_causal, window=window, softcap=softcap,
                    backend=backend,
                ),
                shape.unpack,
            )  # fmt: skip
        if not shape.features - {"causal", "gqa"}:
            return Prepared(lambda: attention(q, k, v, is_causal=is_causal, backend=backend))
        seqused_k = shape.seqused_k(q.device) if shape.lengths else None
        return Prepared(
            lambda: attention(
                q, k, v, is_causal=is_causal, window=window, softcap=softcap, attn_mask=bias, seqused_k=seqused_k,
                backend=backend,
            )
        )  # fmt: skip

    return prepare


FLASHCORE = Peer("flashcore", "FlashCore", _with(None), "flashcore-attn")
PORTABLE = Peer("flashcore-portable", "FlashCore portable", _with("portable"), "flashcore-attn")
HOPPER = Peer("flashcore-hopper", "FlashCore hopper", _with("hopper"), "flashcore-attn")
