"""The portable kernel's schedule for sm_80 and sm_89, which attention() on an H100 never takes, in the interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from flashcore.testing import Guarded, Shape, lay_out, make, require


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("family", ["independent", "rising", "falling", "large_logits", "nan_k", "nan_v"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 75), (80, 31)])
def test_the_schedule_for_mma_sync(
    interpreter: Any, family: str, is_causal: bool, seqlen_q: int, seqlen_k: int
) -> None:
    inputs = make(family, Shape(1, 2, seqlen_q, 24, heads_kv=1, seqlen_k=seqlen_k))
    q, k, v = (lay_out(t, "sliced") for t in inputs)
    guarded = Guarded(tuple(q.shape), torch.float16, layout="bshd")
    attention = partial(interpreter.attention, target="A100", backend="portable", block_m=64, block_n=32)
    out, lse = attention(q, k, v, is_causal=is_causal, return_lse=True, out=guarded.out)
    require(out, q, k, v, lse=lse, is_causal=is_causal)
    assert guarded.intact()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 136])
def test_its_own_choice_of_tile(interpreter: Any, dim: int, dtype: torch.dtype) -> None:
    q, k, v = make("outliers", Shape(1, 1, 20, dim, seqlen_k=75), dtype)
    out, lse = interpreter.attention(q, k, v, target="A100", backend="portable", is_causal=True, return_lse=True)
    require(out, q, k, v, lse=lse, is_causal=True)
