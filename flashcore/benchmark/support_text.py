"""docs/support-matrix.md: what each kernel serves, asked of launch/capability.py case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import torch

from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Mask, Problem
from flashcore.core.target import A100, H100, L4, Target
from flashcore.launch.capability import reasons
from flashcore.launch.select import select

COLUMNS: tuple[tuple[str, Target], ...] = (
    ("portable", A100), ("portable", L4), ("portable", H100), ("hopper", H100)
)  # fmt: skip
Change = Callable[[Problem], Problem]


def plain() -> Problem:
    """What every case starts from: fp16, [2, 8, 128, 64], contiguous."""
    strides = 8 * 128 * 64, 128 * 64, 64
    return Problem(torch.float16, 2, 8, 8, 128, 128, 64, 64, strides, strides, strides, strides)


def _with(**changes: object) -> Change:
    return lambda p: replace(p, **changes)  # type: ignore[arg-type]


def _dtype(dtype: torch.dtype) -> Change:
    return _with(dtype=dtype)


def _dim(dim: int, dim_v: int | None = None) -> Change:
    dim_v = dim_v or dim

    def change(p: Problem) -> Problem:
        def rows(width: int) -> tuple[int, int, int]:
            return 8 * 128 * width, 128 * width, width

        return replace(
            p, head_dim=dim, head_dim_v=dim_v, stride_q=rows(dim), stride_k=rows(dim), stride_v=rows(dim_v),
            stride_o=rows(dim_v),
        )  # fmt: skip

    return change


def _mask(dtype: torch.dtype, strides: tuple[int, int, int, int] = (8 * 128 * 128, 128 * 128, 128, 1)) -> Change:
    return _with(mask=Mask(dtype, strides))


# Title -> what the cases are called -> how each differs from `plain`.
CASES: dict[str, dict[str, Change]] = {
    "Dtype of q, k and v": {
        "float16": _dtype(torch.float16), "bfloat16": _dtype(torch.bfloat16), "float32": _dtype(torch.float32),
        "float64": _dtype(torch.float64),
    },
    "Head dimension": {
        "8": _dim(8), "72": _dim(72), "128": _dim(128), "136": _dim(136), "256": _dim(256), "264": _dim(264),
        "20": _dim(20), "v of 32, q and k of 64": _dim(64, 32),
    },
    "Heads and lengths": {
        "GQA": _with(heads_kv=2), "MQA": _with(heads_kv=1), "Sq below Sk": _with(seqlen_q=20),
        "Sq above Sk": _with(seqlen_k=20), "one query row": _with(seqlen_q=1), "no keys": _with(seqlen_k=0),
    },
    "Options": {
        "is_causal": _with(is_causal=True), "window": _with(window=(20, 10)), "softcap": _with(softcap=30.0),
        "attn_mask": _mask(torch.bool), "seqused_k": _with(seqused_k=True),
        "attention_varlen": lambda p: replace(
            p, packed=(200, 200), stride_q=(0, 64, 512), stride_k=(0, 64, 512), stride_v=(0, 64, 512),
            stride_o=(0, 64, 512),
        ),
        "return_lse": _with(return_lse=True),
    },
    "attn_mask": {
        "bool": _mask(torch.bool), "float16": _mask(torch.float16), "bfloat16": _mask(torch.bfloat16),
        "float32": _mask(torch.float32), "float64": _mask(torch.float64),
        "of every batch entry alike": _mask(torch.float16, (0, 128 * 128, 128, 1)),
        "of every head alike": _mask(torch.float16, (8 * 128 * 128, 0, 128, 1)),
        "of every row alike": _mask(torch.float16, (128, 0, 0, 1)),
        "of every key alike": _mask(torch.float16, (128, 0, 1, 0)),
        "transposed": _mask(torch.float16, (8 * 128 * 128, 128 * 128, 1, 128)),
        "rows that are no multiple of 16 bytes apart": _mask(torch.float16, (8 * 128 * 129, 128 * 129, 129, 1)),
        "start at any address": _with(mask=Mask(torch.float16, (128, 0, 0, 1), aligned=False)),
    },
    "Memory of q, k, v and out": {
        "[B, S, H, D]": _with(stride_q=(128 * 512, 64, 512), stride_o=(128 * 512, 64, 512)),
        "heads expanded (stride 0)": _with(stride_k=(128 * 64, 0, 64)),
        "rows that are no multiple of 16 bytes apart": _with(stride_k=(8 * 128 * 65, 128 * 65, 65)),
        "start at any address": _with(aligned=False),
    },
}  # fmt: skip
_TOGETHER = ("is_causal", "window", "softcap", "attn_mask", "seqused_k", "attention_varlen", "return_lse")
# What attention_varlen does not take is no combination to ask for.
_APART = {"attention_varlen": ("attn_mask", "seqused_k")}


def matrix() -> Iterator[str]:
    """The document, line by line."""
    yield "<!-- Generated from launch/capability.py by `python -m flashcore.benchmark.report`; not to be edited. -->"
    yield ""
    yield "# What is served"
    yield ""
    yield (
        "Each cell is the answer of the kernel's own check, `flashcore.launch.capability.reasons`, which every call "
        "asks before anything is launched. The numbers lead to the reasons below. A call that no kernel serves raises "
        "`UnsupportedError` with all of them; `backend=` by name raises rather than falls back; `flashcore.explain` "
        "says the same without running. CPU tensors, and `backend=\"reference\"`, are computed by torch and serve "
        "everything here."
    )
    yield ""
    notes: dict[str, int] = {}
    for title, cases in CASES.items():
        yield f"## {title}"
        yield ""
        yield "| | " + " | ".join(f"{kernel}, sm_{target.arch}" for kernel, target in COLUMNS) + " |"
        yield "| --- |" + " :---: |" * len(COLUMNS)
        for name, change in cases.items():
            cells = [_cell(kernel, change(plain()), target, notes) for kernel, target in COLUMNS]
            yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""
    yield "## Options together"
    yield ""
    yield from _together(notes)
    yield ""
    yield "## Reasons"
    yield ""
    for reason, number in notes.items():
        yield f"{number}. {reason}"


def _why(kernel: str, problem: Problem, target: Target) -> tuple[str, ...]:
    found = reasons(kernel, problem, target)
    if not found:
        try:
            select(problem, target, backend=kernel)
        except UnsupportedError as error:
            return error.reasons[kernel]
    return found


def _cell(kernel: str, problem: Problem, target: Target, notes: dict[str, int]) -> str:
    why = _why(kernel, problem, target)
    return "no " + ", ".join(f"[{notes.setdefault(reason, len(notes) + 1)}]" for reason in why) if why else "yes"


def _together(notes: dict[str, int]) -> Iterator[str]:
    """Every set of options: those that a kernel refuses although it serves each alone."""
    options = CASES["Options"]
    refused = []
    count = 0
    for size in range(2, len(_TOGETHER) + 1):
        for names in combinations(_TOGETHER, size):
            if any(name in names and set(others) & {*names} for name, others in _APART.items()):
                continue
            count += 1
            problem = plain()
            for name in names:
                problem = options[name](problem)
            for kernel, target in COLUMNS:
                cell = _cell(kernel, problem, target, notes)
                if cell != "yes":
                    refused.append(f"| {', '.join(names)} | {kernel}, sm_{target.arch} | {cell} |")
    yield (
        f"{count} sets of two and more of {', '.join(_TOGETHER)}; attention_varlen takes no attn_mask and no seqused_k."
    )
    yield ""
    if not refused:
        yield "Each kernel serves every one of them."
        return
    yield "| together | kernel | |"
    yield "| --- | --- | --- |"
    yield from refused
