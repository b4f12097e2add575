"""The kernel that joins partial results, in Triton's interpreter and as machine code for each architecture."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flashcore.core.target import A100, H100, L4, Target
from flashcore.integrations.distributed import partial
from flashcore.launch import compiled, merge
from flashcore.launch.compile_check import resources
from flashcore.security import provenance, sass, taint

ROOT = Path(__file__).resolve().parents[2]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# of what was joined so far, of the part, and of the result, which is in place where all three are one
DTYPES = [
    (HALF, HALF, HALF), (BRAIN, BRAIN, BRAIN), (SINGLE, SINGLE, SINGLE),  # two ranks
    (HALF, HALF, SINGLE), (SINGLE, HALF, SINGLE), (SINGLE, HALF, HALF),  # the first, further and last of more
    (BRAIN, BRAIN, SINGLE), (SINGLE, BRAIN, BRAIN),
]  # fmt: skip


class Case(NamedTuple):
    out: Tensor
    lse: Tensor
    part: Tensor
    part_lse: Tensor
    into: Tensor | None  # None: in place


def case(dtypes: tuple[torch.dtype, ...], batch: int, heads: int, rows: int, dim: int, pad: int = 0) -> Case:
    """Numbers of every magnitude that lse has; `pad` rows of NaN around what is to be joined."""
    g = torch.Generator().manual_seed(rows * dim + pad)

    def padded(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        shape[2] += 2 * pad
        return tensor.new_full(shape, torch.nan).narrow(2, pad, rows).copy_(tensor)

    shape = (batch, heads, rows, dim)
    out, part = (torch.randn(shape, generator=g).to(dtype) for dtype in dtypes[:2])
    lse, part_lse = (10 * torch.randn(shape[:3], generator=g) for _ in range(2))
    in_place = dtypes[0] == dtypes[2]
    into = None if in_place else padded(torch.full(shape, torch.nan, dtype=dtypes[2]))
    return Case(padded(out), padded(lse), part, part_lse, into)


def special() -> Case:
    """Rows that saw nothing so far, in the part, or in either; NaN in either lse, and in either output."""
    inf, nan = torch.inf, torch.nan
    lse = torch.tensor([-inf, -inf, 1.0, 1.0, 1e4, -1e4, nan, 0.0, nan, 0.0, 0.0])
    part_lse = torch.tensor([-inf, 2.0, -inf, 1.0, -1e4, 1e4, 0.0, nan, -inf, 0.0, 0.0])
    out, part = torch.full((1, 1, 11, 8), 3.0), torch.full((1, 1, 11, 8), 5.0)
    out[0, 0, lse == -inf] = part[0, 0, part_lse == -inf] = 0.0
    out[0, 0, 8] = out[0, 0, 9, 2] = part[0, 0, 10, 3] = nan
    return Case(out.half(), lse.view(1, 1, -1), part.half(), part_lse.view(1, 1, -1), None)


CASES = {f"{a} {b} {c}".replace("torch.", ""): case((a, b, c), 2, 3, 37, 64) for a, b, c in DTYPES}
CASES |= {f"D={dim} S={rows}": case(DTYPES[0], 1, 2, rows, dim, pad=3)
          for dim, rows in ((8, 1), (12, 5), (40, 129), (72, 33), (96, 64), (128, 65), (256, 17))}  # fmt: skip
CASES |= {"sums among others": case((SINGLE, HALF, HALF), 2, 2, 131, 16, pad=5), "special": special()}


@pytest.fixture(scope="module")
def results() -> dict[str, Case]:
    worker = Path(__file__).with_name("merge_worker.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, worker], input=pickle.dumps(CASES), env=environment, cwd=ROOT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Case] = pickle.loads(done.stdout)
    return found


def exact(case: Case) -> tuple[Tensor, Tensor]:
    out, lse, part, part_lse = (t.double().clone() for t in case[:4])
    partial.merge_(out, lse, part, part_lse)
    return out, lse


@pytest.mark.parametrize("name", CASES)
def test_as_in_fp64(name: str, results: dict[str, Case]) -> None:
    given, found = CASES[name], results[name]
    want, want_lse = exact(given)
    got = found.out if found.into is None else found.into
    rounded = torch.finfo(got.dtype).eps / 2 * want.abs() + 2**-24  # half a unit in the last place; subnormal ones
    limit = rounded + 1e-6 * (given.out.double().abs() + given.part.double().abs())
    assert torch.equal(got.isnan(), want.isnan())
    assert ((got.double() - want).abs() <= limit)[~want.isnan()].all()
    torch.testing.assert_close(found.lse.double(), want_lse, rtol=2e-7, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_written(name: str, results: dict[str, Case]) -> None:
    def around(tensor: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).clone()
        whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
        return whole

    given, found = CASES[name], results[name]
    read = ("part", "part_lse") if given.into is None else ("out", "part", "part_lse")
    for field in read:
        torch.testing.assert_close(getattr(found, field), getattr(given, field), rtol=0, atol=0, equal_nan=True)
    for before, after in zip(given, found, strict=True):
        if before is not None:
            torch.testing.assert_close(around(after), around(before), rtol=0, atol=0, equal_nan=True)


def test_special_rows(results: dict[str, Case]) -> None:
    out, lse = results["special"].out[0, 0], results["special"].lse[0, 0]
    assert out[:6, 0].tolist() == [0.0, 5.0, 3.0, 4.0, 3.0, 5.0]
    assert lse[:3].tolist() == [-torch.inf, 2.0, 1.0] and lse[4:6].tolist() == [1e4, 1e4]
    assert out[6:9].isnan().all() and lse[6:9].isnan().all()
    assert out[9:].isnan().nonzero().tolist() == [[0, 2], [1, 3]]


# -- machine code and launches ------------------------------------------------------------------------------------


def layouts(dtypes: tuple[torch.dtype, ...], dim: int, rows: int = 1000) -> dict[str, merge.Layout]:
    wide, narrow = (8 * rows * dim, rows * dim, dim, 1), (8 * rows, rows, 1)
    kinds = {"out": dtypes[0], "lse": SINGLE, "part": dtypes[1], "part_lse": SINGLE, "into": dtypes[2]}
    return {n: merge.Layout(kind, narrow if "lse" in n else wide, True) for n, kind in kinds.items()}


@pytest.mark.parametrize("target", [H100, A100, L4], ids=lambda t: f"sm_{t.arch}")
@pytest.mark.parametrize("dim", [64, 72, 256])
def test_machine_code(target: Target, dim: int) -> None:
    """Nothing spilled, 16 bytes an access, and neither branches nor addresses that follow from what is read."""
    for dtypes in DTYPES:
        binding = merge.bind((2, 8, 1000, dim), layouts(dtypes, dim))
        made = compiled.compile_for(binding, target.arch)
        assert provenance.parameters(binding, made), "a launch passes what the kernel reads, byte by byte"
        registers, spills = resources(made.cubin)
        assert registers <= 80 and spills == 0, "three blocks of 128 threads and more for every 32 K registers"
        text = sass.disassemble(made.cubin)
        for access in ("LDG", "STG"):
            widths = set(re.findall(rf"\b{access}\.E(\S*)", text))
            assert widths == {"", ".128"}, (access, widths)  # lse beside the rows
        found = taint.analyse(sass.parse(text))
        assert found.memory and found.branches and not found.findings, found.findings


def test_one_compilation_for_all_lengths_and_strides() -> None:
    def identity(shape: tuple[int, ...], **changes: merge.Layout) -> object:
        return compiled.identity(merge.bind(shape, layouts(DTYPES[0], shape[3], shape[2]) | changes))

    base = identity((2, 8, 1000, 64))
    assert base == identity((1, 8, 77, 64)) == identity((2, 8, 1000, 64), out=merge.Layout(HALF, (0, 8, 640, 1), True))
    assert base != identity((2, 8, 1000, 128))
    assert base != identity((2, 8, 1000, 64), out=merge.Layout(SINGLE, (0, 8, 640, 1), True))
    assert base != identity((2, 8, 1000, 64), out=merge.Layout(HALF, (0, 8, 644, 1), True))
    assert base != identity((2, 8, 1000, 64), out=merge.Layout(HALF, (0, 8, 640, 1), False))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of this call, the current stream, one kernel loaded for each metadata; nothing where nothing is."""
    loads, launches = [], []

    def load(binding: object, device: int, arch: int) -> SimpleNamespace:
        loads.append((binding, device, arch))
        return SimpleNamespace(fill=lambda *a: a, launch=launches.append)

    monkeypatch.setattr(merge.packet, "load", load)
    monkeypatch.setattr(merge.targets, "current", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    merge._launch.cache_clear()
    given = [case(DTYPES[0], 1, 2, 40, 16, pad=n) for n in (0, 0, 1)]
    for out, lse, part, part_lse, _ in given:
        merge.merge_(out, lse, part, part_lse, out)
        merge.merge_(out[:, :0], lse[:, :0], part[:, :0], part_lse[:, :0], out[:, :0])
    merge._launch.cache_clear()
    assert launches == [(7, *(t.data_ptr() for t in (*c[:4], c.out))) for c in given]
    assert len(loads) == 2 and loads[0][0].grid == (2, 1, 1)


def test_what_the_kernel_serves() -> None:
    out, lse, part, part_lse, _ = case(DTYPES[0], 1, 2, 40, 16)
    assert not merge.serves(out, lse, part, part_lse, out), "tensors of a CPU"
