"""torch's own scaled_dot_product_attention, computed by FlashCore where torch would take FlashAttention.

    from flashcore.integrations import sdpa
    sdpa.activate()
    ...  # timm, diffusers, transformers' "sdpa": whatever calls F.scaled_dot_product_attention
    sdpa.restore()

It goes through the registry of flash implementations that torch has since 2.10. That reaches calls on CUDA tensors of
16 bits without a mask; all others stay torch's. Gradients are torch's own, from FlashCore's output and log-sum-exp.
"""

from __future__ import annotations

import functools
import logging
import warnings
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.attention as torch_attention
from torch import Tensor
from torch.nn.attention import SDPBackend

from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention

__all__ = ["NAME", "activate", "is_active", "restore"]

NAME = "flashcore"  # in torch.nn.attention.list_flash_attention_impls()
_OPERATOR = "_scaled_dot_product_flash_attention"
_log = logging.getLogger(__name__)
_handle: _Handle | None = None  # of the activation in force


def activate() -> None:
    """Let FlashCore compute what torch's SDPA gives to FlashAttention, in this process, until `restore()`.

    Torch's order of preference is changed as well, while it lasts: its flash backend comes first, where torch may
    prefer cuDNN. A call that no kernel of FlashCore serves (dropout, a head dimension above 256) is computed by
    torch's FlashAttention as before; the logger "flashcore.integrations.sdpa" warns once for each reason.

    Raises:
        UnsupportedError: this torch has no registry of flash implementations; it came with 2.10.
    """
    if is_active():
        return
    if not hasattr(torch_attention, "register_flash_attention_impl"):
        raise UnsupportedError(f"sdpa.activate(): needs torch 2.10 or newer, this is {torch.__version__}")
    torch_attention.register_flash_attention_impl(NAME, register_fn=_register)
    torch_attention.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Give SDPA back to torch, as it was before `activate()`; without one nothing changes."""
    if not is_active():
        return
    if hasattr(torch_attention, "restore_flash_attention_impl"):
        torch_attention.restore_flash_attention_impl()
    if _handle is not None:
        _handle.remove()


def is_active() -> bool:
    """Whether `activate()` is in force; another library's activation ends it, too."""
    return _handle is not None


class _Handle:
    """An activation; torch calls `remove` when it ends, once or more often."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        if torch.cuda.is_available():  # torch sets its order at the first choice, over anyone's: let that be past
            tiny = torch.empty(1, 1, 1, 8, dtype=torch.float16, device="cuda")
            torch._fused_sdp_choice(tiny, tiny, tiny)
        order = torch_attention._cur_sdpa_kernel_backends(with_priority=True)
        rest = [backend for backend in order if backend != SDPBackend.FLASH_ATTENTION]
        preferred = torch_attention.sdpa_kernel([SDPBackend.FLASH_ATTENTION, *rest], set_priority=True)
        self._undo.enter_context(preferred)
        library = torch.library.Library("aten", "IMPL")
        self._undo.callback(library._destroy)
        with warnings.catch_warnings():  # torch says that a kernel of its own gives way
            warnings.simplefilter("ignore")
            library.impl(_OPERATOR, _forward, "CUDA")

    def remove(self) -> None:
        global _handle
        self._undo.close()
        if _handle is self:
            _handle = None


def _register() -> _Handle:
    global _handle
    _handle = _Handle()
    return _handle


def _forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention of [B, H, S, D].

    Returns:
        output, lse fp32 [B, Hq, Sq], two cu_seqlens (none), the lengths of q and k, the state of a random generator
        (two, which only dropout reads), and the debug mask (empty).
    """
    why = None
    if dropout_p:
        why = "dropout is not computed"
    elif return_debug_mask:
        why = "the debug mask is not computed"
    elif is_causal and query.shape[2] != key.shape[2]:
        why = "is_causal with q and k of different lengths is aligned in another way"
    else:
        # Autograd is above this operator, whose tensors still require grad. As torch's, the output looks like q.
        out = torch.empty_like(query)
        try:
            with torch.no_grad():
                _, lse = attention(query, key, value, is_causal=is_causal, scale=scale, return_lse=True, out=out)
        except UnsupportedError as refusal:
            why = str(refusal)
        else:
            state = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)
            return out, lse, None, None, query.shape[2], key.shape[2], *state, query.new_empty(0)
    _warn_once(why)
    return _torch_forward(query, key, value, dropout_p, is_causal, return_debug_mask, scale)


def _torch_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, return_debug_mask: bool,
    scale: float | None,
) -> tuple[Any, ...]:
    """The same by the operator underneath, which is torch's still, and takes [B, S, H, D]."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    out, lse, state, offset, debug_mask = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, None, seqlen_q, seqlen_k,
        dropout_p, is_causal, return_debug_mask, scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse, None, None, seqlen_q, seqlen_k, state, offset, debug_mask


@functools.cache
def _warn_once(why: str) -> None:
    _log.warning("scaled_dot_product_attention stays torch's: %s", why)
