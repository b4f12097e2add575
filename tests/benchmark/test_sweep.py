"""`flashcore tune`: what it measures, what it leaves out, the table that it writes and the choices that it checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore import reference
from flashcore.benchmark import results, sweep
from flashcore.benchmark.shapes import SUITES, Shape
from flashcore.benchmark.sweep import Case
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import H100
from flashcore.launch import select
from flashcore.launch.arguments import Options, problem_of
from flashcore.measure import machine
from flashcore.measure.clocks import Contestant
from flashcore.tuning import lookup

SMALL = Case(Shape(1, 2, 64, 16))
WRONG, FAILING = -1.0, -2.0  # instead of microseconds


def test_a_new_row_replaces_the_one_of_its_problem() -> None:
    def row(us: float, seqlen: int = 128, is_causal: bool = False) -> lookup.Row:
        return lookup.Row(
            "float16", 64, seqlen, seqlen, 64, is_causal, "portable", 64, 64, 4, 2, "", None, us, "gpu", "0" * 40, ""
        )

    rows = sweep.merged([row(3.0), row(9.0, 256)], [row(2.0), row(1.0, is_causal=True)])
    assert [(r.is_causal, r.seqlen_q, r.us) for r in rows] == [(False, 128, 2.0), (False, 256, 9.0), (True, 128, 1.0)]


def test_compiles_each_code_once_and_what_it_measures() -> None:
    one, longer, causal = (Case(Shape(2, 8, s, 64, is_causal=c)) for s, c in ((256, False), (512, False), (256, True)))
    found = sweep.variants([one], H100)
    q, k, v = one.shape.inputs(device="cpu")
    assert {problem for problem, _, _ in found} == {problem_of(q, k, v, torch.empty_like(q), Options())}
    assert {config for _, config, _ in found} == set(select.candidates(found[0][0], H100))
    assert len(found) < len(sweep.variants([one, longer], H100)) < 2 * len(found)
    assert len(sweep.variants([one, one, causal], H100)) == len(found) + len(sweep.variants([causal], H100))


def test_cases_have_the_heads_and_the_query_rows_asked_for() -> None:
    found = list(sweep.cases((8, 12, 256), (128, 65536), (0, 1, 128), (64,), (False, True)))
    shapes = [case.shape for case in found]
    assert {s.batch * s.heads for s in shapes if s.seqlen == 128} == {8, 12, 256}
    assert all(s.batch * s.heads * s.seqlen * s.head_dim <= 2**28 for s in shapes)
    assert {s.is_causal for s in shapes} == {False, True}
    assert {case.queries for case in found if case.shape.seqlen == 128} == {0, 1}, "not as many rows as keys twice"


@pytest.mark.parametrize(
    ("shape", "queries", "change"),
    [
        (Shape(2, 8, 96, 64), 5, {"seqlen_q": 5}),
        (Shape(2, 8, 96, 64, heads_kv=2, is_causal=True), 0, {"heads_kv": 2, "is_causal": True}),
        (Shape(2, 8, 96, 64, window=(7, 3)), 0, {"window": (7, 3)}),
        (Shape(2, 8, 96, 64, softcap=5.0), 0, {"softcap": 5.0}),
        (Shape(2, 8, 96, 64, lengths="padded"), 0, {"seqused_k": True}),
    ],
    ids=["queries", "gqa", "window", "softcap", "lengths"],
)
def test_a_problem_has_its_shape_s_options(shape: Shape, queries: int, change: dict[str, Any]) -> None:
    problem, tensors = Case(shape, queries).problem("meta")
    assert {name: getattr(problem, name) for name in change} == change
    assert tensors["q"].shape == tensors["o"].shape == (2, 8, queries or 96, 64)
    assert ("seqused_k" in tensors) == (shape.lengths == "padded")


def test_a_problem_has_its_bias() -> None:
    problem, tensors = Case(Shape(2, 8, 96, 64, bias=1)).problem("meta")
    assert problem.mask is not None and problem.mask.dtype == torch.float16 and problem.mask.strides[0] == 0
    assert tensors["mask"].shape == (1, 8, 96, 96)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert sweep.main([]) == 1 and "none here" in capsys.readouterr().err


# -- without a GPU: launches that torch computes, and a clock that is told what to say ---------------------------


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Microseconds by configuration, rested the same unless said apart; 10 where nothing is said. WRONG or FAILING
    instead, and it is just that.
    """
    said: dict[str, float] = {}

    def launcher(problem: Problem, config: Config, tensors: dict[str, Tensor]) -> Any:
        us = said.get(repr(config))

        def call() -> None:
            if us == FAILING:
                raise RuntimeError("no such kernel")
            q, k, v = (tensors[name] for name in "qkv")
            out = reference.attention(q, k, v, is_causal=problem.is_causal, attn_mask=tensors.get("mask"))
            tensors["o"].copy_(out * (2 if us == WRONG else 1))

        return call

    def clock(contestants: Mapping[str, Contestant], *, replays: int, rest_s: float = 0.0, **rest: float) -> Any:
        us = {name: said.get(name, 10.0) for name in contestants}
        if rest_s:
            us |= {name: said[f"rested {name}"] for name in contestants if f"rested {name}" in said}
        return {name: [us[name]] * replays for name in contestants}, {}

    monkeypatch.setattr(sweep, "DEVICE", "cpu")
    monkeypatch.setattr(sweep, "_launcher", launcher)
    monkeypatch.setattr(sweep, "gpu_times", clock)
    monkeypatch.setattr(sweep.targets, "current", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "environment", lambda: {"commit": "c" * 40, "gpu": H100.name})
    return said


def offered() -> list[Config]:
    return list(select.candidates(SMALL.problem("meta")[0], H100))


def test_the_fastest_few_and_the_choice_are_timed_for_long(times: dict[str, float]) -> None:
    configs = offered()
    chosen = select.select(SMALL.problem("meta")[0], H100)
    fast = [c for c in configs if c != chosen][: sweep.FINALISTS]
    times |= {repr(c): float(i + 1) for i, c in enumerate(fast)} | {repr(chosen): 20.0}
    problem, found, timed = sweep.measure(SMALL)
    assert problem == SMALL.problem("meta")[0] and found == chosen
    assert [(t.config, t.us) for t in timed] == [(c, float(i + 1)) for i, c in enumerate(fast)] + [(chosen, 20.0)]


def test_who_wins_by_both_clocks_is_chosen(times: dict[str, float]) -> None:
    first, second, *_ = offered()
    times |= {repr(first): 4.0, repr(second): 4.2, f"rested {first!r}": 3.9, f"rested {second!r}": 3.5}
    _, _, timed = sweep.measure(SMALL)
    assert [(t.config, t.us, t.rested_us) for t in timed[:2]] == [(second, 4.2, 3.5), (first, 4.0, 3.9)]


def test_what_is_wrong_or_fails_is_reported_and_not_timed(times: dict[str, float]) -> None:
    wrong, failing, *others = offered()
    times |= {repr(wrong): WRONG, repr(failing): FAILING, repr(others[-1]): 1.0}
    heard: list[str] = []
    _, _, timed = sweep.measure(SMALL, heard.append)
    assert timed[0].config == others[-1] and not {wrong, failing} & {t.config for t in timed}
    assert len(heard) == 2 and "WRONG" in heard[0] and "RuntimeError: no such kernel" in heard[1]


GRID = ("--heads", "2", "--seqlens", "64", "--head-dims", "16", "--mask", "full", "--jobs", "0")


def test_writes_the_fastest_into_the_table(times: dict[str, float], tmp_path: Path) -> None:
    fastest = offered()[-1]
    times[repr(fastest)] = 2.5
    path = tmp_path / "sm90.json"
    assert sweep.main([*GRID, "--queries", "0", "3", "--out", str(path)]) == 0
    rows = lookup.read(path, 90)
    assert [(r.seqlen_q, r.seqlen_k, r.heads, r.machine, r.commit) for r in rows] == [
        (3, 64, 2, H100.name, "c" * 40), (64, 64, 2, H100.name, "c" * 40),
    ]  # fmt: skip
    assert rows[1].config == fastest and rows[1].us == 2.5


def test_a_check_says_where_the_choice_is_behind_and_writes_no_table(
    times: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = select.select(SMALL.problem("meta")[0], H100)
    other = next(c for c in offered() if c != chosen)
    path = tmp_path / "choices.json"
    before = lookup.table(90)
    times |= {repr(chosen): 4.1, repr(other): 4.0}
    assert sweep.main([*GRID, "--check", "--json", str(path)]) == 0
    assert "0 of 1 choices" in capsys.readouterr().out
    times[repr(other)] = 2.0
    assert sweep.main([*GRID, "--check", "--json", str(path)]) == 1
    assert "1 of 1 choices" in capsys.readouterr().out
    (entry,) = results.read(path)["choices"]
    assert (entry["us"], entry["fastest_us"], entry["ratio"]) == (4.1, 2.0, 2.05)
    assert Config(**entry["chosen"]) == chosen and Config(**entry["fastest"]) == other
    assert lookup.table(90) is before


def test_a_check_takes_options_too(times: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    small = [Shape(2, 4, 32, 16, bias=1), Shape(2, 4, 32, 16, lengths="packed")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "bias", small)
        assert sweep.main(["--suite", "bias", "--check", "--jobs", "0"]) == 0
    assert "0 of 1 choices" in capsys.readouterr().out, "packed sequences are left out"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--suite", "nine", "bias"], "a table knows plain and causal problems, not 'S128 B32 D32 bias1'"),
        (["--suite", "varlen", "--check"], "nothing to measure"),
        (["--seqlens", "64", "--queries", "64"], "nothing to measure"),
        (["--json", "choices.json"], "with --check"),
        (["--check", "--out", "sm90.json"], "writes no table"),
    ],
)
def test_misuse_says_what_was_expected(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        sweep.main(arguments)
    assert refused.value.code == 2 and why in " ".join(capsys.readouterr().err.split())


@pytest.mark.gpu
def test_tunes_and_checks_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, choices = tmp_path / "table.json", tmp_path / "choices.json"
    grid = ["--heads", "64", "--seqlens", "128", "--head-dims", "64", "--mask", "full"]
    assert sweep.main([*grid, "--queries", "0", "16", "--out", str(table)]) == 0
    rows = json.loads(table.read_text())["rows"]
    assert [row["seqlen_q"] for row in rows] == [16, 128] and all(row["us"] > 0 for row in rows)
    assert all(Config(**{name: row[name] for name in Config.__dataclass_fields__}) for row in rows)
    capsys.readouterr()
    status = sweep.main([*grid, "--check", "--json", str(choices)])
    (entry,) = results.read(choices)["choices"]
    assert entry["ratio"] >= 1 and entry["us"] > 0
    printed = capsys.readouterr().out
    assert status == (entry["ratio"] > sweep.SLOWER) and "WRONG" not in printed and "Error" not in printed
