"""The performance guide's blocks, made of records that never happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashcore.benchmark import guide_text, report, results
from flashcore.benchmark.shapes import Shape
from tests.benchmark import records


def text(block: Callable[[Path], Iterator[str]], folder: Path) -> str:
    return "\n".join(block(folder))


def test_clocks_per_call_and_per_sequence(tmp_path: Path) -> None:
    results.write(tmp_path / "v.json", records.validation())
    assert "| S128 B8 | 21.00 | 1.00 | 1.50 | 2.62 | 0.12 |" in text(guide_text.clocks, tmp_path)


def test_a_wrong_shape_has_no_times(tmp_path: Path) -> None:
    results.write(tmp_path / "v.json", records.wrong(records.validation()))
    assert "| S128 B8 | - | - | - | - | - |" in text(guide_text.clocks, tmp_path)


def test_host(tmp_path: Path) -> None:
    ours = {"title": "FlashCore", "host": records.call(4.0), "over_sdpa": {"value": 0.5, "low": 0.4, "high": 0.6}}
    case = {"gradients": False, "contestants": {"flashcore": ours, "fa4": {"title": "none", "status": "missing"}}}
    waits = {"process": 1.5, "kernel": 0.002, "length": 0.001, "same": 0.00001}
    record = {
        "kind": "host", "environment": records.environment(), "cases": [case, {**case, "gradients": True}],
        "replay": {"call": {"us": 2.5}, "kernel": {"us": 2.0}}, "first_calls": {"cold": waits, "warm": {"failed": "x"}},
    }  # fmt: skip
    results.write(tmp_path / "h.json", record)
    found = text(guide_text.host, tmp_path)
    assert "| FlashCore | 4.00 | 0.50x |" in found and "| FlashCore, inputs require grad | 4.00 | 0.50x |" in found
    assert "none" not in found
    assert "takes 2.50 µs of the GPU in each replay, its kernel alone 2.00 µs" in found
    assert "| a process's first call | 1.50 s | - |" in found and "kernel | 2.00 ms | - |" in found


def test_faster_peers_are_named(tmp_path: Path) -> None:
    record = records.peers()
    results.write(tmp_path / "p.json", record)
    assert "Of the 9 shapes measured beside the peers, GPU by GPU, none" in text(guide_text.behind, tmp_path)
    slow = records.peers("dims", [Shape(32, 8, 512, 128)], environment=records.environment(recorded="2001-02-03"))
    for name, timing in records.gpu({"flashcore": 40.0, "sdpa-cudnn": 32.0, "triton-plain": 50.0}).items():
        slow["cases"][0]["contestants"][name]["gpu_warm"] = timing
    results.write(tmp_path / "d.json", slow)
    found = text(guide_text.behind, tmp_path)
    assert "1 of the 10 shapes" in found and "[results/d.json](../results/d.json)" in found
    assert f"| {records.GPU} | S512 B32 D128 | gpu warm | 40.00 | 32.00 | sdpa-cudnn | 0.80x | 2001-02-03 |" in found
    for name, timing in records.gpu({"flashcore": 60.0, "sdpa-cudnn": 30.0}).items():
        slow["cases"][0]["contestants"][name]["gpu_alone"] = timing
    results.write(tmp_path / "d.json", slow)
    found = text(guide_text.behind, tmp_path)
    assert "1 of the 10 shapes" in found and "| S512 B32 D128 | gpu warm | 40.00 |" in found
    assert "| S512 B32 D128 | gpu alone | 60.00 | 30.00 | sdpa-cudnn | 0.50x |" in found


def test_faster_peers_are_named_on_every_gpu(tmp_path: Path) -> None:
    here = records.peers()
    results.write(tmp_path / "here.json", here)
    results.write(tmp_path / "there.json", records.elsewhere(here, "NVIDIA H200", ours=1.0, others=0.5))
    found = text(guide_text.behind, tmp_path)
    assert "9 of the 18 shapes" in found and found.count("| NVIDIA H200 | ") == 9


def test_a_newer_run_replaces_a_shape(tmp_path: Path) -> None:
    slow = records.peers(shapes=[Shape(8, 8, 128, 64)])
    for name, timing in records.gpu({"flashcore": 20.0, "sdpa-cudnn": 10.0}).items():
        slow["cases"][0]["contestants"][name]["gpu_warm"] = timing
    results.write(tmp_path / "old.json", slow)
    assert "| S128 B8 |" in text(guide_text.behind, tmp_path)
    newer = records.environment(recorded="2002-01-01T00:00:00+00:00")
    results.write(tmp_path / "new.json", records.peers(environment=newer))
    assert "none has a peer" in text(guide_text.behind, tmp_path)


@pytest.mark.parametrize("name", report.BLOCKS)
def test_without_records_a_block_has_no_figure(name: str, tmp_path: Path) -> None:
    said = text(report.BLOCKS[name], tmp_path)
    assert said == "" or (said.startswith("No ") and " yet" in said and not any(map(str.isdigit, said)))
