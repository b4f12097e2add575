"""A drawn problem is judged as the gates say, each backend by what it wrote itself; faults are planted behind the call.

The space of problems, and the kernels in it, are tests/behaviour/test_problems.py's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.fast import attention_production, varlen
from flashcore.testing import check, problems
from flashcore.testing.problems import JUDGED, KIN, Call, Trial, random_problem

LONGEST = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = {"cpu": ("reference", None), "cuda": ("portable", None)}

Fault = Callable[[Tensor, Tensor | None], Any]  # (out, lse) of a right call -> what is returned in their place


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, Fault], None]:
    """plant(backend, fault): let a backend's calls have a fault from now on, and no other's."""
    right: dict[str, Any] = {"attention": attention_production.attention, "attention_varlen": varlen.attention_varlen}

    def plant(backend: str | None, fault: Fault) -> None:
        def wrong(name: str) -> Callable[..., Any]:
            def call(**arguments: Any) -> Any:
                result = right[name](**arguments)
                if arguments["backend"] != backend:
                    return result
                return fault(*result) if arguments["return_lse"] else fault(result, None)

            return call

        monkeypatch.setattr(attention_production, "attention", wrong("attention"))
        monkeypatch.setattr(varlen, "attention_varlen", wrong("attention_varlen"))

    return plant


def returned(out: Tensor, lse: Tensor | None) -> Any:
    return out if lse is None else (out, lse)


def scaled(out: Tensor, lse: Tensor | None) -> Any:
    return returned(out.mul_(1.05), lse)


def calls(**wanted: Any) -> Iterator[Call]:
    """Problems with these options, packed or not, no size of which is 0 or 1."""
    for seed in range(0, 10**6, KIN + 1):
        call = random_problem(seed, LONGEST)
        has = {"packed": call.packed, **call.options}
        sizes = [size for t in call.tensors.values() for size in t.shape]
        if all(has[name] == value for name, value in wanted.items()) and min(sizes) > 1:
            yield call


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("faulty", [0, 1])
def test_each_backend_is_judged_by_what_it_wrote(
    plant: Callable[..., None], device: str, packed: bool, faulty: int
) -> None:
    trial = Trial(next(calls(packed=packed)), device)
    backends = BACKENDS[device]
    plant(backends[faulty], scaled)
    for order in (backends, backends[::-1], backends):
        wrong = {backend: trial.run(backend) for backend in order}
        assert "exceeds" in wrong[backends[faulty]] and wrong[backends[1 - faulty]] == ""


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_backend_leaves_unwritten_holds_no_other_s_result(plant: Callable[..., None], device: str) -> None:
    """Memory comes back from the allocator as it was left."""
    first, second = BACKENDS[device]
    for packed in (False, True):
        call = next(calls(packed=packed, out="", return_lse=True))
        for unwritten in ("out", "lse"):
            trial = Trial(call, device)
            kept: dict[str, Tensor] = {}
            plant(first, lambda out, lse, kept=kept: kept.update(out=out, lse=lse) or (out, lse))
            assert trial.run(first) == ""
            reused = {unwritten: kept[unwritten]}
            plant(second, lambda out, lse, reused=reused: tuple(({"out": out, "lse": lse} | reused).values()))
            assert "non_finite" in trial.run(second)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "bshd", "padded"])
def test_guard_bands(plant: Callable[..., None], device: str, layout: str) -> None:
    backend = BACKENDS[device][1]
    for packed in (False, True):
        trial = Trial(next(calls(packed=packed, out=layout)), device)

        def beside(at: int) -> Fault:
            def fault(out: Tensor, lse: Tensor | None) -> Any:
                memory = torch.as_strided(out, (out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
                first = out.storage_offset()
                end = first + 1 + sum((size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True))
                places = [0, first - 1, end, len(memory) - 1]
                memory[places[at]] = 0.0
                return returned(out, lse)

            return fault

        for at in range(4):
            plant(backend, beside(at))
            assert trial.run(backend) == "written beside the output, or not into it"
        plant(backend, lambda out, lse: returned(out.clone(), lse))
        assert trial.run(backend) == "written beside the output, or not into it"
        plant(backend, returned)
        assert trial.run(backend) == ""


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_no_sequence_and_other_dtypes(plant: Callable[..., None], device: str) -> None:
    backend = BACKENDS[device][1]
    loose = (call for call in calls(packed=True, out="contiguous") if call.tensors["cu_seqlens_q"][0] == 3)
    trial = Trial(next(loose), device)
    plant(backend, lambda out, lse: returned(out.index_fill_(0, torch.tensor([2], device=out.device), 0.0), lse))
    assert trial.run(backend) == "written to rows of no sequence"
    trial = Trial(next(calls(packed=False, out="", return_lse=True)), device)
    plant(backend, lambda out, lse: (out, lse.double()) if lse is not None else out)
    assert "torch.float64" in trial.run(backend)


def test_inputs_are_sent_once_and_the_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(problems, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return function(*args, **kwargs)

        return call

    call = next(calls(packed=False))
    for name in ("place", "expect"):
        monkeypatch.setattr(problems, name, counted(name))
    trial = Trial(call)
    assert [trial.run(backend) for backend in ("reference", None, "reference")] == ["", "", ""]
    assert done == {"place": len(call.tensors), "expect": 1}


def by_check(call: Call, out: Tensor, lse: Tensor | None) -> str:
    """What `check` says of a result, sequence by sequence where they are packed."""
    given = {**call.options, **call.tensors}
    options = {name: given[name] for name in JUDGED if name in given}
    q, k, v = (call.tensors[name] for name in "qkv")
    if not call.packed:
        if call.options["layout"] == "bshd":
            q, k, v, out = (t.transpose(1, 2) for t in (q, k, v, out))
        return check(out, q, k, v, lse=lse, **options).failures
    sides = []
    for name, total in (("q", len(q)), ("k", len(k))):
        bounds = call.tensors[f"cu_seqlens_{name}"].clamp(0, total).tolist()
        most = call.options[f"max_seqlen_{name}"]
        sides.append([slice(a, max(a, min(b, a + most))) for a, b in zip(bounds, bounds[1:], strict=False)])
    said = []
    for rows, keys in zip(*sides, strict=True):
        one = (t.transpose(0, 1)[None] for t in (out[rows], q[rows], k[keys], v[keys]))
        said.append(check(*one, lse=None if lse is None else lse[None, :, rows], **options).failures)
    return "; ".join(failure for failure in said if failure)


def test_verdicts_are_those_of_the_gates(plant: Callable[..., None]) -> None:
    """Right results and spoilt ones, of inputs with NaN, infinities and poisoned padding among them."""
    met: Counter[str] = Counter()
    for seed in range(0, 250 * (KIN + 1), KIN + 1):
        call = random_problem(seed, LONGEST)
        results: list[tuple[Tensor, Tensor | None]] = []

        def spoil(out: Tensor, lse: Tensor | None, how: int = seed % 5, results: list[Any] = results) -> Any:
            if out.numel() and how:
                at = tuple(size // 2 for size in out.shape)
                out[at] = (0.0, math.nan, math.inf, 1.01 * out[at])[how - 1]
                if lse is not None and how == 4:
                    lse.nan_to_num_(0.0, 0.0, 0.0)
            results.append((out.clone(), None if lse is None else lse.clone()))
            return returned(out, lse)

        plant(None, spoil)
        said = Trial(call).run()
        assert said.removesuffix("written to rows of no sequence").removesuffix("; ") == by_check(call, *results[0])
        met["failed" if said else "passed"] += 1
        met["not finite"] += not all(t.isfinite().all() for t in call.tensors.values())
    assert min(met["failed"], met["passed"], met["not finite"]) > 40, met
