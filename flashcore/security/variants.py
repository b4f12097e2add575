"""What the audit compiles: every shipped variant, the options alone and together, and controls.

Of the options every combination is there at head dimension 64, in the tile that is chosen for it; each tile and head
dimension with all options that go together; and each further way in which a problem changes a kernel's code: strides,
alignment, broadcast masks, the sign of the scale.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import torch

from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Mask, Problem
from flashcore.core.target import Target
from flashcore.launch import select
from flashcore.launch.arguments import Options, packed_problem_of, problem_of
from flashcore.launch.compile_check import TARGETS
from flashcore.security.controls import CONTROLS
from flashcore.testing import problems

_BATCH, _HEADS, _SEQLEN = 8, 8, 197
_MASK_ROW = 208  # elements from one row of a mask to the next: a multiple of 16 bytes, which TMA asks for
_MASKS = {
    "bool": Mask(torch.bool, (_SEQLEN, 0, 0, 1)),  # which keys are padding; its row is not aligned, nor need it be
    "fp16": Mask(torch.float16, (_HEADS * _SEQLEN * _MASK_ROW, _SEQLEN * _MASK_ROW, _MASK_ROW, 1)),
    "fp32": Mask(torch.float32, (0, _SEQLEN * _MASK_ROW, _MASK_ROW, 1)),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it is compiled for one GPU."""

    problem: Problem
    config: Config
    target: Target
    control: str = ""  # the fault planted in it, of controls.CONTROLS
    negative: bool = False  # a scale below 0

    @property
    def name(self) -> str:
        p, c = self.problem, self.config
        masks = "x".join("1" if s == 0 else "n" for s in p.mask.strides) if p.mask else ""
        parts = [
            f"sm_{self.target.arch}", c.kernel, c.schedule, _short(p.dtype), f"D{p.head_dim}",
            f"Dv{p.head_dim_v}" if p.head_dim_v != p.head_dim else "",
            f"S{p.seqlen_k}", "causal" if p.is_causal else "", "lse" if p.return_lse else "",
            "window" if p.window != (-1, -1) else "", "softcap" if p.softcap else "",
            f"mask:{_short(p.mask.dtype)}[{masks}]" if p.mask else "", "seqused_k" if p.seqused_k else "",
            "short" if p.packed and max(p.packed) < p.batch * p.seqlen_k else "", "cu_seqlens" if p.packed else "",
            "" if p.aligned else "unaligned",
            "" if all(s % 8 == 0 for s in p.stride_q) else "odd",
            f"GQA{p.group}" if p.group > 1 else "", f"B{p.batch}" if p.batch != _BATCH else "",
            "wide" if max(p.stride_k) >= 2**24 else "", "scale<0" if self.negative else "",
            f"{c.block_m}x{c.block_n}", f"{c.num_warps}w", f"{c.num_stages}s", f"r{c.maxnreg}" if c.maxnreg else "",
            f"CONTROL:{self.control}" if self.control else "",
        ]  # fmt: skip
        return " ".join(part for part in parts if part)


def variants(archs: Sequence[int], *, quick: bool = False) -> list[Variant]:
    """Everything for these architectures, then the controls of each of their kernels.

    Args:
        archs: compute capabilities, of compile_check's TARGETS.
        quick: of each kernel, schedule and mask only the variant with the least code, and one with most options.
    """
    found: list[Variant] = []
    for arch in archs:
        target = TARGETS[arch]
        plain = [Variant(p, c, target) for p, c in select.shipped(target)]
        if quick:
            plain.sort(key=lambda v: v.config.block_m * v.config.block_n * v.problem.head_dim, reverse=True)
            plain = list({(v.config.kernel, v.config.schedule, v.problem.is_causal): v for v in plain}.values())
        found += plain
        found += _most_options(target) if quick else _options(target)
    controls = [v for arch in archs for v in _controls(TARGETS[arch])]
    return list(dict.fromkeys(found)) + controls


def drawn(archs: Sequence[int], count: int, seed: int = 0) -> list[Variant]:
    """So many more for each architecture: of random problems as `audit fuzz` draws them, as they are chosen and by the
    portable kernel.
    """
    found: dict[int, dict[Variant, None]] = {arch: {} for arch in archs}
    for number in itertools.count():
        problem, options = _described(problems.draw(Random(f"{seed} {number}"), Random(number)))
        if problem.dtype == torch.float32:
            continue  # no tensor core computes it, by which the audit knows an attention kernel
        for arch, backend in product(archs, (None, "portable")):
            with contextlib.suppress(UnsupportedError, ValueError):  # no kernel serves it there, or not by such a tile
                config = select.select(
                    problem, TARGETS[arch], backend=backend, block_m=options.block_m, block_n=options.block_n
                )  # fmt: skip
                negative = options.scale_for(problem.head_dim) < 0
                found[arch][Variant(problem, config, TARGETS[arch], negative=negative)] = None
        if all(len(found[arch]) >= count for arch in archs):
            return [v for arch in archs for v in [*found[arch]][:count]]
    raise AssertionError("numbers end")


def _described(call: problems.Call) -> tuple[Problem, Options]:
    options = Options(**{name: value for name, value in call.options.items() if name in Options._fields})
    q, k, v = (call.tensors[name] for name in "qkv")
    if call.packed:
        sequences = call.tensors["cu_seqlens_q"].shape[0] - 1
        longest = call.options["max_seqlen_q"], call.options["max_seqlen_k"]
        return packed_problem_of(q, k, v, None, sequences, *longest, options), options
    return problem_of(q, k, v, None, options, call.tensors.get("attn_mask"), call.tensors.get("seqused_k")), options


def _options(target: Target) -> Iterator[Variant]:
    for kernel in select.KERNELS:
        for problem in _combinations():
            yield from _chosen(problem, kernel, target)
    most = [v.problem for v in _most_options(target)]
    for problem in dict.fromkeys([*most, *(p for p in _combinations() if len(p.options) == 1 and not p.is_causal)]):
        for config in select.candidates(problem, target):
            if config.kernel == "hopper" or problem in most:
                yield Variant(problem, config, target)
    for problem, dim in product(dict.fromkeys(most), (32, 96, 128, 256)):
        for kernel in select.KERNELS:
            yield from _chosen(_sized(problem, dim), kernel, target)
    yield from _layouts(target)


def _combinations() -> Iterator[Problem]:
    """Each combination of options that `attention` and `attention_varlen` take, but for none at all."""
    base = _plain()
    # a window takes the place of the causal mask's code
    seen = [(False, (-1, -1)), (True, (-1, -1)), (False, (64, 64))]
    for (is_causal, window), softcap, mask, used in product(seen, (0.0, 30.0), (None, *_MASKS.values()), (False, True)):
        problem = replace(base, is_causal=is_causal, window=window, softcap=softcap, mask=mask, seqused_k=used)
        if problem.options:
            yield problem
    for (is_causal, window), softcap in product(seen, (0.0, 30.0)):
        for short in (False, True):
            yield replace(_packed(base, short=short), is_causal=is_causal, window=window, softcap=softcap)


def _most_options(target: Target) -> Iterator[Variant]:
    """For each kernel all the options that go together, with lengths of each sort."""
    base = replace(_plain(), window=(64, 64), softcap=30.0)
    for kernel in select.KERNELS:
        yield from _chosen(replace(base, mask=_MASKS["fp16"], seqused_k=True), kernel, target)
        for short in (False, True):
            yield from _chosen(_packed(base, short=short), kernel, target)


def _layouts(target: Target) -> Iterator[Variant]:
    """What else of a problem changes the code."""
    base = replace(_plain(), return_lse=False)
    far = 2**25  # elements from row to row: offsets inside of a tile need 64 bits
    few = (_HEADS // 4) * base.stride_k[1], base.stride_k[1], base.stride_k[2]
    odd = _SEQLEN * _HEADS * 65, _SEQLEN * 65, 65
    row_mask, far_mask = Mask(torch.bool, (_HEADS * _SEQLEN, _SEQLEN, 1, 0)), Mask(torch.float16, (0, 0, far, 1))
    narrow = 8 * odd[0] // 65, 8 * odd[1] // 65, 8  # of v, where k's rows are wider
    problems = [
        replace(base, aligned=False), replace(base, aligned=False, head_dim_v=8, stride_v=narrow, stride_o=narrow),
        replace(base, stride_q=odd, stride_k=odd, stride_v=odd, stride_o=odd),
        replace(base, heads_kv=_HEADS // 4, stride_k=few, stride_v=few), replace(base, mask=row_mask),
        replace(base, mask=far_mask), replace(base, stride_k=(0, far, 16 * far), stride_v=(0, far, 16 * far)),
        replace(base, batch=70_000), replace(base, dtype=torch.bfloat16, seqused_k=True, mask=_MASKS["bool"]),
        # enough sequences to be sorted by length: for blocks that take one item and for those that stay
        *(replace(base, batch=batch, seqused_k=True) for batch in (32, 40)), _packed(replace(base, batch=40)),
        replace(base, mask=_MASKS["fp16"]), replace(base, batch=40, mask=_MASKS["fp16"]),
    ]  # fmt: skip
    for kernel in select.KERNELS:
        for problem in problems:
            yield from _chosen(problem, kernel, target)
        for v in _chosen(replace(base, is_causal=True), kernel, target):
            yield replace(v, negative=True)
    shared = replace(base, is_causal=True, heads_kv=_HEADS // 4, stride_k=few, stride_v=few)
    for rows in (_SEQLEN, _SEQLEN // 64 * 64):  # of one block's heads, and of a head alone
        p = replace(shared, seqlen_q=rows)
        yield from (Variant(p, c, target) for c in select.candidates(p, target) if c.kernel == "hopper")
    for is_causal, dim in product((False, True), (40, 64, 128)):
        long = replace(_long(dim), is_causal=is_causal)
        few = (_HEADS // 4) * long.stride_k[1], *long.stride_k[1:]
        long = replace(long, heads_kv=_HEADS // 4, stride_k=few, stride_v=few)
        yield from (Variant(long, config, target, negative=True) for config in _specialized(long, target))


def _specialized(problem: Problem, target: Target) -> list[Config]:
    return [c for c in select.candidates(problem, target) if c.schedule == "specialized"]


def _long(dim: int = 128) -> Problem:
    """Of a length at which warpgroups that share K and V compute it, causal not at 64."""
    rows = _HEADS * 2048 * dim, 2048 * dim, dim
    return replace(
        _sized(_plain(), dim), seqlen_q=2048, seqlen_k=2048, stride_q=rows, stride_k=rows, stride_v=rows, stride_o=rows,
        return_lse=False,
    )  # fmt: skip


def _controls(target: Target) -> Iterator[Variant]:
    base = _plain()
    problems = {
        "rescale": base, "mask": replace(base, mask=_MASKS["fp16"]), "length": replace(base, seqused_k=True),
        "pointer": replace(base, seqused_k=True),
        "specialized rescale": replace(_long(), is_causal=True),
    }  # fmt: skip
    for kernel in select.KERNELS:
        for control in CONTROLS[kernel]:
            problem = problems[control]
            found = list(_chosen(problem, kernel, target))
            if found and control == "specialized rescale":
                overlapped = (c for c in _specialized(problem, target) if c.block_m == 128)  # the mutant's
                found = [Variant(problem, c, target) for c in overlapped]
            yield from (replace(v, control=control) for v in found)


def _chosen(problem: Problem, kernel: str, target: Target) -> Iterator[Variant]:
    """The variant that `kernel` would run, if it serves the problem."""
    try:
        yield Variant(problem, select.select(problem, target, backend=kernel), target)
    except UnsupportedError:
        return


def _plain(dim: int = 64) -> Problem:
    rows = _HEADS * _SEQLEN * dim, _SEQLEN * dim, dim
    return Problem(
        torch.float16, _BATCH, _HEADS, _HEADS, _SEQLEN, _SEQLEN, dim, dim, rows, rows, rows, rows, return_lse=True
    )  # fmt: skip


def _sized(problem: Problem, dim: int) -> Problem:
    """`problem` with contiguous rows of `dim` elements."""
    rows = _plain(dim).stride_q if problem.packed is None else (0, dim, _HEADS * dim)
    return replace(
        problem, head_dim=dim, head_dim_v=dim, stride_q=rows, stride_k=rows, stride_v=rows, stride_o=rows
    )  # fmt: skip


def _packed(problem: Problem, *, short: bool = False) -> Problem:
    """`short`: most of the sequences, so that blocks look up whose rows theirs are."""
    total = _SEQLEN if short else problem.batch * _SEQLEN
    return _sized(replace(problem, packed=(total, total)), problem.head_dim)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
