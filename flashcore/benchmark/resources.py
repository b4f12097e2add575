"""What every shipped kernel costs on GPUs that are not here: compiled without them, and recorded.

    python -m flashcore.benchmark.resources --arch 80 89 --json results/resources-<date>.json

A kernel that compiles and fits is not yet one that was run: the record says nothing of speed or of results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.terminal import Terminal
from flashcore.launch import compile_check
from flashcore.measure import machine

LIMITS = ("registers", "spills", "shared")  # registers and bytes of spills a thread, bytes of shared memory a block


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the summary and write it. Returns 1 when a variant does not compile or does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.resources", description="What the shipped kernels cost, without a GPU."
    )
    known = sorted(compile_check.TARGETS)
    parser.add_argument("--arch", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--jobs", type=int, help="processes; one for each core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    options = parser.parse_args(argv)
    record = measure(options.arch, options.jobs)
    for group in summary(record["cases"]):
        print(
            f"sm_{group['arch']} {group['kernel']:<24} D{group['head_dim']:<4} {group['compiled']} of "
            f"{group['variants']} compile, {group['spilling']} spill; at most {group['registers']} registers, "
            f"{group['shared']} bytes of shared memory"
        )
    if options.json:
        results.write(options.json, record)
        print(f"Written to {options.json}")
    return 0 if all(case["ok"] for case in record["cases"]) else 1


def measure(archs: Sequence[int], jobs: int | None = None) -> dict[str, Any]:
    """Compile what is shipped for these architectures and return the record."""
    cases = []
    with Terminal(sum(1 for _ in _work(archs)), "compiling") as terminal:
        for check in compile_check.compile_shipped(archs, jobs):
            cases.append(check.as_json())
            terminal.advance()
    targets = {
        str(arch): {"gpu": target.name, "shared": target.smem_per_block}
        for arch, target in compile_check.TARGETS.items()
        if arch in archs
    }
    return {"kind": "resources", "environment": machine.environment(), "targets": targets, "cases": cases}


def _work(archs: Sequence[int]) -> Any:
    from flashcore.launch import select

    return (variant for arch in archs for variant in select.shipped(compile_check.TARGETS[arch]))


def summary(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each architecture, kernel with its schedule, and head dimension: how many, and the most of each."""
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for case in cases:
        kernel = " ".join(filter(None, [case["kernel"], case["config"]["schedule"]]))
        groups.setdefault((case["arch"], kernel, case["problem"]["head_dim"]), []).append(case)
    return [
        {
            "arch": arch, "kernel": kernel, "head_dim": head_dim, "variants": len(group),
            "compiled": sum(case["ok"] for case in group), "spilling": sum(case["spills"] > 0 for case in group),
            **{name: max(case[name] for case in group) for name in LIMITS},
        }
        for (arch, kernel, head_dim), group in sorted(groups.items())
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
