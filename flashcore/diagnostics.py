"""What a bug report needs, as `flashcore info` and `python -m flashcore` print it.

Nothing here needs the `bench` extra, a GPU or a working compiler: the report matters most where they are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcore import __version__
from flashcore.measure import machine

# The problem that says whether a kernel runs here at all: fp16, the validation's smallest.
_HEADS, _SEQLEN, _HEAD_DIM = 8, 128, 64


def collect() -> dict[str, Any]:
    """The report as plain data.

    Keys: flashcore (its version), those of `flashcore.measure.machine.environment`, and gpus (one dict each, in CUDA's
    order), compiler (the C compiler that Triton will use, None = not found), shim (whether the compiled launch path is
    on, or why not), node (the same of the graph node in C++), cache (Triton's folder of compiled kernels), kernels
    (name -> the reasons why it cannot run on the first GPU, none = it can).
    """
    import torch

    gpus = [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    environment = machine.environment()
    return {
        "flashcore": __version__,
        **environment,
        "driver": environment["driver"] or _driver(),
        "gpus": gpus,
        "compiler": _compiler(),
        **(_paths() if environment["triton"] else dict.fromkeys(("shim", "node"), "off: triton is not installed")),
        "cache": _cache(),
        "kernels": _kernels(bool(gpus)),
    }


def text(report: dict[str, Any]) -> str:
    """The report for people, one fact a line."""
    plain = ("flashcore", "commit", "python", "system", "cpu", "torch", "triton", "cuda", "cudnn", "driver")
    lines = [f"{key:<10} {report[key] or 'none'}" for key in plain]
    for i, gpu in enumerate(report["gpus"]):
        lines.append(
            f"gpu {i:<6} {gpu['name']}, sm_{gpu['arch']}, {gpu['sms']} SMs, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        )
    if not report["gpus"]:
        lines.append(f"{'gpu':<10} none")
    no_compiler = "none: Triton needs a C compiler before its first launch (install gcc or clang, or set CC)"
    lines.append(f"{'compiler':<10} {report['compiler'] or no_compiler}")
    lines += [f"{key:<10} {report[key]}" for key in ("shim", "node", "cache")]
    lines.append("kernels")
    for name, reasons in report["kernels"].items():
        lines.append(f"  {name:<10} {'no: ' + '; '.join(reasons) if reasons else 'runs'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, as text or with --json as JSON."""
    parser = argparse.ArgumentParser(prog="flashcore info", description="What a bug report needs.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else text(report))
    return 0


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from flashcore.core import target

    gpu = target.current(index)
    return {
        "name": gpu.name,
        "arch": gpu.arch,
        "sms": gpu.sms,
        "smem_per_block_bytes": gpu.smem_per_block,
        "l2_bytes": gpu.l2_bytes,
        "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
    }


def _driver() -> str | None:
    """The driver's release, such as 580.95.05, where nvidia-ml-py or CUDA could not be asked: Linux states it too."""
    module = Path("/sys/module/nvidia/version")
    return module.read_text().strip() if module.exists() else None


def _compiler() -> str | None:
    """The C compiler that Triton builds its launcher with: $CC, else gcc, else clang."""
    return shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang")


def _paths() -> dict[str, str]:
    from flashcore.launch import node, shim

    return {"shim": shim.status(), "node": node.status()}


def _cache() -> str:
    home = os.environ.get("TRITON_HOME") or str(Path.home())
    return os.environ.get("TRITON_CACHE_DIR") or str(Path(home) / ".triton" / "cache")


def _kernels(has_gpu: bool) -> dict[str, list[str]]:
    import torch

    from flashcore.core import target
    from flashcore.core.errors import UnsupportedError
    from flashcore.core.problem import Problem
    from flashcore.launch import select

    sizes = (8, _HEADS, _HEADS, _SEQLEN, _SEQLEN, _HEAD_DIM, _HEAD_DIM)
    strides = (_HEADS * _SEQLEN * _HEAD_DIM, _SEQLEN * _HEAD_DIM, _HEAD_DIM)
    problem = Problem(torch.float16, *sizes, strides, strides, strides, strides)
    reasons: dict[str, list[str]] = {"reference": []}
    for name in select.KERNELS:
        if not has_gpu:
            reasons[name] = ["no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"]
            continue
        try:
            select.select(problem, target.current(0), backend=name)
            reasons[name] = []
        except UnsupportedError as refusal:
            reasons[name] = list(refusal.reasons.get(name, ())) or [str(refusal)]
    return reasons
