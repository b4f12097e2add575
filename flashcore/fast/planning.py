"""What a call of `attention` is going to do, asked and arranged before it does: `explain` and `warmup`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Problem
from flashcore.core.target import Target
from flashcore.fast.attention_production import attention
from flashcore.launch import launcher, node, packet, shim
from flashcore.launch.arguments import Options, check, check_packed, packed_problem_of, problem_of
from flashcore.launch.capability import reasons
from flashcore.launch.compiled import compile_for
from flashcore.launch.select import KERNELS

Shape = Sequence[Any]  # (B, H, S, D), or (q's shape, k's and v's shape)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which kernel and tile serve a call, and why no other does. `str()` of it is for people."""

    problem: Problem
    target: Target | None  #: None for CPU tensors
    config: Config | None  #: None where no kernel serves the call
    refused: dict[str, tuple[str, ...]]  #: the other kernels -> their reasons
    launch: str  #: how the host launches it

    def __str__(self) -> str:
        p, c = self.problem, self.config
        kind = str(p.dtype).removeprefix("torch.")
        heads = f"{p.heads_q}" if p.group == 1 else f"{p.heads_q} over {p.heads_kv}"
        lengths = f"{p.seqlen_q}" if p.seqlen_q == p.seqlen_k else f"{p.seqlen_q} x {p.seqlen_k}"
        used = ("causal",) * p.is_causal + p.options
        what = " ".join((f"B={p.batch} H={heads} S={lengths} D={p.head_dim} {kind}", *used))
        lines = [f"{what} on {self.target.name if self.target else 'the CPU'}"]
        if c is None:
            lines.append("  no kernel serves it")
        elif c.block_m == 0:
            lines.append(f"  {c.kernel}")
        else:
            schedule = f", schedule {c.schedule}" if c.schedule else ""
            tile = f"tile {c.block_m} x {c.block_n}, {c.num_warps} warps, {c.num_stages} stages"
            lines.append(f"  {c.kernel}: {tile}{schedule}; launched by {self.launch}")
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.refused.items()]
        return "\n".join(lines)


def explain(
    q: Tensor, k: Tensor, v: Tensor, block_m: int | None = None, block_n: int | None = None, *,
    is_causal: bool = False, scale: float | None = None, window: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    attn_mask: Tensor | None = None, seqused_k: Tensor | None = None, return_lse: bool = False,
    layout: str = "bhsd", out: Tensor | None = None, backend: str | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0, target: Target | None = None,
) -> Explanation:
    """Say which kernel and tile `attention` would use for these arguments, without running anything.

    Args:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: ask about `attention_varlen`, whose q, k and v are
            [total, H, D]. attn_mask, seqused_k and layout are not among its arguments.
        target: answer for this GPU instead of the tensors' own device, as flashcore.core.target.H100; the tensors
            may then be anywhere, the meta device included.

    Raises:
        TypeError, ValueError: as `attention`; a problem that no kernel serves is an answer, not an error.
    """  # fmt: skip
    options = Options(
        block_m, block_n, is_causal, scale, return_lse, layout, backend, window, softcap
    )
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise TypeError("cu_seqlens_q, cu_seqlens_k: expected both, got one of them")
        for name, extra in (("attn_mask", attn_mask), ("seqused_k", seqused_k)):
            if extra is not None:
                raise ValueError(f"{name}: expected None beside cu_seqlens_q, got a tensor")
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, out)
        sequences = cu_seqlens_q.shape[0] - 1
        problem = packed_problem_of(q, k, v, out, sequences, max_seqlen_q, max_seqlen_k, options)
    else:
        check(q, k, v, options, out, attn_mask, seqused_k)
        problem = problem_of(q, k, v, out, options, attn_mask, seqused_k)
    if target is None and q.device.type == "cuda":
        target = targets.current(q.device.index)
    if target is None or backend == "reference":
        why = ("chosen by hand",) if backend == "reference" else ("it runs on NVIDIA GPUs, these are CPU tensors",)
        return Explanation(problem, target, Config("reference", 0, 0, 0, 0), {name: why for name in KERNELS}, "torch")
    refused = {name: reasons(name, problem, target) for name in KERNELS}
    try:
        config = launcher.choose(problem, target, options)
    except UnsupportedError as error:
        return Explanation(problem, target, None, error.reasons, "")
    won = (f"{config.kernel} is " + ("chosen by hand" if backend else "preferred here"),)
    others = {name: why or won for name, why in refused.items() if name != config.kernel}
    how = "the compiled shim" if shim.attend is not None else f"Python (shim {shim.status()})"
    return Explanation(problem, target, config, others, how)


@dataclass(frozen=True, slots=True)
class Warmed:
    """One shape that is ready now."""

    shape: Shape
    config: Config
    kernels: int  #: how many had to be compiled for it, or fetched from Triton's cache
    seconds: float


def warmup(
    shapes: Iterable[Shape], *, dtype: torch.dtype = torch.float16, device: torch.device | str | int | None = None,
    attn_mask: Tensor | None = None, seqused_k: bool = False, gradients: bool = False, target: Target | None = None,
    progress: bool = True, **options: Any,
) -> list[Warmed]:
    """Compile and load what `attention` needs for contiguous tensors of these shapes, so that no call waits for it.

    Args:
        shapes: each (B, H, S, D), or ((B, Hq, Sq, D), (B, Hkv, Sk, D)) where k and v differ from q; with
            layout="bshd" in that order.
        dtype: of q, k and v.
        device: the GPU, the current one when None.
        attn_mask: a tensor that looks like the masks to come; what it holds does not matter.
        seqused_k: whether the calls to come pass one.
        gradients: whether the calls to come pass inputs that require grad. Theirs may be another kernel, one that also
            writes the log-sum-exp; and their graph node in C++, which is otherwise built in the background of the first
            of them, is waited for: some ten seconds, unless it is in Triton's cache.
        target: compile for this GPU into Triton's cache and load nothing: needs no GPU, as in a container's build.
        progress: draw a progress bar on stderr, where it is a terminal.
        options: block_m, block_n, is_causal, scale, return_lse, layout, backend, window, softcap, as `attention`
            takes them.

    Returns:
        What was made ready, in order.

    Raises:
        TypeError, ValueError, UnsupportedError: as `attention` does, before anything after the offending shape.
        RuntimeError: `gradients`, and the node can't be built; `flashcore info` says what is missing.
    """  # fmt: skip
    wanted = Options(**options)
    if gradients:
        node.build()
    done = []
    for shape in _with_bar(list(shapes), progress):
        q_shape, k_shape = shape if isinstance(shape[0], Sequence) else (shape, shape)
        started, kernels = time.perf_counter(), packet.loaded_kernels()
        if target is not None:
            q, k, v = (torch.empty(tuple(s), dtype=dtype, device="meta") for s in (q_shape, k_shape, k_shape))
            extra = _extra(q, attn_mask, seqused_k)
            check(q, k, v, wanted, None, **extra)
            problem = problem_of(q, k, v, None, wanted, **extra)
            config = launcher.choose(problem, target, wanted)
            variants = [problem]
            if gradients and not problem.return_lse:
                variants.append(replace(problem, return_lse=True))
            for each in variants:
                chosen = launcher.choose(each, target, wanted)
                compile_for(launcher.bind(each, chosen, wanted.scale_for(each.head_dim), target), target.arch)
            count = len(variants)
        else:
            where = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
            q, k, v = (torch.zeros(tuple(s), dtype=dtype, device=where) for s in (q_shape, k_shape, k_shape))
            extra = _extra(q, attn_mask, seqused_k)
            with torch.set_grad_enabled(gradients):
                q, k, v = (t.requires_grad_(gradients) for t in (q, k, v))
                attention(q, k, v, **wanted._asdict(), **extra)
            found = explain(q, k, v, **wanted._asdict(), **extra).config
            assert found is not None  # attention served it
            config, count = found, packet.loaded_kernels() - kernels
        done.append(Warmed(shape, config, count, time.perf_counter() - started))
    return done


def _extra(q: Tensor, mask: Tensor | None, seqused_k: bool) -> dict[str, Any]:
    """A mask and lengths for q, of zeros."""
    if mask is not None:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
        memory = torch.zeros(reach, dtype=mask.dtype, device=q.device)
        mask = memory.as_strided(mask.shape, mask.stride())
    used = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device) if seqused_k else None
    return {"attn_mask": mask, "seqused_k": used}


def _with_bar(items: list[Shape], wanted: bool) -> Iterator[Shape]:
    """The items, with a progress bar on stderr while they are worked on."""
    drawn = wanted and sys.stderr.isatty()
    for i in range(len(items) + 1):
        if drawn:
            bar = "#" * (30 * i // max(len(items), 1))
            print(f"\rwarm-up [{bar:<30}] {i}/{len(items)}", end="", file=sys.stderr, flush=True)
        if i < len(items):
            yield items[i]
    if drawn:
        print(file=sys.stderr)
