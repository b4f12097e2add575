"""FlashCore: attention kernels for NVIDIA GPUs, made for short sequences at low latency.

    from flashcore.fast.attention_production import attention     # or: flashcore.attention
    out = attention(q, k, v)                                      # [B, H, S, D], fp16 or bf16

Importing this package loads neither torch nor Triton: what it exports is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashcore.core.errors import UnsupportedError
    from flashcore.fast.attention_production import attention
    from flashcore.fast.planning import explain, warmup
    from flashcore.fast.varlen import attention_varlen

__version__ = "0.1.0.dev0"

__all__ = ["UnsupportedError", "__version__", "attention", "attention_varlen", "explain", "warmup"]

_HOMES = {
    "UnsupportedError": "flashcore.core.errors",
    "attention": "flashcore.fast.attention_production",
    "attention_varlen": "flashcore.fast.varlen",
    "explain": "flashcore.fast.planning",
    "warmup": "flashcore.fast.planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
