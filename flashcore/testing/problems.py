"""Random problems of attention and attention_varlen: every option together with every other, each from one integer.

    python -m flashcore.testing.problems 1234 --backend portable --device cuda

runs problem 1234 once more and says what the gates found; with --count, as many from there on. On a CPU the portable
kernel needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.core.errors import UnsupportedError
from flashcore.testing.gates import Expected, expect
from flashcore.testing.inputs import (
    FAMILIES,
    LAYOUTS,
    Guarded,
    Inputs,
    Shape,
    fetch,
    intact,
    lay_out,
    make,
    place,
    poison_padding,
)

KIN = 100  # consecutive seeds that share what a kernel is compiled for, so that a GPU's time goes into running them
LONGEST = 300  # rows, and keys, of a sequence
MOST_SCORES = 2**21  # of one problem: what its fp64 reference holds
LARGEST_LOGIT = 2.0**27  # in magnitude: beyond it nothing is promised, see the conventions in docs/design.md
DTYPES = (*[torch.float16] * 4, *[torch.bfloat16] * 4, torch.float32)  # fp32's kernels take longest to compile
MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
JUDGED = ("is_causal", "scale", "window", "softcap", "attn_mask", "seqused_k")
ALIGNED = ("contiguous", "bshd", "packed", "sliced", "batch_broadcast", "head_broadcast")
BROADCAST = ("batch_broadcast", "head_broadcast", "row_broadcast")


class Call(NamedTuple):
    """The arguments of one call, those of attention_varlen where there is a cu_seqlens_q among them."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]  # `out` as the layout that Guarded gives it, "" = none

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.tensors

    def __str__(self) -> str:
        sizes = [f"{n} {t.dtype} {list(t.shape)} strides {list(t.stride())}" for n, t in self.tensors.items()]
        lengths = [f"{n} = {t.tolist()}" for n, t in self.tensors.items() if t.dtype == torch.int32]
        return "; ".join((*sizes, *lengths, str(self.options)))


def random_problem(seed: int, longest: int = LONGEST) -> Call:
    """Problem number `seed` on the CPU: the same one on every machine.

    Sequences have at most `longest` rows; sequences times query heads are at most 4, or longest / 8.
    """
    return draw(Random(seed // KIN), Random(f"{seed} of {KIN}"), longest)


def draw(kind: Random, detail: Random, longest: int = LONGEST) -> Call:
    """A problem: what a compiled kernel depends on is drawn from `kind`, the sizes and values from `detail`."""
    packed = kind.random() < 0.25
    tma = kind.random() < 0.5  # such as TMA describes: without them the Hopper kernel serves one in fifteen
    dtype = kind.choice(DTYPES[:-1] if tma else DTYPES)
    widest = 16 if tma else 32
    dim = kind.choice((32, 64, 64, 128, 8 * kind.randint(1, 16), 8 * kind.randint(1, widest)))
    dim_v = dim if kind.random() < 0.7 else 8 * kind.randint(1, widest)
    group = kind.choice((1, 1, 2, 3, 4))
    options: dict[str, Any] = {
        "is_causal": kind.random() < 0.4,
        "return_lse": kind.random() < 0.8,
        "out": kind.choice(("", "", "contiguous", "bshd", "padded")),
    }
    fp32 = dtype == torch.float32
    few_keys = not tma and kind.random() < 0.5  # several tiles of them, on every GPU
    if few_keys and max(dim, dim_v) <= (64 if fp32 else 128):
        options |= {"block_m": 32 if fp32 else 64, "block_n": 32}
    if kind.random() < 0.35:
        options["softcap"] = detail.choice((0.5, 1.0, 5.0, 20.0, 30.0, 50.0))
    sign = kind.choice((1.0, 1.0, 1.0, -1.0))
    size = detail.choice((None, None, None, 0.0, 1e-30, 1e-3, 0.3, 1.0))
    if size is not None or sign < 0:
        options["scale"] = sign * (dim**-0.5 if size is None else size)
    window = kind.choice((None, None, (True, True), (True, False), (False, True)))
    layouts = [kind.choice(("contiguous", "contiguous", "bshd", *(ALIGNED if tma else LAYOUTS))) for _ in "qkv"]

    pairs = max(4, longest // 8)
    heads_kv = detail.randint(1, min(3, pairs // group))
    sequences = pairs // (group * heads_kv)
    made = _packed if packed else partial(_padded, tma)
    sizes = (sequences, heads_kv * group, heads_kv, dim, dim_v)
    tensors, lengths = made(kind, detail, longest, sizes, dtype, layouts)
    options |= lengths
    if window is not None:
        most = max(size for t in tensors.values() for size in t.shape)
        options["window"] = tuple(detail.choice((0, 1, detail.randint(0, most + 2))) if side else -1 for side in window)
    scale = options.get("scale", dim**-0.5)
    reach = abs(scale) * _largest_norm(tensors["q"]) * _largest_norm(tensors["k"])
    if reach > LARGEST_LOGIT:
        options["scale"] = scale * LARGEST_LOGIT / reach
    return Call(tensors, options)


def _largest_norm(rows: Tensor) -> float:
    """Of a row's numbers, those that are finite."""
    return float(rows.double().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).max()) if rows.numel() else 0.0


def _lengths(detail: Random, longest: int, pairs: int) -> tuple[int, int]:
    """Rows and keys, so that all scores of `pairs` heads are not too many."""
    def length() -> int:
        kind = detail.random()
        if kind < 0.02:
            return 0
        if kind < 0.1:
            return 1
        if kind < 0.25:
            return max(1, detail.randint(0, longest // 32)) * 32
        return detail.randint(1, longest if kind < 0.6 else max(1, longest // 3))

    rows, keys = length(), length()
    if detail.random() < 0.3:
        keys = rows
    most = MOST_SCORES // pairs
    return min(rows, most), min(keys, most // max(1, rows))


def _padded(
    tma: bool, kind: Random, detail: Random, longest: int, sizes: tuple[int, int, int, int, int], dtype: torch.dtype,
    layouts: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    sequences, heads_q, heads_kv, dim, dim_v = sizes
    layout = kind.choice(("bhsd", "bhsd", "bshd"))
    masked, used = kind.random() < 0.45, kind.random() < 0.3
    batch = min(sequences, detail.choice((1, 1, 2, 3)))
    rows, keys = _lengths(detail, longest, batch * heads_q)
    shape = Shape(batch, heads_q, rows, dim, heads_kv, keys, dim_v)
    inputs = _inputs(detail, shape, dtype)
    extra: dict[str, Tensor] = {}
    if used:
        counts = [detail.choice((keys, detail.randint(0, keys), detail.randint(-3, keys + 3))) for _ in range(batch)]
        extra["seqused_k"] = torch.tensor(counts, dtype=torch.int32)
        if not {*layouts[1:]} & {*BROADCAST}:
            inputs = poison_padding(inputs, extra["seqused_k"])
    if masked:
        extra["attn_mask"] = _mask(kind, detail, (batch, heads_q, rows, keys), tma)
    if 0 not in (rows, keys):
        inputs = Inputs(*(lay_out(t, where) for t, where in zip(inputs, layouts, strict=True)))
    if layout == "bshd":
        inputs = Inputs(*(t.transpose(1, 2) for t in inputs))
    return inputs._asdict() | extra, {"layout": layout}


def _packed(
    kind: Random, detail: Random, longest: int, sizes: tuple[int, int, int, int, int], dtype: torch.dtype,
    layouts: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    sequences, heads_q, heads_kv, dim, dim_v = sizes
    few = kind.random() < 0.7  # else one long sequence among many short ones, which get a grid of their own
    count = detail.randint(1, min(6, sequences)) if few else detail.randint(8, 24)
    others = max(1, longest // (3 if few else 24))
    lengths = [_lengths(detail, longest if i == 0 else others, heads_q) for i in range(count)]
    detail.shuffle(lengths)
    tensors, total, options = {}, [], {}
    for name, side in zip("qk", zip(*lengths, strict=True), strict=True):
        bounds = [detail.choice((0, 0, 3))]
        for length in side:
            bounds.append(bounds[-1] + (0 if detail.random() < 0.1 else length))
        total.append(max(1, bounds[-1] + detail.choice((0, 0, 2))))
        longest_here = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        most = detail.choice((longest_here, longest_here, longest_here + detail.randint(0, 70)))
        if detail.random() < 0.2:  # lengths that are wrong
            most = detail.choice((most, most // 2))
            bounds[0], bounds[-1] = -detail.randint(0, 4), detail.choice((bounds[-1] + 5, 2**31 - 1, -1))
            if name == "k":  # of rows of q that two sequences claim, either result is right
                bounds[detail.randrange(count + 1)] = detail.randint(-5, bounds[-2] + 5)
        tensors[f"cu_seqlens_{name}"] = torch.tensor(bounds, dtype=torch.int32)
        options[f"max_seqlen_{name}"] = most
    inputs = _inputs(detail, Shape(1, heads_q, total[0], dim, heads_kv, total[1], dim_v), dtype)
    placed = (lay_out(t, where)[0].transpose(0, 1) for t, where in zip(inputs, layouts, strict=True))
    return dict(zip("qkv", placed, strict=True)) | tensors, options


def _inputs(detail: Random, shape: Shape, dtype: torch.dtype) -> Inputs:
    family = "independent" if detail.random() < 0.3 else detail.choice(tuple(FAMILIES))
    return make(family, shape, dtype, seed=detail.getrandbits(31))


def _mask(kind: Random, detail: Random, scores: tuple[int, int, int, int], tma: bool) -> Tensor:
    """A mask of any form that broadcasts to `scores`, of any dtype, in any memory layout, with any kind of holes."""
    dtype = kind.choice(MASK_DTYPES)
    whole = [detail.random() < 0.6, detail.random() < 0.6, kind.random() < 0.75, tma or kind.random() < 0.85]
    elsewhere = ("contiguous", "contiguous", "contiguous", "transposed", "sliced", "offset", "expanded")
    layout = "padded" if tma else kind.choice(elsewhere)
    shape = [size if full else 1 for size, full in zip(scores, whole, strict=True)]
    generator = torch.Generator().manual_seed(detail.getrandbits(31))
    share = detail.choice((0.05, 0.5, 0.95))
    hidden = torch.rand(shape, generator=generator) < share
    holes = detail.choice(("none", "any", "padding", "rows", "blocks", "all"))
    if holes == "none":
        hidden[:] = False
    elif holes == "padding":
        hidden[:] = torch.arange(shape[3]) >= detail.randint(0, shape[3])
    elif holes == "rows":
        hidden[:] = hidden[..., :1].clone()
    elif holes == "blocks":
        blocks = hidden[:, :, ::64, ::64].repeat_interleave(64, 2).repeat_interleave(64, 3)
        hidden[:] = blocks[:, :, : shape[2], : shape[3]]
    elif holes == "all":
        hidden[:] = True
    if dtype == torch.bool:
        mask = ~hidden
    else:
        bias = detail.choice((0.1, 1.0, 10.0)) * torch.randn(shape, generator=generator)
        lowest = torch.finfo(dtype).min
        mask = bias.masked_fill(hidden, detail.choice((-math.inf, -math.inf, -30.0, -1e4, max(-1e9, lowest), lowest)))
        mask = mask.to(dtype)
    mask = _lay_out_mask(mask, layout)
    while mask.dim() > 1 and mask.shape[0] == 1 and detail.random() < 0.5:
        mask = mask[0]
    return mask.expand(scores) if layout == "expanded" else mask


def _lay_out_mask(mask: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return mask.mT.contiguous().mT
    if layout == "sliced":
        b, h, m, n = mask.shape
        return mask.new_ones(b, h + 1, m + 2, n + 3)[:, 1:, 1:-1, 2:-1].copy_(mask)
    if layout == "offset":
        return mask.new_ones(mask.numel() + 1)[1:].view(mask.shape).copy_(mask)
    if layout == "padded":
        *outer, keys = mask.shape
        return mask.new_ones(*outer, -(-keys // 16) * 16)[..., :keys].copy_(mask)
    return mask


# -- running ----------------------------------------------------------------------------------------------------


def run(call: Call, backend: str | None = None, device: torch.device | str = "cpu") -> str:
    """What the gates say of a call on `device`, "" when all of it is right.

    Raises:
        UnsupportedError: `backend` does not serve it.
    """
    return Trial(call, device).run(backend)


class Trial:
    """A call on a device, put to any number of backends: its inputs are sent once, the reference is computed once.

    It is judged on the CPU. On a GPU, where every operator of the gates is a launch and several processes wait for each
    other's, that leaves the call itself and one copy of what it wrote, the only thing that is waited for.
    """

    def __init__(self, call: Call, device: torch.device | str = "cpu") -> None:
        self.call, self.device = call, device

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The call's, on the device."""
        return {name: place(t, self.device) for name, t in self.call.tensors.items()}

    @cached_property
    def expected(self) -> list[tuple[slice, Expected]]:
        """Rows, and what is right for them: each packed sequence by itself, else all at once."""
        call = self.call
        q, k, v = (_heads_first(call, name) for name in "qkv")
        given = {**call.options, **call.tensors}
        judged = {name: value for name, value in given.items() if name in JUDGED}
        sides = [_sequences(call, name) if call.packed else [slice(None)] for name in "qk"]
        return [
            (rows, expect(q[:, :, rows], k[:, :, keys], v[:, :, keys], q.dtype, **judged))
            for rows, keys in zip(*sides, strict=True)
        ]

    def run(self, backend: str | None = None) -> str:
        """`run` of this module, by one backend."""
        from flashcore.fast.attention_production import attention
        from flashcore.fast.varlen import attention_varlen

        call, options = self.call, {**self.call.options, "backend": backend}
        if backend == "hopper":  # which has tiles of its own
            options |= {"block_m": None, "block_n": None}
        into = options.pop("out")
        if into:
            q, v = _heads_first(call, "q"), _heads_first(call, "v")
            guarded = Guarded((*q.shape[:3], v.shape[3]), q.dtype, self.device, into)
            options["out"] = _as_asked(guarded.out, call)
        compute: Any = attention_varlen if call.packed else attention
        result = compute(**self.tensors, **options)
        returned = result if options["return_lse"] else (result,)
        expected = self.expected  # computed for the first backend, while a GPU is at its call
        out, *lse = fetch(*returned)
        wrong = _judge(call, expected, out, lse[0] if lse else None)
        if into and not (returned[0] is options["out"] and intact(out)):
            wrong.append("written beside the output, or not into it")
        for tensor in returned:  # what the next backend leaves unwritten must not hold what was right here
            tensor.fill_(math.nan)
        return "; ".join(failure for failure in wrong if failure)


def _heads_first(call: Call, name: str) -> Tensor:
    """A tensor of the call as [B, H, S, D], packed sequences as one."""
    return _swapped(call.tensors[name], call)


def _swapped(tensor: Tensor, call: Call) -> Tensor:
    if call.packed:
        return tensor.transpose(0, 1)[None]
    return tensor.transpose(1, 2) if call.options["layout"] == "bshd" else tensor


def _as_asked(tensor: Tensor, call: Call) -> Tensor:
    """The reverse of `_swapped`."""
    return tensor[0].transpose(0, 1) if call.packed else _swapped(tensor, call)


def _judge(call: Call, expected: list[tuple[slice, Expected]], out: Tensor, lse: Tensor | None) -> list[str]:
    """Rows that belong to no packed sequence hold what they held before, where that is known."""
    wrong = []
    if out.dtype != call.tensors["q"].dtype or (lse is not None and lse.dtype != torch.float32):
        wrong.append(f"returned {out.dtype}, {lse if lse is None else lse.dtype}")
    out = _swapped(out, call)
    if lse is not None and call.packed:
        lse = lse[None]
    for rows, right in expected:
        wrong.append(right.check(out[:, :, rows], None if lse is None else lse[:, :, rows]).failures)
    if call.packed and call.options["out"] and not out[:, :, rows_of_none(call)].isnan().all():
        wrong.append("written to rows of no sequence")
    return wrong


def _sequences(call: Call, name: str) -> list[slice]:
    """The rows of each packed sequence, of q or k, clamped as attention_varlen says."""
    total, longest = len(call.tensors[name]), call.options[f"max_seqlen_{name}"]
    within = [min(max(at, 0), total) for at in call.tensors[f"cu_seqlens_{name}"].tolist()]
    return [slice(a, max(a, min(b, a + longest))) for a, b in zip(within, within[1:], strict=False)]


def rows_of_none(call: Call) -> Tensor:
    """bool [total], of packed sequences: rows of q that belong to none, which no kernel writes."""
    of_none = torch.ones(len(call.tensors["q"]), dtype=torch.bool)
    for rows in _sequences(call, "q"):
        of_none[rows] = False
    return of_none


def repro(seed: int, backend: str | None, device: str, longest: int = LONGEST) -> str:
    """The command that runs one problem again."""
    chosen = f" --backend {backend}" if backend else ""
    interpreted = "TRITON_INTERPRET=1 " if backend == "portable" and device == "cpu" else ""
    module = "python -m flashcore.testing.problems"
    return f"{interpreted}{module} {seed}{chosen} --device {device} --longest {longest}"


def run_seed(seed: int, backend: str | None = None, device: str = "cpu", longest: int = LONGEST) -> str:
    """`run` for problem number `seed`: "" when it is right, else the command that repeats it and what is wrong.

    Raises:
        UnsupportedError: `backend` does not serve it.
    """
    call = random_problem(seed, longest)
    try:
        wrong = run(call, backend, device)
    except UnsupportedError:
        raise
    except Exception as error:  # a kernel may fail in any way
        wrong = f"{type(error).__name__}: {error}"
    return f"{repro(seed, backend, device, longest)}\n    {wrong}\n    {call}" if wrong else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a problem failed."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.testing.problems", description="Run random problems through every gate."
    )
    parser.add_argument("seed", type=int, help="the first problem's number")
    parser.add_argument("--count", type=int, default=1, help="how many from there on")
    parser.add_argument("--step", type=int, default=1, help=f"from one to the next; {KIN} others share its kernel")
    parser.add_argument("--backend", choices=("hopper", "portable", "reference"), help="chosen when left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longest", type=int, default=LONGEST, help="rows and keys of a sequence")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)  # products as small as these take longer on two threads than on one
    failures = refused = 0
    for seed in range(asked.seed, asked.seed + asked.count * asked.step, asked.step):
        try:
            failure = run_seed(seed, asked.backend, asked.device, asked.longest)
        except UnsupportedError:
            refused += 1
            continue
        if failure:
            failures += 1
            print(failure, flush=True)  # at once: what follows may end this process
    print(f"{asked.count} problems: {failures} wrong, {refused} refused by {asked.backend}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
