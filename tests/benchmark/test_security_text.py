"""docs/security.md follows the audits' records, and says where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashcore.benchmark import report, results, security_text, timing_plot
from tests.benchmark import records

DOCUMENT = "".join(f"<!-- results:{name} -->\n<!-- /results -->\n" for name in ("audit_sass", "timing", "timing_batch"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "security.md").write_text(DOCUMENT)
    (tmp_path / "results").mkdir()
    return tmp_path


def written(root: Path) -> str:
    report.write(root)
    assert report.stale(root) == []
    return (root / "docs" / "security.md").read_text()


def test_without_a_record_it_says_that_nothing_was_measured(root: Path) -> None:
    text = written(root)
    assert text.count(security_text.NOT_MEASURED) == 2 and "No audit was recorded yet." in text


def table(text: str, title: str) -> list[str]:
    """The rows under a title."""
    behind = text[text.index(f"**{title}") :].split("\n\n")[1]
    return [line for line in behind.splitlines() if line.startswith("| hopper")]


def test_a_timing_record_fills_both_tables(root: Path) -> None:
    results.write(root / "results" / "audit-timing-h100.json", records.timing())
    text = written(root)
    assert security_text.NOT_MEASURED not in text
    rows = table(text, "Cycles inside an SM")
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["even", "**differs**", "caught"]
    assert "+0.500% (+0.480 to +0.520)" in rows[1] and "999,900" in rows[0] and "control: rescale" in rows[2]
    assert "held back by software power cap" in text and "| 8 | 64/512 keys (public) |" in text
    assert "audit-timing-h100.png" not in text, "not drawn"


def test_wall_time_stands_beside_elapsed_cycles_and_frequency(root: Path) -> None:
    results.write(root / "results" / "audit-timing-h100.json", records.timing())
    text = written(root)
    rows = table(text, "Wall time of the shipped kernels on few blocks (2 or 8)")
    assert len(rows) == 4, "one a pair, and the control"
    assert rows[0].endswith("| differs: the clock, not the cycles, 3 readings dropped |")
    for part in ("µs, +1.000% (+0.980 to +1.020)", "cycles, +0.000% (-0.020", "MHz, -1.000% (-1.020 to -0.980)"):
        assert part in rows[0]
    assert "13,000.0 cycles, +1.000%" in rows[1] and rows[1].endswith("| **differs**, **elapsed cycles differ** |")
    assert rows[2].endswith("| - | - | - | even, 1,998,000 readings dropped, 9 disturbed |")
    assert "control: rescale" in rows[3] and rows[3].endswith("| 40.00 | - | - | - | caught |"), "not the pair's own"
    held = "1 of 2 of cycles inside an SM, 1 of 3 of wall time, 1 of 2 of elapsed cycles."
    assert held in text and "Of the 4 others 1 differ by the clock, not the cycles." in text


def test_what_the_clock_gives_away_is_told_and_has_no_gate(root: Path) -> None:
    record = records.timing()
    results.write(root / "results" / "audit-timing-h100.json", record)
    text = written(root)
    (row,) = table(text, "Wall time of the shipped kernels over the whole GPU (256 blocks), which has no gate")
    assert row.endswith("| differs, no gate, elapsed cycles differ |")
    given_away = "classes differ in wall time by up to {}, and in the frequency of the SMs by up to {}."
    assert given_away.format("2.00%", "1.50%") in text
    del record["full"]
    results.write(root / "results" / "audit-timing-h100.json", record)
    text = written(root)
    assert len(table(text, "Wall time of the shipped kernels over the whole GPU, which an earlier protocol gated")) == 3
    assert given_away.format("1.00%", "1.00%") in text
    assert "on few blocks" not in text and "On few blocks no wall time was measured yet" in text


def test_a_clock_that_was_held_back_is_told(root: Path) -> None:
    record = records.timing(gpu_states=[{"sm_mhz": 1980, "held_back_by": []}])
    results.write(root / "results" / "audit-timing-h100.json", record)
    assert "not held back" in written(root)
    record["cases"][2]["gpu_states"] = [{}, {"sm_mhz": 1620, "held_back_by": ["software thermal slowdown"]}]
    results.write(root / "results" / "audit-timing-h100.json", record)
    text = written(root)
    assert ", held back by software thermal slowdown;" in text
    assert "the clock, not the cycles, clock held back by software thermal slowdown, 3 readings dropped |" in text
    assert "| even |" in text


def test_a_run_that_did_not_end_is_not_reported(root: Path) -> None:
    results.write(root / "results" / "audit-timing-h100.json", records.timing(complete=False))
    assert security_text.NOT_MEASURED in written(root)


def test_the_newest_whole_audit_is_reported(root: Path) -> None:
    row = {"arch": 80, "variants": 134, "clean": 134, "instructions": 123_456, "branches": 7, "memory": 8,
           "tainted_branches": 0, "tainted_addresses": 0, "tainted_other": 0, "reads_lengths": 60, "undeclared": 60,
           "controls": 4, "controls_caught": 4, "written": 134, "gaps_noticed": 134}  # fmt: skip
    for day, quick in ((1, False), (2, False), (3, True)):
        tools = {"triton": "9.8", "ptxas": "9.7", "nvdisasm": "9.6", "source": "0" * 16, "gpu": None}
        record = {
            "schema": 1, "kind": "audit-sass", "quick": quick, "summary": [row],
            "environment": {"recorded": f"2001-01-0{day}T00:00:00", **tools},
        }  # fmt: skip
        (root / "results" / f"audit-sass-{day}.json").write_text(json.dumps(record))
    text = written(root)
    assert "results/audit-sass-2.json" in text and "audit-sass-3.json" not in text
    assert "| sm_80 (A100) | 134 | 134 | 123,456 | 7 | 8 | 0 | 60 | 60 | 4 of 4 |" in text


def test_the_timing_audit_is_drawn_and_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    file = root / "results" / "audit-timing-h100.json"
    results.write(file, records.timing())
    out = root / timing_plot.FOLDER
    assert timing_plot.main([str(file), "--out", str(out)]) == 0
    image = out / "audit-timing-h100.png"
    assert image.read_bytes()[:4] == b"\x89PNG"
    assert "![Difference of means and t of every pair](validation/audit-timing-h100.png)" in written(root)
    results.write(file, records.validation())
    assert timing_plot.main([str(file), "--out", str(out)]) == 2
    assert "expected kind audit-timing" in capsys.readouterr().err
