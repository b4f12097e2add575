"""What attention() refuses, with which words, before anything runs; and that the next call is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore import UnsupportedError
from flashcore.fast.attention_production import attention
from flashcore.launch.select import KERNELS
from flashcore.testing import Shape, make

SHAPE = Shape(2, 4, 20, 16, heads_kv=2, seqlen_k=24)
Call = dict[str, Any]  # arguments of attention(), by name


def call() -> Call:
    return dict(zip("qkv", make("independent", SHAPE), strict=True))


def other(name: str, change: Callable[[Tensor], Any]) -> Callable[[], Call]:
    def made() -> Call:
        arguments = call()
        arguments[name] = change(arguments[name])
        return arguments

    return made


def option(**options: Any) -> Callable[[], Call]:
    return lambda: {**call(), **options}


def out(change: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
    return lambda: {**call(), "out": change(torch.zeros(SHAPE.q, dtype=torch.float16))}


def overlapping() -> Call:
    arguments = call()
    arguments["out"] = arguments["q"]
    return arguments


# (what is wrong, its class, the argument that the message must begin with)
WRONG: dict[str, tuple[Callable[[], Call], type[Exception], str]] = {
    "q is a list": (other("q", Tensor.tolist), TypeError, "q"),
    "k is an array": (other("k", Tensor.numpy), TypeError, "k"),
    "v is None": (other("v", lambda t: None), TypeError, "v"),
    "out is a number": (option(out=1.0), TypeError, "out"),
    "block_m is text": (option(block_m="64"), TypeError, "block_m"),
    "block_n is a float": (option(block_n=64.0), TypeError, "block_n"),
    "block_n is a bool": (option(block_n=True), TypeError, "block_n"),
    "is_causal is a number": (option(is_causal=2), TypeError, "is_causal"),
    "return_lse is None": (option(return_lse=None), TypeError, "return_lse"),
    "scale is text": (option(scale="1"), TypeError, "scale"),
    "scale is NaN": (option(scale=math.nan), ValueError, "scale"),
    "scale is infinite": (option(scale=math.inf), ValueError, "scale"),
    "3 dimensions": (other("q", lambda t: t[0]), ValueError, "q"),
    "5 dimensions": (other("k", lambda t: t[None]), ValueError, "k"),
    "no dimension": (other("v", lambda t: t[0, 0, 0, 0]), ValueError, "v"),
    "another device": (other("k", lambda t: t.to("meta")), ValueError, "k"),
    "another dtype": (other("v", Tensor.bfloat16), ValueError, "v"),
    "integers": (lambda: {name: t.to(torch.int32) for name, t in call().items()}, ValueError, "q"),
    "another batch": (other("k", lambda t: t[:1]), ValueError, "k"),
    "another batch of v": (other("v", lambda t: t[:1]), ValueError, "v"),
    "another head dimension": (other("k", lambda t: t[..., :8]), ValueError, "k"),
    "heads that do not divide": (other("q", lambda t: t[:, :3]), ValueError, "q"),
    "v has other heads": (other("v", lambda t: t[:, :1]), ValueError, "v"),
    "v is shorter than k": (other("v", lambda t: t[:, :, :-1]), ValueError, "v"),
    "q is not contiguous in D": (other("q", lambda t: t.mT.contiguous().mT), ValueError, "q"),
    "v skips elements": (other("v", lambda t: t.repeat_interleave(2, -1)[..., ::2]), ValueError, "v"),
    "k is broadcast in D": (other("k", lambda t: t[..., :1].expand(t.shape)), ValueError, "k"),
    "out has another shape": (out(lambda t: t[:, :2]), ValueError, "out"),
    "out has another dtype": (out(Tensor.float), ValueError, "out"),
    "out is on another device": (out(lambda t: t.to("meta")), ValueError, "out"),
    "out is not contiguous in D": (out(lambda t: t.mT.contiguous().mT), ValueError, "out"),
    "out shares its own memory": (out(lambda t: t[:1].expand(t.shape)), ValueError, "out"),
    "out is an input": (overlapping, ValueError, "out"),
    "an unknown layout": (option(layout="sbhd"), ValueError, "layout"),
    "an unknown backend": (option(backend="fastest"), ValueError, "backend"),
    "window of one": (option(window=(4,)), ValueError, "window"),
    "window below -1": (option(window=(-2, 0)), ValueError, "window"),
    "softcap below 0": (option(softcap=-1.0), ValueError, "softcap"),
    "softcap is NaN": (option(softcap=math.nan), ValueError, "softcap"),
    "attn_mask is a list": (option(attn_mask=[True]), TypeError, "attn_mask"),
    "attn_mask of integers": (option(attn_mask=torch.ones(20, 24, dtype=torch.int32)), ValueError, "attn_mask"),
    "attn_mask does not broadcast": (option(attn_mask=torch.ones(20, 23)), ValueError, "attn_mask"),
    "attn_mask has 5 dimensions": (option(attn_mask=torch.ones(1, 1, 1, 20, 24)), ValueError, "attn_mask"),
    "seqused_k is a list": (option(seqused_k=[1, 2]), TypeError, "seqused_k"),
    "seqused_k of 64 bits": (option(seqused_k=torch.ones(2, dtype=torch.int64)), ValueError, "seqused_k"),
    "seqused_k of another batch": (option(seqused_k=torch.ones(3, dtype=torch.int32)), ValueError, "seqused_k"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_arguments(route: Any, what: str) -> None:
    arguments, error, name = WRONG[what]
    wrong = arguments()
    before = {key: value.clone() for key, value in wrong.items() if isinstance(value, Tensor)}
    with pytest.raises(error) as caught:
        route(**wrong)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{name}: expected ") and ", got " in message
    for key, value in before.items():
        assert value.is_meta or torch.equal(wrong[key], value)
    works(route)


@pytest.mark.parametrize("options", [{"block_m": 7}, {"block_n": 1 << 20}, {"block_m": 16, "block_n": 100}], ids=str)
def test_tiles_that_no_kernel_has(route: Any, options: dict[str, int]) -> None:
    if not route.is_kernel:
        pytest.skip("the reference path has no tiles")
    with pytest.raises(ValueError, match=r"block_m, block_n: expected one of .*\d+x\d+.*, got ") as caught:
        route(**call(), **options)
    assert type(caught.value) is ValueError
    works(route)


@pytest.mark.parametrize(("rows", "keys"), [(64, 32), (64, 64), (16, None), (None, 32)])
def test_tiles_by_hand(route: Any, rows: int | None, keys: int | None) -> None:
    arguments = call()
    by_position = route(*arguments.values(), rows, keys)
    assert torch.equal(by_position, route(**arguments, block_m=rows, block_n=keys))


OPTIONS: dict[str, Call] = {
    "window": {"window": (4, 0)},
    "window to both sides": {"window": (2, 3), "is_causal": False},
    "softcap": {"softcap": 1.5},
    "bool mask": {"attn_mask": torch.arange(480).view(20, 24) % 3 > 0},
    "mask that hides rows": {"attn_mask": (torch.arange(20) % 4 > 0)[:, None].expand(20, 24)},
    "bias": {"attn_mask": torch.linspace(-3, 3, 480, dtype=torch.float16).view(1, 1, 20, 24)},
    "bias of heads": {"attn_mask": torch.linspace(-3, 3, 96).view(4, 1, 24)},
    "bias in fp64": {"attn_mask": torch.linspace(-3, 3, 480, dtype=torch.float64).view(20, 24)},
    "seqused_k": {"seqused_k": torch.tensor([24, 3], dtype=torch.int32)},
    "seqused_k out of range": {"seqused_k": torch.tensor([99, -3], dtype=torch.int32), "is_causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_computed_or_refused_with_the_kernel_s_reasons(route: Any, name: str) -> None:
    """The reference path serves them all; a kernel never computes something else."""
    try:
        route.checked(**call(), **OPTIONS[name])
    except UnsupportedError as refusal:
        assert route.is_kernel
        kernels = [route.backend] if route.backend else list(KERNELS)
        assert list(refusal.reasons) == kernels and all(refusal.reasons.values())
        works(route)


@pytest.mark.parametrize("dim", [4, 12, 20, 264, 512])
def test_head_dimensions_that_no_kernel_serves(route: Any, dim: int) -> None:
    q, k, v = make("independent", Shape(1, 1, 5, dim))
    if route.is_kernel:
        refused(route, str(dim), q, k, v)
    else:
        route.checked(q, k, v)


def test_fp64_is_served_by_no_kernel(route: Any) -> None:
    inputs = [t.double() for t in call().values()]
    if route.is_kernel:
        refused(route, "float64", *inputs)
    else:
        assert route(*inputs).dtype == torch.float64


def refused(route: Any, reason: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        route(*args, **kwargs)
    assert isinstance(caught.value, NotImplementedError)
    reasons = [why for each in caught.value.reasons.values() for why in each]
    assert any(reason in why for why in reasons)
    assert all(why in str(caught.value) for why in reasons)
    works(route)


def works(route: Any) -> None:
    route.checked(*make("independent", Shape(1, 1, 3, 16)))


def test_cpu_tensors_never_reach_a_gpu_kernel_by_name() -> None:
    for backend in ("hopper", "portable"):  # in this process Triton compiles for GPUs
        with pytest.raises(UnsupportedError) as caught:
            attention(**call(), backend=backend)
        assert caught.value.reasons[backend]
    torch.testing.assert_close(attention(**call(), backend="reference"), attention(**call()), rtol=0, atol=0)
