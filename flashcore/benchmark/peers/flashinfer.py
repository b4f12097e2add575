"""FlashInfer's batch prefill over packed sequences: planned once for a shape, as a server plans once for all layers."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark.peers.peer import NotServedError, Peer, Prepared, bshd
from flashcore.benchmark.shapes import Shape


@lru_cache(maxsize=1)
def _planned(shape: Shape, device: torch.device) -> Any:
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    wrapper = import_module("flashinfer").BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = shape.cu_seqlens(device)
    left, right = shape.window
    wrapper.plan(
        starts, starts, shape.heads, shape.kv_heads, shape.head_dim,
        causal=shape.is_causal or right == 0, q_data_type=shape.torch_dtype, window_left=left,
        logits_soft_cap=shape.softcap or None,
    )  # fmt: skip
    return wrapper


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    if shape.window[1] > 0:
        raise NotServedError("its window reaches back only")
    wrapper = _planned(shape, q.device)
    if shape.lengths:
        q, k, v = (shape.pack(t) for t in (q, k, v))
        return Prepared(lambda: wrapper.run(q, k, v), shape.unpack)
    q, k, v = (t.flatten(0, 1) for t in bshd(q, k, v))
    return Prepared(
        lambda: wrapper.run(q, k, v),
        lambda out: out.unflatten(0, (shape.batch, shape.seqlen)).transpose(1, 2),
    )


FLASHINFER = Peer(
    "flashinfer", "FlashInfer", _prepare, "flashinfer-python", "pip install flashinfer-python",
    {"bias": "adds no tensor to the scores", "padded": "its sequences are packed"},
)  # fmt: skip
