"""attention() on CPU tensors: what it computes, what it refuses, and in which words."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch

import flashcore
from flashcore import reference
from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(heads_q=4, heads_kv=4, seqlen_q=10, seqlen_k=10, dtype=torch.float32):
    return (
        make(2, heads_q, seqlen_q, 8, seed=1, dtype=dtype),
        make(2, heads_kv, seqlen_k, 8, seed=2, dtype=dtype),
        make(2, heads_kv, seqlen_k, 8, seed=3, dtype=dtype),
    )


def test_the_signature_is_the_documented_one():
    assert str(inspect.signature(attention)).replace("'", "").replace('"', "") == (
        "(q: Tensor, k: Tensor, v: Tensor, block_m: int | None = None, block_n: int | None = None, *,"
        " is_causal: bool = False, scale: float | None = None, window: tuple[int, int] = (-1, -1),"
        " softcap: float = 0.0, attn_mask: Tensor | None = None, seqused_k: Tensor | None = None,"
        " return_lse: bool = False, layout: str = bhsd, out: Tensor | None = None, backend: str | None = None)"
        " -> Tensor | tuple[Tensor, Tensor]"
    )
    assert flashcore.attention is attention


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(dtype, is_causal):
    q, k, v = qkv(dtype=dtype)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    out = attention(q, k, v, is_causal=is_causal)
    assert out.dtype == dtype and out.is_contiguous()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, want, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("heads_q, heads_kv, seqlen_q, seqlen_k", [(4, 1, 7, 7), (4, 2, 3, 9), (2, 2, 9, 3)])
def test_gqa_and_lengths(heads_q, heads_kv, seqlen_q, seqlen_k):
    q, k, v = qkv(heads_q, heads_kv, seqlen_q, seqlen_k)
    for is_causal in (False, True):
        out, lse = attention(q, k, v, is_causal=is_causal, return_lse=True)
        want, want_lse = reference.attention(q, k, v, is_causal=is_causal, return_lse=True)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-6)


def test_every_option_in_both_layouts():
    q, k, v = qkv()
    mask = make(4, 10, 10, seed=5)
    used = torch.tensor([3, 10], dtype=torch.int32)
    served = [{"window": (2, 1)}, {"softcap": 5.0}, {"attn_mask": mask > 0}, {"attn_mask": mask}, {"seqused_k": used}]
    for options in served:
        torch.testing.assert_close(attention(q, k, v, **options), reference.cpu(q, k, v, **options))
        bshd = [t.transpose(1, 2) for t in (q, k, v)]
        torch.testing.assert_close(
            attention(*bshd, layout="bshd", **options).transpose(1, 2), reference.cpu(q, k, v, **options)
        )
        assert attention(*(t.to("meta") for t in (q, k, v)), **{n: _meta(o) for n, o in options.items()}).is_meta


def _meta(option):
    return option.to("meta") if isinstance(option, torch.Tensor) else option


def test_nothing_to_read_gives_zeros_and_nothing_to_write_is_empty():
    q, k, v = qkv(seqlen_k=0)
    out, lse = attention(q, k, v, return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())
    q, k, v = qkv(seqlen_q=0)
    assert attention(q, k, v).shape == (2, 4, 0, 8)
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 4, 0, 8)


@pytest.mark.parametrize("seqlen_q, batch", [(0, 2), (10, 0)])
def test_strides_of_an_empty_tensor_mean_nothing(seqlen_q, batch):
    q, k, v = (t[:batch] for t in qkv(seqlen_q=seqlen_q))
    for strides in ((0, 0, 0, 1), (0, 0, 0, 0)):
        empty = torch.empty(1).as_strided(q.shape, strides)
        assert attention(q, k, v, out=empty) is empty
        assert attention(empty, k, v).shape == q.shape


def test_out():
    q, k, v = qkv()
    into = torch.empty(2, 10, 4, 8)
    out = into.transpose(1, 2)
    assert attention(q, k, v, out=out) is out
    torch.testing.assert_close(out, attention(q, k, v))
    result, lse = attention(q, k, v, out=out, return_lse=True)
    assert result is out and lse.shape == (2, 4, 10)


Q, K, V = qkv()
WRONG = {
    "q is a list": (TypeError, "q: expected a torch.Tensor, got list", lambda: attention([1.0], K, V)),
    "v is None": (TypeError, "v: expected a torch.Tensor, got NoneType", lambda: attention(Q, K, None)),
    "rank": (ValueError, r"k: expected 4 dimensions, \[B, H, S, D\], got \[4, 10, 8\]", lambda: attention(Q, K[0], V)),
    "bshd rank": (ValueError, r"\[B, S, H, D\]", lambda: attention(Q[0], K, V, layout="bshd")),
    "device": (ValueError, "k: expected q's device, cpu, got meta", lambda: attention(Q, K.to("meta"), V)),
    "dtype": (ValueError, "v: expected q's dtype, torch.float32, got torch.float16", lambda: attention(Q, K, V.half())),
    "integers": (ValueError, "q: expected a floating-point", lambda: attention(Q.int(), K.int(), V.int())),
    "batch": (ValueError, "k: expected q's batch, 2, got 1", lambda: attention(Q, K[:1], V[:1])),
    "head dimension": (ValueError, "k: expected q's head dimension, 8, got 4", lambda: attention(Q, K[..., :4], V)),
    "key heads": (ValueError, "v: expected k's heads, 4, got 2", lambda: attention(Q, K, V[:, :2])),
    "key length": (ValueError, "v: expected k's length, 10, got 9", lambda: attention(Q, K, V[:, :, :9])),
    "group": (ValueError, "q: expected a multiple of k's 3 heads, got 4", lambda: attention(Q, K[:, :3], V[:, :3])),
    "no heads": (ValueError, "q: expected a multiple of k's 0 heads", lambda: attention(Q, K[:, :0], V[:, :0])),
    "no columns": (ValueError, "q: expected a head dimension", lambda: attention(Q[..., :0], K[..., :0], V[..., :0])),
    "last dimension": (ValueError, r"k: expected a contiguous last dimension.*got strides \[320, 80, 1, 10\]",
                       lambda: attention(Q, K.mT.contiguous().mT, V)),
    "block_m type": (TypeError, "block_m: expected an int or None, got 64.0", lambda: attention(Q, K, V, 64.0)),
    "block_n type": (TypeError, "block_n: expected an int or None, got True", lambda: attention(Q, K, V, None, True)),
    "is_causal": (TypeError, "is_causal: expected a bool, got 1", lambda: attention(Q, K, V, is_causal=1)),
    "scale": (TypeError, "scale: expected a number or None, got '1'", lambda: attention(Q, K, V, scale="1")),
    "scale nan": (ValueError, "scale: expected a finite number", lambda: attention(Q, K, V, scale=float("nan"))),
    "layout": (ValueError, "layout: expected 'bhsd' or 'bshd', got 'bsd'", lambda: attention(Q, K, V, layout="bsd")),
    "backend": (ValueError, "backend: expected one of .*, got 'cudnn'", lambda: attention(Q, K, V, backend="cudnn")),
    "window": (ValueError, "window: expected two ints", lambda: attention(Q, K, V, window=(1, 2, 3))),
    "window below": (ValueError, "window: expected two ints", lambda: attention(Q, K, V, window=(-2, 0))),
    "softcap": (ValueError, "softcap: expected 0 or a finite number", lambda: attention(Q, K, V, softcap=-1.0)),
    "mask type": (TypeError, "attn_mask: expected a torch.Tensor", lambda: attention(Q, K, V, attn_mask=[True])),
    "mask dtype": (ValueError, "attn_mask: expected a bool", lambda: attention(Q, K, V, attn_mask=Q.int())),
    "mask shape": (ValueError, r"attn_mask: expected a shape that broadcasts to \[2, 4, 10, 10\]",
                   lambda: attention(Q, K, V, attn_mask=torch.ones(3, 10))),
    "seqused": (ValueError, r"seqused_k: expected int32 \[2\], got torch.int64 \[2\]",
                lambda: attention(Q, K, V, seqused_k=torch.tensor([1, 2]))),
    "out type": (TypeError, "out: expected a torch.Tensor, got list", lambda: attention(Q, K, V, out=[])),
    "out shape": (ValueError, r"out: expected shape \[2, 4, 10, 8\], got \[2, 4, 9, 8\]",
                  lambda: attention(Q, K, V, out=torch.empty(2, 4, 9, 8))),
    "out dtype": (ValueError, "out: expected q's dtype", lambda: attention(Q, K, V, out=Q.half())),
    "out device": (ValueError, "out: expected q's device", lambda: attention(Q, K, V, out=Q.to("meta"))),
    "out strides": (ValueError, "out: expected a contiguous last",
                    lambda: attention(Q, K, V, out=torch.empty(2, 4, 8, 10).mT)),
    "out shared": (ValueError, "out: expected elements that do not share memory",
                   lambda: attention(Q, K, V, out=torch.empty(1, 1, 10, 8).expand(2, 4, 10, 8))),
    "out is q": (ValueError, "out: expected memory apart from q's", lambda: attention(Q, K, V, out=Q)),
    "hopper": (UnsupportedError, "hopper", lambda: attention(Q, K, V, backend="hopper")),
    "portable": (UnsupportedError, "TRITON_INTERPRET", lambda: attention(
        Q.half(), K.half(), V.half(), backend="portable")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    error, text, call = WRONG[name]
    with pytest.raises(error, match=text):
        call()
    torch.testing.assert_close(attention(Q, K, V), reference.cpu(Q, K, V))


def test_any_strides_with_a_contiguous_last_dimension():
    q, k, v = qkv()
    want = attention(q, k, v)
    padded = torch.zeros(2, 4, 20, 16)
    padded[:, :, ::2, :8] = k
    wide = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(attention(*wide), want)
    torch.testing.assert_close(attention(q, padded[:, :, ::2, :8], v), want)
    shared = k[:, :1].expand_as(k)
    torch.testing.assert_close(attention(q, shared, v), attention(q, shared.contiguous(), v))


INTERPRETED = """
import torch
from flashcore import attention
from flashcore.testing import gates

q, k, v = (torch.randn(1, h, s, 16).half() for h, s in ((2, 20), (1, 24), (1, 24)))
out, lse = attention(q, k, v, is_causal=True, return_lse=True, backend="portable")
assert gates.check(out, q, k, v, is_causal=True).passed
into = torch.empty(1, 20, 2, 16, dtype=torch.float16)
bshd = [t.transpose(1, 2) for t in (q, k, v)]
assert attention(*bshd, is_causal=True, layout="bshd", out=into, backend="portable") is into
assert torch.equal(into.transpose(1, 2), out)
print("done")
"""


def test_the_portable_kernel_runs_in_triton_s_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_it_survives_being_copied_and_pickled():
    assert pickle.loads(pickle.dumps(attention)) is attention
    assert copy.deepcopy(attention) is attention
