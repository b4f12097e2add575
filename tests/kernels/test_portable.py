"""The portable kernel with every kind of configuration, whatever the choice would be, in Triton's interpreter.

tests/behaviour asks the same questions through attention(), where the choice decides on the tile.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashcore.core.config import Config
from flashcore.testing.gates import check, require
from flashcore.testing.inputs import Guarded

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """The worker process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, config: Config, *, is_causal: bool = False, scale: float | None = None,
        out: Tensor | None = None, fold: bool = False, far: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(out, lse); `out` is filled with NaN first, and comes back with the memory around it."""
        if out is None:
            out = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        assert self._process.stdin and self._process.stdout
        pickle.dump((q, k, v, out, far, config, is_causal, scale, fold), self._process.stdin)
        self._process.stdin.flush()
        written, lse = pickle.load(self._process.stdout)
        out.untyped_storage().copy_(written.untyped_storage())
        return out, lse

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    worker = Kernel()
    yield worker
    worker.close()


def inputs(
    sq: int, sk: int, d: int = 16, dv: int | None = None, *, b: int = 1, hq: int = 1, hkv: int = 1,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv or d))
    q, k, v = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return q, k, v


def config(m: int = 16, n: int = 16, schedule: str = "") -> Config:
    return Config("portable", m, n, 4, 2, schedule)


SCHEDULES = pytest.mark.parametrize("schedule", ["", "split"])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    dims, tiles = st.integers(1, 16).map(lambda n: 8 * n), st.sampled_from([16, 32, 64])
    d, hkv = draw(dims), draw(st.integers(1, 2))
    return {
        "shape": {
            "sq": draw(st.integers(1, 40)), "sk": draw(st.integers(0, 70)), "d": d, "dv": draw(st.just(d) | dims),
            "b": draw(st.integers(1, 2)), "hkv": hkv, "hq": hkv * draw(st.integers(1, 3)),
            "dtype": draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
            "seed": draw(st.integers(0, 2**31)),
        },
        "config": config(draw(tiles), draw(tiles), draw(st.sampled_from(["", "split"]))),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.none() | st.sampled_from([0.0, 0.3, -0.3, 1.0])),
        "fold": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=50)
@given(problems())
def test_any_problem_with_any_tile(kernel: Kernel, problem: dict[str, Any]) -> None:
    q, k, v = inputs(**problem.pop("shape"))
    guarded = Guarded((*q.shape[:3], v.shape[3]), q.dtype)
    out, lse = kernel(q, k, v, out=guarded.out, **problem)
    require(out, q, k, v, lse=lse, is_causal=problem["is_causal"], scale=problem["scale"])
    assert guarded.intact()


@SCHEDULES
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_remainder_of_a_tile(kernel: Kernel, schedule: str, is_causal: bool) -> None:
    for sk in range(33, 50):
        q, k, v = inputs(20, sk, seed=sk)
        out, lse = kernel(q, k, v, config(16, 16, schedule), is_causal=is_causal)
        require(out, q, k, v, lse=lse, is_causal=is_causal)


@pytest.mark.parametrize("d", range(8, 257, 8))
def test_every_head_dimension(kernel: Kernel, d: int) -> None:
    q, k, v = inputs(17, 19, d, 264 - d)
    out, lse = kernel(q, k, v, config(16, 32))
    require(out, q, k, v, lse=lse)


@SCHEDULES
@pytest.mark.parametrize(("sq", "sk"), [(40, 8), (40, 1), (64, 33), (17, 16), (33, 0), (1, 50), (8, 40)])
def test_causal_is_aligned_to_the_bottom_right(kernel: Kernel, schedule: str, sq: int, sk: int) -> None:
    q, k, v = inputs(sq, sk, hq=2)
    out, lse = kernel(q, k, v, config(16, 16, schedule), is_causal=True)
    require(out, q, k, v, lse=lse, is_causal=True)
    blind = max(0, sq - sk)
    assert (out[:, :, :blind] == 0).all() and (lse[:, :, :blind] == -torch.inf).all()
    assert lse[:, :, blind:].isfinite().all()


def test_the_tile_changes_nothing_but_rounding(kernel: Kernel) -> None:
    q, k, v = inputs(40, 70, 40, hq=2)
    results = [kernel(q, k, v, config(m, n))[0].double() for m in (16, 64) for n in (16, 64)]
    for other in results[1:]:
        assert (other - results[0]).abs().max() < 2e-3


def test_a_row_does_not_depend_on_its_neighbours(kernel: Kernel) -> None:
    q, k, v = inputs(20, 30, 24, b=3, hq=2, hkv=2)
    whole = kernel(q, k, v, config(16, 32))
    for b in range(3):
        alone = kernel(q[b : b + 1], k[b : b + 1], v[b : b + 1], config(16, 32))
        assert torch.equal(alone[0], whole[0][b : b + 1]) and torch.equal(alone[1], whole[1][b : b + 1])


def test_folding_the_batch_into_the_grid_changes_nothing(kernel: Kernel) -> None:
    q, k, v = inputs(20, 30, 24, b=3, hq=4, hkv=2)
    for is_causal in (False, True):
        plain, folded = (kernel(q, k, v, config(16, 32), is_causal=is_causal, fold=fold) for fold in (False, True))
        assert torch.equal(plain[0], folded[0]) and torch.equal(plain[1], folded[1])


@pytest.mark.parametrize("unit", [8, 1])
def test_strides(kernel: Kernel, unit: int) -> None:
    """Transposed, broadcast and padded tensors; rows that start at any element as well as at multiples of 16 bytes."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 33, 4, 16 + unit, generator=g).half()[..., :16].transpose(1, 2)
    k = torch.randn(1, 2, 35, 16 + unit, generator=g).half()[..., :16].expand(2, 2, 35, 16)
    v = torch.randn(2, 35, 2, 16 + 3 * unit, generator=g).half()[..., 2 * unit : 16 + 2 * unit].transpose(1, 2)
    guarded = Guarded((2, 4, 33, 16), torch.float16, layout="padded")
    out, lse = kernel(q, k, v, config(16, 16), is_causal=True, out=guarded.out)
    require(out, q, k, v, lse=lse, is_causal=True)
    assert guarded.intact()


def test_a_tile_that_spans_more_than_2_31_elements(kernel: Kernel) -> None:
    q, k, v = inputs(3, 66)
    near = kernel(q, k, v, config(16, 128))
    far = kernel(q, k, v, config(16, 128), far=2**25)
    assert torch.equal(near[0], far[0]) and torch.equal(near[1], far[1])


@SCHEDULES
def test_nan_stays_in_the_rows_that_read_it(kernel: Kernel, schedule: str) -> None:
    q, k, v = inputs(48, 48)
    q[0, 0, 5] = float("nan")
    k[0, 0, 40] = float("nan")
    for is_causal in (False, True):
        out, lse = kernel(q, k, v, config(16, 16, schedule), is_causal=is_causal)
        wrong = set(out[0, 0].isnan().any(1).nonzero().flatten().tolist())
        assert wrong == ({5, *range(40, 48)} if is_causal else set(range(48)))
        assert check(out, q, k, v, lse=lse, is_causal=is_causal).non_finite.passed


@SCHEDULES
def test_what_lies_behind_the_last_key_is_not_read(kernel: Kernel, schedule: str) -> None:
    memory = torch.full((2, 1, 1, 64, 16), float("nan"), dtype=torch.float16)
    memory[..., :37, :] = torch.randn(2, 1, 1, 37, 16)
    q, k, v = inputs(20, 37)[0], memory[0, :, :, :37], memory[1, :, :, :37]
    for is_causal in (False, True):
        out, lse = kernel(q, k, v, config(16, 16, schedule), is_causal=is_causal)
        require(out, q, k, v, lse=lse, is_causal=is_causal)


def test_rows_without_a_key_ignore_nan_in_their_tile(kernel: Kernel) -> None:
    q, k, v = inputs(16, 4)
    v[0, 0, 0] = float("nan")
    out, _ = kernel(q, k, v, config(16, 16), is_causal=True)
    assert (out[0, 0, :12] == 0).all() and out[0, 0, 12:].isnan().all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_of_either_sign(kernel: Kernel, size: float) -> None:
    q, k, v = inputs(33, 70, 32)
    for sign in (1, -1):
        out, lse = kernel(q, k, v, config(16, 16), scale=sign * size)
        require(out, q, k, v, lse=lse, scale=sign * size)
    swapped = kernel(-q, k, v, config(16, 16), scale=-size)[0]
    assert torch.equal(swapped, kernel(q, k, v, config(16, 16), scale=size)[0])
