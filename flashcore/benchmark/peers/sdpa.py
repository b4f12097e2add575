"""torch.nn.functional.scaled_dot_product_attention: its own choice, and each of its backends by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.benchmark.peers.peer import Peer, Prepared
from flashcore.benchmark.shapes import Shape


def _with(backend: SDPBackend | None) -> Callable[[Shape, Tensor, Tensor, Tensor], Prepared]:
    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        attend = torch.nn.functional.scaled_dot_product_attention
        is_causal, enable_gqa = shape.is_causal, shape.kv_heads != shape.heads
        return Prepared(
            lambda: attend(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa),
            context=nullcontext if backend is None else lambda: sdpa_kernel(backend),
        )

    return prepare


DEFAULT = Peer("sdpa", "SDPA", _with(None))
FLASH = Peer("sdpa-flash", "SDPA flash", _with(SDPBackend.FLASH_ATTENTION))
CUDNN = Peer("sdpa-cudnn", "SDPA cuDNN", _with(SDPBackend.CUDNN_ATTENTION))
EFFICIENT = Peer("sdpa-efficient", "SDPA efficient", _with(SDPBackend.EFFICIENT_ATTENTION))
MATH = Peer("sdpa-math", "SDPA math", _with(SDPBackend.MATH))
