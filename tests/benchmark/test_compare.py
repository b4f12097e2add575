"""`flashcore compare`: what two results files are told to differ in, and what is left to the noise."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import compare, results
from flashcore.benchmark.shapes import SUITES
from tests.benchmark import records

Record = dict[str, Any]

_KINDS = {"peers": functools.cache(records.peers), "validation": functools.cache(records.validation)}


def peers(**changes: Any) -> Record:
    """A copy of records.peers(), whose bootstraps take half a second."""
    return {**copy.deepcopy(_KINDS["peers"]()), **changes}


def validation() -> Record:
    return copy.deepcopy(_KINDS["validation"]())


def host() -> Record:
    shape = SUITES["b1"][0].as_json()
    cases = [
        {"shape": shape, "gradients": gradients, "contestants": {
            "flashcore": records.ok(host=records.call(5.0 + gradients)), "sdpa": records.ok(host=records.call(18.0)),
        }}
        for gradients in (False, True)
    ]  # fmt: skip
    protocol = {"name": "host", "seed": 42}
    return {"kind": "host", "environment": records.environment(), "protocol": protocol, "gpu_states": [],
            "cases": cases}  # fmt: skip


def scaled(record: Record, factor: float, names: tuple[str, ...], clock: str = "gpu_warm", case: int = 4) -> Record:
    """A copy in which these contestants took `factor` times as long on one shape and clock."""
    changed = copy.deepcopy(record)
    for name in names:
        timing = changed["cases"][case]["contestants"][name][clock]
        fields = ("us", "low", "high") if "us" in timing else ("p50", "p50_low", "p50_high")
        timing |= {field: timing[field] * factor for field in fields}
    return changed


def found(a: Record, b: Record) -> dict[tuple[str, str, str], tuple[compare.Row, bool | None]]:
    rows = compare.rows(a, b)
    drift = compare.drifts(rows)
    return {(row.shape, row.contestant, row.clock): (row, row.outside(drift[row.clock])) for row in rows}


def outside(a: Record, b: Record) -> set[tuple[str, str, str]]:
    return {key for key, (_, verdict) in found(a, b).items() if verdict}


def written(folder: Path, **sides: Record) -> list[str]:
    for name, record in sides.items():
        results.write(folder / f"{name}.json", record)
    return [str(folder / f"{name}.json") for name in sides]


@pytest.mark.parametrize("make", [peers, validation, host])
def test_a_run_beside_itself(make: Callable[[], Record]) -> None:
    record = make()
    rows = found(record, record)
    assert rows and all(row.ratio.value == 1 and verdict is False for row, verdict in rows.values())
    contestants = [c for case in record["cases"] for c in case["contestants"].values()]
    timed = sum(clock in c for c in contestants for clock in compare.CLOCKS)
    assert len(rows) == timed
    assert compare.warnings(record, record) == compare.unmatched(record, record) == []


@pytest.mark.parametrize(("factor", "said"), [(1.05, "SLOWER"), (0.95, "faster")])
def test_a_change_is_found_where_it_is(factor: float, said: str) -> None:
    a = peers()
    b = scaled(a, factor, ("flashcore",))
    assert outside(a, b) == {("S256 B16", "flashcore", "gpu_warm")}
    row, _ = found(a, b)["S256 B16", "flashcore", "gpu_warm"]
    assert row.ratio.value == pytest.approx(factor)
    assert row.ratio.low < factor < row.ratio.high
    text = compare.text(a | {"file": "a"}, b | {"file": "b"}, compare.rows(a, b))
    (line,) = [line for line in text if line.endswith("  " + said)]
    assert "S256 B16" in line and f"{factor:.3f}" in line


def test_overlapping_intervals_are_noise() -> None:
    a = peers()
    timing = a["cases"][4]["contestants"]["flashcore"]["gpu_warm"]
    assert outside(a, scaled(a, 0.5 * (1 + timing["high"] / timing["low"]), ("flashcore",))) == set()


def test_what_happened_to_unchanged_libraries_is_noise() -> None:
    a = peers()
    b = a
    for case in range(9):
        b = scaled(b, 1.08 if case % 2 else 0.93, ("sdpa-cudnn", "triton-plain"), case=case)
    assert not {key for key in outside(a, scaled(b, 1.05, ("flashcore",))) if key[1] == "flashcore"}
    assert ("S256 B16", "flashcore", "gpu_warm") in outside(a, scaled(b, 1.2, ("flashcore",)))
    on_the_other_clock = scaled(b, 1.05, ("flashcore",), "gpu_cold")
    assert ("S256 B16", "flashcore", "gpu_cold") in outside(a, on_the_other_clock)


@pytest.mark.parametrize("changed", ["gpu", "driver", "torch"])
def test_libraries_on_other_machines_or_software_tell_no_noise(changed: str) -> None:
    a = peers()
    b = scaled(a, 1.5, ("sdpa-cudnn", "triton-plain"))
    b["environment"] = {**b["environment"], changed: "another"}
    rows = compare.rows(a, b)
    assert not any(row.control for row in rows) and set(compare.drifts(rows).values()) == {None}
    assert len(outside(a, b)) == 2
    text = "\n".join(compare.text(a | {"file": "a"}, b | {"file": "b"}, rows))
    assert "no library was measured unchanged" in text and "another   (differs)" in text


def test_another_version_of_a_library_is_no_control() -> None:
    a, b = peers(), peers()
    for case in b["cases"]:
        case["contestants"]["flex"]["version"] = "10.0"
    controls = {row.contestant for row in compare.rows(a, b) if row.control}
    assert controls == {"sdpa-cudnn", "triton-plain"}


def test_intervals_missing_from_a_record_come_from_its_rounds() -> None:
    a = peers()
    for side in (b := copy.deepcopy(a), a):
        side["cases"][0]["contestants"]["flashcore"]["gpu_warm"] |= {"low": None, "high": None}
    row, verdict = found(a, b)["S128 B8", "flashcore", "gpu_warm"]
    assert row.a.low is not None and row.a.low < row.a.value and verdict is False


def test_without_any_interval_there_is_no_verdict() -> None:
    a = validation()
    a["cases"][0]["contestants"]["flashcore"]["call"] |= {"p50_low": None, "p50_high": None}
    rows = compare.rows(a, a)
    assert found(a, a)["S128 B8", "flashcore", "call"][1] is None
    assert any("no interval" in line for line in compare.text(a | {"file": "a"}, a | {"file": "b"}, rows))


def test_warnings() -> None:
    a, b = peers(), peers(complete=False)
    b["environment"] = records.environment(gpu="Made-up H200")
    b["protocol"] = {**b["protocol"], "replays": 9, "contestants": []}
    b["cases"][0]["gpu_states"] = [{"held_back_by": ["software power cap"]}]
    gpus, protocol, held, incomplete = compare.warnings(a, b)
    assert "GPUs differ" in gpus and records.GPU in gpus and "Made-up H200" in gpus
    assert protocol == "the protocols differ in replays: 7; 9"
    assert held == "B: the GPU's clock was held back: software power cap"
    assert incomplete == "B: not every shape was measured"


def test_two_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A committed H100 record beside an H200's: ratios of times, and each GPU's own ratio to the best peer."""
    a = records.measured("peers-features-h100-*.json")
    paths = written(tmp_path, a=a, b=records.elsewhere(a, "NVIDIA H200", ours=0.8, others=0.9))
    assert compare.main(paths) == 0
    said = capsys.readouterr().out
    assert "WARNING: the GPUs differ (NVIDIA H100 80GB HBM3; NVIDIA H200): the ratios compare machines" in said
    assert "no library was measured unchanged on the same machine in both" in said
    n = len(a["cases"])
    assert f"gpu warm, flashcore: 0.800x (geometric mean over {n}; 0.800x to 0.800x)" in said
    (lead,) = [line for line in said.splitlines() if "fastest other in both files" in line]
    before, after = compare.leads(compare.rows(a, compare._read(Path(paths[1]))))["gpu_warm"]
    assert f"{before:.3f}x as long in A, {after:.3f}x in B" in lead and after == pytest.approx(before * 0.9 / 0.8, 1e-4)
    assert "Without a ratio" not in said


def test_what_has_no_partner_is_named() -> None:
    a, b = peers(), peers()
    del b["cases"][8]
    del b["cases"][3]["contestants"]["triton-plain"]
    for case in b["cases"]:
        case["contestants"]["sdpa-cudnn"] |= {"status": "wrong", "reason": "lse 7 exceeds 1"}
    assert compare.unmatched(a, b) == [
        "S512 B32: only in A",
        "sdpa-cudnn: timed in A, wrong (lse 7 exceeds 1) in B (everywhere)",
        "triton-plain: timed in A, absent in B (S256 B8)",
    ]
    assert not any(row.contestant == "sdpa-cudnn" for row in compare.rows(a, b))


def test_a_failed_contestants_times_are_not_compared() -> None:
    a, b = peers(), peers()
    b["cases"][1]["contestants"]["flashcore"] |= {"status": "failed", "reason": "hung"}
    assert ("S128 B16", "flashcore", "gpu_warm") not in found(a, b)


def test_leads_are_of_the_same_contestants() -> None:
    a, b = peers(), peers()
    for case in b["cases"]:
        del case["contestants"]["triton-plain"]
    before, after = compare.leads(compare.rows(a, b))["gpu_warm"]
    assert (before, after) == (pytest.approx(1.6), pytest.approx(1.6))  # triton-plain's 1.5 is of A alone


def test_host_cases_with_and_without_gradients_are_kept_apart() -> None:
    keys = {shape for shape, _, _ in found(host(), host())}
    assert keys == {"S128 B1", "S128 B1, gradients"}


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = peers()
    paths = written(tmp_path, a=a, b=scaled(a, 1.2, ("flashcore",)))
    assert compare.main([*paths, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["of"] == "peers" and said["sides"]["b"]["file"] == "b.json"
    (row,) = [row for row in said["rows"] if row["outside"]]
    assert (row["shape"], row["contestant"], row["clock"]) == ("S256 B16", "flashcore", "gpu_warm")
    assert row["ratio"]["value"] == pytest.approx(1.2, rel=1e-4)
    (line,) = [line for line in said["summary"] if line["clock"] == "gpu_warm"]
    assert (line["n"], line["faster"], line["slower"]) == (9, 0, 1)
    assert said["drift"] == {"gpu_warm": pytest.approx(1), "gpu_cold": pytest.approx(1)}


def test_tables_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = written(tmp_path, a=validation(), b=validation())
    assert compare.main(paths) == 0
    said = capsys.readouterr().out
    assert "WARNING" not in said and "(differs)" not in said
    for title in ("call (µs", "gpu warm (µs", "gpu cold (µs", records.GPU, "0" * 40):
        assert title in said


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**peers(), "kind": "gpu-tests"}
    elsewhere = records.peers("b1", shapes=SUITES["b1"])
    nine, nine_validated, tests, b1 = written(
        tmp_path, nine=peers(), nine_validated=validation(), tests=other, b1=elsewhere
    )
    (tmp_path / "text.json").write_text("no json")
    for pair, why in {
        (nine, nine_validated): "one kind, got peers and validation",
        (nine, tests): "got gpu-tests",
        (nine, b1): "no shape was timed in both",
        (nine, str(tmp_path / "nowhere.json")): "No such file",
        (str(tmp_path / "text.json"), nine): "text.json: not JSON",
    }.items():
        assert compare.main(pair) == 2
        said = capsys.readouterr()
        assert why in said.err and not said.out
    with pytest.raises(SystemExit) as ended:
        compare.main([nine])
    assert ended.value.code == 2
