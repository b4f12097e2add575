"""Random sets of arguments for attention: most of them wrong in one to three places, each drawn from one seed.

`is_problem` states the rules of a call once more, in other words than launch/arguments.py, so that the two check each
other: what is launched must be a problem, and what is one must not be refused as none.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashcore import reference
from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention
from flashcore.security import fake_gpu

DOCUMENTED = (TypeError, ValueError, RuntimeError)
TENSORS = ("q", "k", "v", "out", "attn_mask", "seqused_k")
TILE = 64  # rows, and keys, that some kernel has for each problem of two-byte numbers here
MOST_EXAMPLES = 20

Arguments = dict[str, Any]


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own."""


_ANYTHING: tuple[Any, ...] = (
    None, True, 0, 1, -1, 64, 2**31, 2**70, 10**400, 1.0, 0.5, math.nan, math.inf, "", "64", "bhsd", b"x", (), (1, 2),
    [1, 2], {}, object(), torch.float16, torch.zeros(()), torch.zeros(2, 2, 24, 16),
)  # fmt: skip
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "block_m": (None, 64, 0, -1, 48, 1.5, "64", True, 2**40),
    "block_n": (None, 64, 0, 7, 2**31, [64]),
    "is_causal": (False, True, 0, 1, None, "yes"),
    "scale": (None, 0.5, 1, -0.3, 0.0, 1e-30, 1e300, math.nan, math.inf, -math.inf, "1", True, 10**400, 2**70),
    "window": ((-1, -1), (3, 0), (0, 0), (2, 5), [2, 2], (3,), (1, 2, 3), "ab", None, (None, 1), (-2, 0), (2**70, 0),
               (1.0, 2), 5, (True, 1), {1, 2}, (2**31, 2**31), (2**62, -1)),
    "softcap": (0.0, 1.5, 30, -1.0, 1e-300, 1e300, -0.0, math.nan, math.inf, "1", None, 10**400, True),
    "layout": ("bhsd", "bshd", "sbhd", "", None, 1, []),
    "return_lse": (False, True, 0, None, "no"),
    "backend": (None, "portable", "reference", "hopper", "fastest", 1, [], "Portable"),
}  # fmt: skip


def _strided(t: Tensor, rng: random.Random) -> Tensor:
    """The same memory, other strides, never beyond its end."""
    if t.dim() != 4 or t.numel() == 0:
        return t
    strides = [rng.choice((0, 1, s, s)) for s in t.stride()]
    return t.as_strided(t.shape, strides)


_CHANGES: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda t, rng: None,
    lambda t, rng: t.tolist(),
    lambda t, rng: t.to("meta"),
    lambda t, rng: t.double(),
    lambda t, rng: t.float(),
    lambda t, rng: t.bfloat16(),
    lambda t, rng: t.to(torch.int32),
    lambda t, rng: t.to(torch.complex64),
    lambda t, rng: t.to(torch.float8_e4m3fn),
    lambda t, rng: t > 0,
    lambda t, rng: t[..., ::2],
    lambda t, rng: t.mT if t.dim() > 1 else t,
    lambda t, rng: t.mT.contiguous().mT if t.dim() > 1 else t,
    lambda t, rng: t.unsqueeze(rng.randint(0, t.dim())),
    lambda t, rng: t[0] if t.dim() and t.shape[0] else t,
    lambda t, rng: t.flatten(),
    lambda t, rng: t.narrow(d, 0, 0) if t.dim() and (d := rng.randrange(t.dim())) >= 0 else t,
    lambda t, rng: t.narrow(d, 0, 1) if 0 not in t.shape and t.dim() and (d := rng.randrange(t.dim())) >= 0 else t,
    lambda t, rng: t[..., :-1] if t.dim() else t,
    lambda t, rng: t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t,
    lambda t, rng: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    lambda t, rng: torch.cat([t, t], -1) if t.dim() else t,
    lambda t, rng: torch.cat([t, t], 1) if t.dim() > 1 else t,
    lambda t, rng: t.transpose(1, 2) if t.dim() == 4 else t,
    lambda t, rng: t.to_sparse() if t.numel() else t,
    lambda t, rng: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    lambda t, rng: t.as_subclass(Tagged),
    lambda t, rng: torch.nn.Parameter(t.detach().clone()) if t.is_floating_point() else t,
    lambda t, rng: t.new_zeros(t.numel() + 1)[1:].view(t.shape),
    lambda t, rng: torch.empty(0),
    _strided,
)


def draw(seed: int) -> Arguments:
    """Arguments number `seed`, by name; the same ones every time."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads_kv, group = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 2)
    rows, keys, dim = rng.choice((1, 7, 24)), rng.choice((1, 9, 24)), rng.choice((8, 16, 16, 12))
    dtype = rng.choice((torch.float16, torch.float16, torch.bfloat16))
    bshd = rng.random() < 0.2

    def tensor(heads: int, length: int) -> Tensor:
        made = torch.randn(batch, heads, length, dim, generator=generator).to(dtype)
        return made.transpose(1, 2).contiguous() if bshd else made

    heads = heads_kv * group
    given: Arguments = {"q": tensor(heads, rows), "k": tensor(heads_kv, keys), "v": tensor(heads_kv, keys)}
    if bshd:
        given["layout"] = "bshd"
    if rng.random() < 0.3:
        given["out"] = torch.full_like(given["q"], math.nan)
    if rng.random() < 0.3:
        shape = [rng.choice((1, n)) for n in (batch, heads, rows, keys)]
        given["attn_mask"] = torch.randn(shape, generator=generator) > 0
        if rng.random() < 0.4:
            given["attn_mask"] = torch.randn(shape, generator=generator).to(rng.choice((dtype, torch.float32)))
    if rng.random() < 0.2:
        given["seqused_k"] = torch.randint(-2, keys + 3, (batch,), generator=generator, dtype=torch.int32)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        _spoil(given, rng)
    return given


def _spoil(given: Arguments, rng: random.Random) -> None:
    """Change one argument for another, which may be a fine one, too."""
    kind = rng.random()
    if kind < 0.45:
        name = rng.choice([n for n in TENSORS if n in given])
        if isinstance(given[name], Tensor) and given[name].layout == torch.strided and not given[name].is_meta:
            # Not every change can be made of every tensor, and torch warns of some.
            with contextlib.suppress(RuntimeError, IndexError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given[name] = rng.choice(_CHANGES)(given[name], rng)
    elif kind < 0.85:
        name = rng.choice(list(_OPTIONS))
        given[name] = rng.choice(_OPTIONS[name])
    elif kind < 0.92:
        given[rng.choice((*TENSORS, *_OPTIONS))] = rng.choice(_ANYTHING)
    else:
        given["out"] = rng.choice([given[n] for n in "qkv"])


def is_problem(a: Arguments) -> bool:
    """Whether these arguments describe attention, by the documentation of `attention`; kernels may still refuse it."""
    q, k, v, out, mask, used = (a.get(name) for name in TENSORS)
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if not all(t is None or (isinstance(t, Tensor) and t.layout == torch.strided) for t in (out, mask, used)):
        return False
    return _options(a) and _tensors(a, q, k, v) and _extras(a, q, k, out, mask, used)


def taken_for(a: Arguments) -> Arguments:
    """The same with numbers of the types that they should have: 0 is equal to False, and 64.0 to 64.

    A call that is equal to one seen before is served as that one; seen for the first time it is refused.
    """
    same = dict(a)
    for name in ("is_causal", "return_lse", "block_m", "block_n"):
        for value in (False, True, 64):
            kind = bool if name in ("is_causal", "return_lse") else int
            if isinstance(a.get(name), (bool, int, float)) and a[name] == value:
                same[name] = kind(value)
    if isinstance(a.get("scale"), bool):
        same["scale"] = float(a["scale"])
    if isinstance(a.get("window"), tuple):
        whole = (isinstance(n, (bool, int, float)) and -2.0**62 < n < 2.0**62 and n == int(n) for n in a["window"])
        if all(whole):
            same["window"] = tuple(int(n) for n in a["window"])
    return same


def _options(a: Arguments) -> bool:
    def number(x: Any) -> bool:
        return isinstance(x, (int, float)) and -1e18 <= x <= 1e18  # NaN is in no interval

    sizes = (a.get("block_m"), a.get("block_n"))
    scale, softcap, window = a.get("scale"), a.get("softcap", 0.0), a.get("window", (-1, -1))
    return (
        all(size is None or (type(size) is int and abs(size) < 2**63) for size in sizes)
        and all(type(a.get(flag, False)) is bool for flag in ("is_causal", "return_lse"))
        and (scale is None or (number(scale) and type(scale) is not bool))
        and number(softcap) and (softcap >= 1e-18 or softcap == 0)
        and isinstance(window, (tuple, list)) and len(window) == 2
        and all(type(n) is int and -2 < n < 2**63 for n in window)
        and isinstance(a.get("layout", "bhsd"), str) and a.get("layout", "bhsd") in ("bhsd", "bshd")
        and isinstance(a.get("backend", ""), (str, type(None)))
        and a.get("backend") in (None, "portable", "reference", "hopper")
    )  # fmt: skip


def _tensors(a: Arguments, q: Tensor, k: Tensor, v: Tensor) -> bool:
    if any(t.layout != torch.strided or t.dim() != 4 or t.device.type != q.device.type for t in (q, k, v)):
        return False
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        return False
    if any(t.numel() and t.shape[3] > 1 and t.stride(3) != 1 for t in (q, k, v)):
        return False
    (bq, hq, _, dq), (bk, hk, nk, dk), (bv, hv, nv, dv) = (_bhsd(a, t) for t in (q, k, v))
    return (bq, dq, hk, nk) == (bk, dk, hv, nv) and bq == bv and hk > 0 and hq % hk == 0 and dq > 0 and dv > 0


def _bhsd(a: Arguments, t: Tensor) -> tuple[int, int, int, int]:
    b, x, y, d = t.shape
    return (b, y, x, d) if a.get("layout") == "bshd" else (b, x, y, d)


def _extras(a: Arguments, q: Tensor, k: Tensor, out: Any, mask: Any, used: Any) -> bool:
    (batch, heads, rows, _), (_, _, keys, _) = _bhsd(a, q), _bhsd(a, k)
    grads = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in a.values())
    if mask is not None:
        fits = mask.dim() <= 4 and all(
            m in (1, n) for m, n in zip(reversed(mask.shape), (keys, rows, heads, batch), strict=False)
        )
        if not fits or mask.device != q.device or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
            return False
    if used is not None:
        right = used.dtype == torch.int32 and used.shape == (batch,) and used.device == q.device
        if not right or not used.is_contiguous():
            return False
    if out is None:
        return True
    shape = (*q.shape[:3], a["v"].shape[3])
    if out.shape != shape or out.dtype != q.dtype or out.device != q.device or grads:
        return False
    if out.numel() == 0:
        return True
    if out.shape[3] > 1 and out.stride(3) != 1:
        return False
    if q.is_meta:
        return True
    places = _places(out)
    if len(places) != out.numel():  # two elements in one place
        return False
    lowest, highest = min(places), max(places)
    inputs = [t for t in (q, k, a["v"], mask) if t is not None and t.numel()]
    return all(max(there := _places(t)) + t.element_size() <= lowest or min(there) > highest + 1 for t in inputs)


def _places(t: Tensor) -> set[int]:
    """The address of every element."""
    places = {t.data_ptr()}
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = {p + i * stride * t.element_size() for p in places for i in range(size)}
    return places


def _expected(a: Arguments) -> Tensor:
    swap = a.get("layout") == "bshd"
    q, k, v = (a[name].detach() for name in "qkv")
    q, k, v = (t.transpose(1, 2) if swap else t for t in (q, k, v))
    wanted = {n: a[n] for n in ("is_causal", "scale", "softcap", "attn_mask", "seqused_k") if a.get(n) is not None}
    window = tuple(a.get("window", (-1, -1)))
    got = reference.cpu(q, k, v, window=window, **wanted)
    out = got[0] if isinstance(got, tuple) else got
    return out.transpose(1, 2) if swap else out


def judge(a: Arguments, gpu: fake_gpu.FakeGpu) -> tuple[str, bool]:
    """(what is wrong with how this call ended, "" = nothing; whether it launched)."""
    before = len(gpu.launches)
    problem = is_problem(a)
    out = a.get("out")
    kept = out.detach().clone() if isinstance(out, Tensor) and not out.is_meta and out.layout == torch.strided else None
    try:
        result = attention(**a)
    except DOCUMENTED as error:
        if len(gpu.launches) != before:
            return f"launched, then raised {error!r}", True
        if problem and _has_tile(a) and not isinstance(error, UnsupportedError):
            return f"a problem was refused: {error!r}", False
        if kept is not None and not _same(out, kept):
            return "refused, but wrote into out", False
        return "", False
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}", len(gpu.launches) != before
    launched = len(gpu.launches) != before
    if not problem:
        a = taken_for(a)
        if not is_problem(a):
            return "what is no problem was computed", launched
    got = result[0] if isinstance(result, tuple) else result
    if launched and not torch.equal(got.detach().nan_to_num(7.0), _expected(a).nan_to_num(7.0)):
        return "a wrong result", launched
    return "", launched


def _has_tile(a: Arguments) -> bool:
    """Whether some kernel surely has these tiles for a problem: not beside a mask, which takes registers."""
    sizes = [size for size in (a.get("block_m"), a.get("block_n")) if size is not None]
    narrow = a["q"].element_size() == 2 and a.get("attn_mask") is None
    return not sizes or (all(size == TILE for size in sizes) and narrow)


def _same(a: Any, b: Tensor) -> bool:
    """Equal, NaN included."""
    return torch.equal(a.detach().to(torch.complex128).nan_to_num(7.0), b.to(torch.complex128).nan_to_num(7.0))


@contextlib.contextmanager
def _grad_mode(seed: int) -> Iterator[None]:
    with torch.set_grad_enabled(seed % 4 == 0):
        yield


def try_all(count: int, seed: int, native: Any) -> dict[str, Any]:
    """Call attention with `count` random argument sets on a fake GPU; after each, a plain call must be right.

    Returns:
        calls; launched; problems: argument sets that are one; wrong: calls that ended as they should not have;
        examples of them, each with its number, from which `draw` makes it again.
    """
    found: Counter[str] = Counter()
    examples: list[str] = []
    plain: Any = [torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(i)).half() for i in range(3)]
    want: Any = reference.cpu(*plain)
    with fake_gpu.installed(native) as gpu:
        for number in range(seed * 10_000_000, seed * 10_000_000 + count):
            given = draw(number)
            with _grad_mode(number):
                wrong, launched = judge(given, gpu)
            again: Any = attention(*plain)
            if not wrong and not torch.equal(again, want):
                wrong = "the next call is wrong"
            found["calls"] += 1
            found["launched"] += launched
            found["problems"] += is_problem(given)
            found["wrong"] += bool(wrong)
            if wrong and len(examples) < MOST_EXAMPLES:
                examples.append(f"{number}: {wrong}"[:300])
            gpu.allocated.clear()
            gpu.launches.clear()
    return {**{n: found[n] for n in ("calls", "launched", "problems", "wrong")}, "examples": examples}
