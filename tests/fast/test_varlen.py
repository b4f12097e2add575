"""attention_varlen() on CPU tensors: what it computes, what it refuses, and in which words."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor

import flashcore
from flashcore import attention_varlen, reference
from flashcore.core.errors import UnsupportedError


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CU_Q, CU_K = lengths(0, 5, 5, 6, 12), lengths(0, 7, 10, 10, 16)
Q, K, V = make(12, 4, 8, seed=1), make(16, 2, 8, seed=2), make(16, 2, 6, seed=3)
CALL = (Q, K, V, CU_Q, CU_K, 6, 7)


def test_the_signature_is_the_documented_one():
    assert str(inspect.signature(attention_varlen)).replace("'", "") == (
        "(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,"
        " max_seqlen_k: int, *, is_causal: bool = False, scale: float | None = None,"
        " window: tuple[int, int] = (-1, -1), softcap: float = 0.0, return_lse: bool = False,"
        " out: Tensor | None = None, backend: str | None = None, block_m: int | None = None,"
        " block_n: int | None = None) -> Tensor | tuple[Tensor, Tensor]"
    )
    assert flashcore.attention_varlen is attention_varlen
    assert pickle.loads(pickle.dumps(attention_varlen)) is attention_varlen is copy.deepcopy(attention_varlen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (2, 1)}, {"softcap": 1.0, "scale": 0.7, "window": (0, -1)}], ids=str
)
def test_each_sequence_is_attention_by_itself(dtype, options):
    q, k, v = (t.to(dtype) for t in (Q, K, V))
    out, lse = attention_varlen(q, k, v, *CALL[3:], return_lse=True, **options)
    assert out.dtype == dtype and out.shape == (12, 4, 6) and lse.shape == (4, 12)
    for b in range(4):
        rows, keys = slice(*CU_Q[b : b + 2].tolist()), slice(*CU_K[b : b + 2].tolist())
        one = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        want, want_lse = reference.cpu(*one, return_lse=True, **options)
        assert torch.equal(out[rows], want[0].transpose(0, 1)) and torch.equal(lse[:, rows], want_lse[0])
    assert (out[5] == 0).all() and (lse[:, 5] == -torch.inf).all()  # a row of a sequence without keys


def test_out_and_strides():
    wide = torch.zeros(12, 4, 16)
    out = wide[..., :6]
    assert attention_varlen(*CALL, out=out) is out
    assert torch.equal(out, attention_varlen(*CALL)) and not wide[..., 6:].any()
    fused = torch.zeros(16, 3, 2, 8)  # as a projection makes them
    fused[:, 1], fused[:, 2, :, :6] = K, V
    assert torch.equal(attention_varlen(Q, fused[:, 1], fused[:, 2, :, :6], *CALL[3:]), out)


def test_wrong_lengths_read_nothing_that_is_not_there():
    q, k, v = (t[: len(t) - 2] for t in (Q, K, V))
    beyond = attention_varlen(q, k, v, lengths(-5, 4, 99), lengths(0, 7, 100), 6, 7)
    assert torch.equal(beyond, attention_varlen(q, k, v, lengths(0, 4, 10), lengths(0, 7, 14), 6, 7))
    backwards = attention_varlen(q, k, v, lengths(8, 2, 6), lengths(0, 4, 1), 6, 7)
    assert not backwards.any()  # neither has rows and keys
    short = attention_varlen(Q, K, V, lengths(0, 12), lengths(0, 16), 5, 7)
    assert torch.equal(short[:5], attention_varlen(Q[:5], K[:7], V[:7], lengths(0, 5), lengths(0, 7), 5, 7))
    assert not short[5:].any()


def test_rows_of_no_sequence_are_left_alone():
    out = torch.full((12, 4, 6), 3.0)
    attention_varlen(*CALL[:3], lengths(2, 6), lengths(0, 4), 6, 7, out=out)
    assert (out[:2] == 3).all() and (out[6:] == 3).all() and not (out[2:6] == 3).any()


def test_autocast_and_gradients():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_varlen(*CALL).dtype == torch.bfloat16
    q = Q.clone().requires_grad_()
    attention_varlen(q, *CALL[1:], is_causal=True).sum().backward()
    assert q.grad is not None and q.grad.any()
    grad = torch.func.grad(lambda q: attention_varlen(q, *CALL[1:], is_causal=True).sum())(Q)
    torch.testing.assert_close(grad, q.grad)


def test_subclasses_and_overrides_see_the_call():
    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func, args, kwargs

    func, args, kwargs = attention_varlen(Q.as_subclass(Wrapped), *CALL[1:], is_causal=True, window=(3, 3))
    assert func is attention_varlen and kwargs["is_causal"] and kwargs["window"] == (3, 3)
    assert torch.equal(attention_varlen(Q, *args[1:], **kwargs), attention_varlen(*CALL, is_causal=True, window=(3, 3)))


def changed(place: int, value):
    return lambda: attention_varlen(*CALL[:place], value, *CALL[place + 1 :])


WRONG = {
    "q is a list": (TypeError, "q: expected a torch.Tensor, got list", changed(0, [1.0])),
    "q has a batch": (ValueError, r"q: expected 3 dimensions, \[total, H, D\], got \[1, 12,", changed(0, Q[None])),
    "device": (ValueError, "k: expected q's device, cpu, got meta", changed(1, K.to("meta"))),
    "dtype": (ValueError, "v: expected q's dtype, torch.float32, got torch.float16", changed(2, V.half())),
    "head dimension": (ValueError, "k: expected q's head dimension, 8, got 4", changed(1, K[..., :4])),
    "heads": (ValueError, "q: expected a multiple of k's 2 heads, got 3", changed(0, Q[:, :3])),
    "key heads": (ValueError, "v: expected k's heads, 2, got 1", changed(2, V[:, :1])),
    "total of v": (ValueError, "v: expected k's length, 16, got 15", changed(2, V[:15])),
    "last dimension": (ValueError, "q: expected a contiguous last dimension", changed(0, Q.mT.contiguous().mT)),
    "no lengths": (TypeError, "cu_seqlens_q: expected a torch.Tensor, got NoneType", changed(3, None)),
    "a list of lengths": (TypeError, "cu_seqlens_k: expected a torch.Tensor, got list", changed(4, [0, 16])),
    "lengths of 64 bits": (ValueError, "cu_seqlens_q: expected int32", changed(3, CU_Q.long())),
    "rank of lengths": (ValueError, r"cu_seqlens_q: expected int32 \[B \+ 1\]", changed(3, CU_Q[None])),
    "nothing at all": (ValueError, r"cu_seqlens_q: expected int32 \[B \+ 1\]", changed(3, CU_Q[:0])),
    "another count": (ValueError, r"cu_seqlens_k: expected int32 \[5\], got torch.int32 \[4\]", changed(4, CU_K[:4])),
    "every other": (ValueError, "cu_seqlens_k: expected a contiguous", changed(4, CU_K.repeat_interleave(2)[::2])),
    "lengths elsewhere": (ValueError, "cu_seqlens_k: expected q's device", changed(4, CU_K.to("meta"))),
    "max is a float": (TypeError, "max_seqlen_q: expected an int, got 6.0", changed(5, 6.0)),
    "max is a bool": (TypeError, "max_seqlen_k: expected an int, got True", changed(6, True)),
    "max below 0": (ValueError, "max_seqlen_k: expected an int of at least 0, got -1", changed(6, -1)),
    "window": (ValueError, "window: expected two ints", lambda: attention_varlen(*CALL, window=(1,))),
    "softcap": (ValueError, "softcap: expected 0 or a finite", lambda: attention_varlen(*CALL, softcap=float("inf"))),
    "causal": (TypeError, "is_causal: expected a bool", lambda: attention_varlen(*CALL, is_causal=1)),
    "backend": (ValueError, "backend: expected one of", lambda: attention_varlen(*CALL, backend="cudnn")),
    "out shape": (ValueError, r"out: expected shape \[12, 4, 6\]", lambda: attention_varlen(*CALL, out=Q.clone())),
    "out is q": (ValueError, "out: expected memory apart", lambda: attention_varlen(Q, K, K, *CALL[3:], out=Q)),
    "hopper": (UnsupportedError, "hopper", lambda: attention_varlen(*CALL, backend="hopper")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    error, text, call = WRONG[name]
    with pytest.raises(error, match=text):
        call()
    assert attention_varlen(*CALL).shape == (12, 4, 6)
