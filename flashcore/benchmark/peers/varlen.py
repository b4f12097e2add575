"""torch.nn.attention.varlen.varlen_attn: flash attention over packed sequences, as torch itself offers it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from inspect import signature
from typing import Any

from torch import Tensor

from flashcore.benchmark.peers.peer import NotServedError, Peer, Prepared
from flashcore.benchmark.shapes import Shape


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    attend = import_module("torch.nn.attention.varlen").varlen_attn
    takes = signature(attend).parameters
    options: dict[str, Any] = {}
    window = (-1, 0) if shape.is_causal else shape.window
    if "window_size" in takes:
        if window != (-1, -1):
            options["window_size"] = window
    elif shape.window != (-1, -1):
        raise NotServedError("this torch's varlen_attn has no window")
    elif shape.is_causal:
        options["is_causal"] = True
    if "enable_gqa" in takes and shape.kv_heads != shape.heads:  # older ones neither ask nor look
        options["enable_gqa"] = True
    if shape.lengths == "padded":
        if "seqused_k" not in takes:
            raise NotServedError("this torch's varlen_attn takes no key counts (seqused_k)")
        options["seqused_k"] = shape.seqused_k(q.device)
        shape = replace(shape, lengths="")  # one padded sequence after the other
    starts, longest = shape.cu_seqlens(q.device), max(shape.sequence_lengths)
    q, k, v = (shape.pack(t) for t in (q, k, v))
    return Prepared(lambda: attend(q, k, v, starts, starts, longest, longest, **options), shape.unpack)


VARLEN = Peer(
    "varlen", "torch varlen_attn", _prepare, "torch", "pip install 'torch>=2.10'",
    {"bias": "adds no tensor to the scores", "softcap": "has no soft cap"},
)  # fmt: skip
