"""FlashInfer's batch prefill over packed sequences: planned once for a shape, as a server plans once for all layers."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark.peers.peer import Peer, Prepared, bshd
from flashcore.benchmark.shapes import Shape


@lru_cache(maxsize=1)
def _planned(shape: Shape, device: torch.device) -> Any:
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    wrapper = import_module("flashinfer").BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.seqlen
    wrapper.plan(
        starts, starts, shape.heads, shape.kv_heads, shape.head_dim,
        causal=shape.is_causal, q_data_type=shape.torch_dtype,
    )  # fmt: skip
    return wrapper


def _prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    wrapper = _planned(shape, q.device)
    q, k, v = (t.flatten(0, 1) for t in bshd(q, k, v))
    return Prepared(
        lambda: wrapper.run(q, k, v),
        lambda out: out.unflatten(0, (shape.batch, shape.seqlen)).transpose(1, 2),
    )


FLASHINFER = Peer("flashinfer", "FlashInfer", _prepare, "flashinfer-python", "pip install flashinfer-python")
