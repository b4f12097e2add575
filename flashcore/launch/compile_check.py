"""Compiles every shipped kernel variant ahead of time, without a GPU, and reads what each costs.

    python -m flashcore.launch.compile_check --arch 80 89 90

prints one JSON object a line; the exit status is 1 when a variant does not compile or asks for more shared memory
than the GPU it is chosen for has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import A100, H100, L4, Target

TARGETS: dict[int, Target] = {t.arch: t for t in (A100, L4, H100)}  # the GPU that stands for its architecture


@dataclass(frozen=True, slots=True)
class Check:
    """What one variant costs on one architecture, or why it does not compile."""

    kernel: str
    config: Config
    problem: Problem
    arch: int
    triton: str  # the version that compiled it
    registers: int  # a thread
    spills: int  # bytes of stack a thread; these kernels keep nothing else there
    shared: int  # bytes a block
    error: str  # "" when it compiled and fits

    @property
    def ok(self) -> bool:
        return not self.error

    def as_json(self) -> dict[str, object]:
        """Plain data, `ok` included."""
        fields = asdict(self)
        fields["problem"]["dtype"] = str(self.problem.dtype).removeprefix("torch.")
        return {**fields, "ok": self.ok}


def compile_shipped(
    archs: Sequence[int] = tuple(TARGETS), jobs: int | None = None, *, one_tile: bool = False
) -> Iterator[Check]:
    """Compile what is shipped for each architecture, several at a time, and yield each as it is known.

    Args:
        archs: compute capabilities, of `TARGETS`.
        jobs: processes; None = one for each core. They are started afresh, so that this process' CUDA state is not
            inherited: a script calls this under `if __name__ == "__main__"`.
        one_tile: of each kernel, schedule, dtype, head dimension and option, only the largest tile.

    Raises:
        KeyError: an architecture that `TARGETS` does not have.
    """
    from flashcore.launch import select

    work = [(problem, config, TARGETS[arch]) for arch in archs for problem, config in select.shipped(TARGETS[arch])]
    if one_tile:
        work.sort(key=lambda variant: variant[1].block_m * variant[1].block_n)
        work = list({_without_tile(*variant): variant for variant in work}.values())
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn")) as pool:
        yield from pool.map(check, *zip(*work, strict=True))


def _without_tile(problem: Problem, config: Config, target: Target) -> tuple[object, ...]:
    p = problem
    options = (p.dtype, p.head_dim, p.head_dim_v, p.is_causal, p.return_lse)
    return (target.arch, config.kernel, config.schedule, *options)


def check(problem: Problem, config: Config, target: Target) -> Check:
    """Compile one variant for one GPU. What the compiler raises becomes the `error`."""
    import triton

    registers = spills = shared = 0
    error = ""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where ptxas fails, Triton prints the whole assembly
            from flashcore.launch import compiled, launcher

            binding = launcher.bind(problem, config, problem.head_dim**-0.5, target)
            code = compiled.compile_for(binding, target.arch)
        shared = code.shared
        registers, spills = resources(code.cubin)
        if shared > target.smem_per_block:
            error = f"{shared} bytes of shared memory; {target.name} has {target.smem_per_block} a block"
    except Exception as failure:  # a compiler may raise anything
        fatal = re.search(r"^ptxas.*", str(failure), re.MULTILINE)
        error = f"{type(failure).__name__}: {fatal[0] if fatal else str(failure).strip() or 'no message'}"
    return Check(config.kernel, config, problem, target.arch, triton.__version__, registers, spills, shared, error)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread, as the cuobjdump that Triton ships reads them from machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {usage!r}")
    return int(found[1]), int(found[2])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a variant failed."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.launch.compile_check",
        description="Compile every shipped kernel variant without a GPU; one JSON object a line.",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--jobs", type=int, help="processes; one for each core")
    parser.add_argument("--one-tile", action="store_true", help="only the largest tile of each kernel and option")
    options = parser.parse_args(argv)
    failed = False
    for result in compile_shipped(options.arch, options.jobs, one_tile=options.one_tile):
        print(json.dumps(result.as_json()), flush=True)
        failed |= not result.ok
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
