"""What can be validated without a GPU: the error gates in Triton's interpreter, and the compilation of every kernel.

Both run in processes of their own, because TRITON_INTERPRET decides for a whole process which of the two it can do.
Run as a module, with TRITON_INTERPRET=1, this file is the first of them: it prints one JSON object a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark.shapes import Shape
from flashcore.benchmark.terminal import Terminal
from flashcore.measure import machine

WIDTH = 80
ARCHS = ("80", "89", "90")
# Small, since an interpreted tile takes about 0.1 s: whole tiles, remainders, masks, shared heads, both dtypes.
SHAPES = (
    Shape(1, 2, 128, 64),
    Shape(2, 1, 192, 64),
    Shape(1, 2, 197, 64),
    Shape(1, 1, 200, 64, is_causal=True),
    Shape(1, 4, 64, 64, heads_kv=2),
    Shape(1, 1, 100, 40),
    Shape(1, 1, 96, 128, is_causal=True),
    Shape(1, 2, 128, 64, dtype="bfloat16"),
)


def main() -> int:
    """Print the gates and the compilations. Returns 1 when one of them failed."""
    for text in head(machine.environment()):
        print(text)
    gates = compiled = 0
    failures: list[str] = []
    with Terminal(len(SHAPES) * 2, "gates") as terminal:
        terminal.line("CORRECTNESS (portable kernel, Triton's interpreter):")
        terminal.line("-" * WIDTH)
        terminal.line(f"{'Shape':<28} {'Inputs':<12} {'Correct':>8} {'MaxDiff':>10} {'Frobenius':>10}")
        terminal.line("-" * WIDTH)
        for found in _lines(["-m", "flashcore.benchmark.without_gpu"], interpret=True):
            gates += 1
            terminal.line(gate_row(found))
            terminal.advance()
            if found["reason"]:
                failures.append(f"{found['shape']}, {found['inputs']}: {found['reason']}")
        terminal.line("-" * WIDTH)
        terminal.line()
    print("COMPILED WITHOUT A GPU (every shipped kernel; registers per thread, bytes of spills and shared memory):")
    print("-" * WIDTH)
    print(f"{'GPU':<6} {'Kernel':<16} {'Tile':<26} {'Problem':<21} {'Regs':>5} {'Spill':>6} {'Shared':>7}")
    print("-" * WIDTH)
    spilling = 0
    for found in _lines(["-m", "flashcore.launch.compile_check", "--arch", *ARCHS], interpret=False):
        compiled += 1
        spilling += found.get("spills", 0) > 0
        print(compile_row(found), flush=True)
        if not found["ok"]:
            failures.append(f"sm_{found['arch']} {found['kernel']}: {found['error']}")
    print("-" * WIDTH)
    print()
    if gates != 2 * len(SHAPES):
        failures.append(f"the gates ended early: {gates} of {2 * len(SHAPES)}")
    if not compiled:
        failures.append("nothing was compiled")
    for text in verdict(gates, compiled, spilling, failures):
        print(text)
    return int(bool(failures))


def head(environment: dict[str, Any]) -> Iterator[str]:
    """The title and the environment."""
    yield "=" * WIDTH
    yield "EXPERT VALIDATION: < 5 µs ATTENTION KERNEL"
    yield "=" * WIDTH
    yield ""
    yield "ENVIRONMENT:"
    yield "  GPU: none"
    yield f"  CUDA: {environment['cuda'] or 'none'}"
    yield f"  PyTorch: {environment['torch']}"
    yield f"  Triton: {environment['triton']}"
    yield ""
    yield "There is no CUDA GPU here, so there are no timings. What can be checked without one:"
    yield ""


def gate_row(found: dict[str, Any]) -> str:
    """One shape and kind of inputs."""
    correct = "NO" if found["reason"] else "yes"
    columns = (f"{found[name]:>10.2e}" if name in found else f"{'-':>10}" for name in ("max_diff", "frobenius"))
    return f"{found['shape']:<28} {found['inputs']:<12} {correct:>8} {' '.join(columns)}"


def compile_row(found: dict[str, Any]) -> str:
    """One compiled variant."""
    config, problem = found["config"], found["problem"]
    schedule = f" {config['schedule']}" if config["schedule"] else ""
    words = f"D={problem['head_dim']} {problem['dtype']}" + (" causal" if problem["is_causal"] else "")
    tile = f"{config['block_m']}x{config['block_n']}, {config['num_warps']} warps, {config['num_stages']} stages"
    end = f"  {found['error']}" if found["error"] else ""
    return (
        f"sm_{found['arch']:<3} {found['kernel'] + schedule:<16} {tile:<26} {words:<21} "
        f"{found['registers']:>5} {found['spills']:>6} {found['shared']:>7}{end}"
    )


def verdict(gates: int, compiled: int, spilling: int, failures: Sequence[str]) -> Iterator[str]:
    """What was shown, and what was not."""
    yield "=" * WIDTH
    yield f"VERDICT: {'NOT PASSED' if failures else 'PASSED, as far as it goes without a GPU'}"
    yield f"  - {gates} error gates in the interpreter, {compiled} kernels compiled ({spilling} of them spill)"
    yield from (f"  - {failure}" for failure in failures)
    yield "  - no timings: they need a CUDA GPU"
    yield "=" * WIDTH


def _lines(arguments: Sequence[str], interpret: bool) -> Iterator[dict[str, Any]]:
    """The JSON lines that a Python process prints; what else it says goes to stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    with subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if worker.returncode not in (0, 1):  # 1: some of its lines tell of failures
        raise RuntimeError(f"python {' '.join(arguments)} ended with status {worker.returncode}")


def interpret() -> None:
    """Hold the interpreted portable kernel against the gates; one JSON object a line."""
    for shape in SHAPES:
        q, k, v = shape.inputs("cpu")
        same = q[:, : shape.kv_heads]
        for inputs, (key, value) in {"independent": (k, v), "q = k = v": (same.clone(), same.clone())}.items():
            found: dict[str, Any] = {"shape": shape.label, "inputs": inputs, "reason": ""}
            try:
                found |= _gate(shape, q, key, value)
            except Exception as error:
                found["reason"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), flush=True)


def _gate(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    from flashcore.fast.attention_production import attention
    from flashcore.testing import gates

    out = attention(q, k, v, is_causal=shape.is_causal, backend="portable")
    assert isinstance(out, Tensor)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=shape.is_causal, enable_gqa=shape.kv_heads != shape.heads
    )
    verdict = gates.check(out, q, k, v, is_causal=shape.is_causal)
    return {
        "reason": verdict.failures,
        "max_diff": (out.float() - torchs.float()).abs().max().item(),
        "frobenius": verdict.frobenius.value,
    }


if __name__ == "__main__":
    interpret()
