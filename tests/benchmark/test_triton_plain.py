"""The plain Triton peer: right in the interpreter, and compiling for an H100 without spills."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flashcore.benchmark.shapes import NINE, Shape

INTERPRETED = """
import torch
from flashcore.benchmark.peers import triton_plain
from flashcore.benchmark.shapes import Shape

for shape in (
    Shape(1, 2, 128, 64),
    Shape(9, 1, 128, 64),
    Shape(1, 2, 100, 48, is_causal=True, heads_kv=1),
    Shape(1, 1, 256, 32, is_causal=True),
):
    q, k, v = shape.inputs("cpu")
    out = torch.full_like(q, float("nan"))
    triton_plain._kernel[triton_plain.grid(shape)](q, k, v, out, **triton_plain.arguments(shape))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=shape.is_causal, enable_gqa=True
    )
    worst = (out.double() - expected).abs().max().item()
    assert worst < 2e-3, (shape, worst)
"""


def test_agrees_with_torch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [NINE[0], NINE[4], NINE[8], Shape(2, 8, 200, 96, is_causal=True)])
def test_compiles_for_hopper(shape: Shape) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flashcore.benchmark.peers import triton_plain

    kernel = triton_plain._kernel
    constants = triton_plain.arguments(shape)
    scale = constants.pop("qk_scale")
    assert isinstance(scale, float)
    pointers = dict.fromkeys(kernel.arg_names[:4], "*fp16")
    source = ASTSource(
        kernel,
        {**pointers, "qk_scale": "fp32", **dict.fromkeys(constants, "constexpr")},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {**triton_plain.OPTIONS, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232_448


def test_tiles_are_the_first_versions() -> None:
    from flashcore.benchmark.peers.triton_plain import tile

    expected = [(64, 32), (64, 128), (64, 128), (64, 64), (64, 64), (64, 64), (64, 128), (64, 64), (64, 64)]
    assert [tile(shape) for shape in NINE] == expected
