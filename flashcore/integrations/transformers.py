"""Hugging Face transformers: FlashCore as the attention implementation named "fcore".

    from flashcore.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(..., attn_implementation="fcore")

The name holds no "flash": transformers would look for the flash-attn package. Nothing here waits for the GPU: what a
padding mask holds is never asked for, where transformers' own "sdpa" reads it to leave the mask away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention

__all__ = ["NAME", "attend", "make_mask", "register"]

NAME = "fcore"
_ALIGNMENT = 16  # bytes, and so keys of a bool mask, that the rows of one start at: what TMA wants


def register() -> str:
    """Make `attn_implementation="fcore"` known to transformers; a second call changes nothing.

    Returns:
        The name, "fcore".

    Raises:
        ImportError: transformers is not installed, or older than 5.5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, __version__
    from transformers.masking_utils import sdpa_mask

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(f"register(): needs transformers 5.5 or newer, this is {__version__}")
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)  # without it masks silently become None
    return NAME


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as the layers of transformers ask for it.

    Args:
        module: the layer; its `is_causal` (True where it has none) counts where the argument is None.
        query: [B, Hq, Sq, D], any strides.
        key, value: [B, Hkv, Sk, D], not repeated for grouped heads.
        attention_mask: what `make_mask` gave, or the caller's own: bool (True = attend) or floating (added to the
            scores), broadcastable to [B, Hq, Sq, Sk]. It then says all there is to hide, the future included.
        dropout: must be 0.
        scaling: factor of the scores, D ** -0.5 when None.
        is_causal: row i sees keys up to i + Sk - Sq; for layers that got no mask.
        sliding_window: keys that a row sees with its own; for layers that got no mask and are causal.
        softcap: scores -> softcap * tanh(scores / softcap).
        position_bias: added to the scores, broadcastable to [B, Hq, Sq, Sk].
        s_aux: [Hq] attention sinks: one more score a row, of a key without a value.

    Returns:
        The output [B, Sq, Hq, D], and None where others return the weights.

    Raises:
        UnsupportedError: dropout, a head mask, a paged cache or the weights are asked for, or no kernel serves it.
        TypeError, ValueError: as `flashcore.attention`.
    """
    _refuse(dropout, rest)
    if query.shape[0] != key.shape[0]:  # queries that a batch shares
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    causal, window = False, (-1, -1)
    if attention_mask is None and query.shape[2] > 1:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and sliding_window is not None and causal:
        window = (sliding_window - 1, -1)
    mask = attention_mask if position_bias is None else _with_bias(position_bias, attention_mask)
    # [B, S, H, D] is the layout that layers made q, k and v in, and the one of the output.
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    result: Any = attention(
        q, k, v, is_causal=causal, scale=scaling, window=window, softcap=softcap or 0.0, attn_mask=mask,
        return_lse=s_aux is not None, layout="bshd",
    )  # fmt: skip
    if s_aux is None:
        return result, None
    # The sink's weight is exp(s) / (exp(s) + exp(lse)), and the others' sum to what is left.
    out, lse = result
    kept = torch.sigmoid(lse - s_aux.view(1, -1, 1).to(lse.dtype))
    return (out * kept.transpose(1, 2).unsqueeze(-1)).to(out.dtype), None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Tensor | None:
    """The mask of a forward pass, made once for all its layers.

    None where lengths alone say that the layers' own `is_causal` suffices; otherwise bool [B, 1, Sq, Sk] (True =
    attend), by transformers' own rules. A padding mask of a bidirectional model keeps one row for all queries (stride
    0). Rows start at multiples of 16 bytes. What `attention_mask`, [B, Sk] or None, holds is not looked at.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    is_local = local_size is not None and kv_length >= local_size
    # Layers align the last row with the last key. An offset on the device is that of a static cache.
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    skips = (allow_is_causal_skip and aligned) or allow_is_bidirectional_skip
    if attention_mask is None and skips and not is_local:
        return None
    if mask_function is bidirectional_mask_function and attention_mask is not None:
        seen = attention_mask[:, None, None, kv_offset : kv_offset + kv_length].to(torch.bool)
        return _aligned(seen, kv_length).expand(batch_size, 1, q_length, kv_length)
    mask: Tensor = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **rest,
    )  # fmt: skip
    return _aligned(mask, kv_length)


def _aligned(mask: Tensor, keys: int) -> Tensor:
    """The bool mask over so many keys, False behind its own, with rows that start at multiples of `_ALIGNMENT`."""
    if isinstance(keys, torch.SymInt) and mask.shape[-1] == keys:
        return mask  # or whether there is anything to pad would become a condition of what torch.export makes
    stored = mask.new_zeros(*mask.shape[:-1], (keys + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT)
    stored[..., : mask.shape[-1]] = mask
    return stored[..., :keys]


def _refuse(dropout: float, rest: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedError(
            f"attn_implementation={NAME!r}: dropout: expected 0, got {dropout}; attention dropout is not computed: set"
            " the model's attention dropout to 0, call eval(), or use 'sdpa'"
        )
    for name, instead in (("head_mask", "eager"), ("layer_head_mask", "eager"), ("block_table", "sdpa")):
        if rest.get(name) is not None:
            raise UnsupportedError(f"attn_implementation={NAME!r}: {name}: expected None; use {instead!r}")
    if rest.get("output_attentions"):
        raise UnsupportedError(
            f"attn_implementation={NAME!r}: output_attentions: the weights are never held in memory; use 'eager'"
        )


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A mask that also adds `bias` to the scores."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
