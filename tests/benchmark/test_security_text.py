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


def test_a_timing_record_fills_both_tables(root: Path) -> None:
    results.write(root / "results" / "audit-timing-h100.json", records.timing())
    text = written(root)
    assert security_text.NOT_MEASURED not in text
    rows = [line for line in text.splitlines() if line.startswith("| hopper")]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["even", "**differs**", "caught", "differs, no gate"]
    assert "+0.500% (+0.480 to +0.520)" in rows[1] and "999,900" in rows[0] and "control: rescale" in rows[2]
    assert "held back by software power cap" in text and "| 8 | 64/512 keys (public) |" in text
    assert "audit-timing-h100.png" not in text, "not drawn"


def test_wall_time_stands_beside_elapsed_cycles_and_frequency(root: Path) -> None:
    results.write(root / "results" / "audit-timing-h100.json", records.probed())
    text = written(root)
    table = text[text.index("**Wall time") : text.index("gates hold")]
    rows = [line for line in table.splitlines() if line.startswith("| hopper")]
    assert len(rows) == 3, "one a pair"
    assert rows[0].endswith("| differs: the clock, not the cycles, 3 readings dropped |")
    for part in ("µs, +1.000% (+0.980 to +1.020)", "cycles, +0.000% (-0.020", "MHz, -1.000% (-1.020 to -0.980)"):
        assert part in rows[0]
    assert "13,000.0 cycles, +1.000%" in rows[1] and rows[1].endswith("| **differs**, **elapsed cycles differ** |")
    assert rows[2].endswith("| - | - | - | even, 1,998,000 readings dropped |")
    assert "3 of all 6 gates hold" in text and "of the 3 others 1 differ by the clock, not the cycles" in text


def test_the_record_from_before_the_probes_is_still_shown(root: Path) -> None:
    old = Path(__file__).parents[2] / "results" / "audit-timing-h100-2026-11-28.json"
    record = json.loads(old.read_text())
    if any("explained" in case for case in record["cases"]):
        pytest.skip("replaced by a newer one")
    (root / "results" / old.name).write_text(old.read_text())
    text = written(root)
    assert "| Kernel | Classes | Measurements a class | Mean |" in text and "gates hold" not in text


def test_a_clock_that_was_held_back_is_told(root: Path) -> None:
    record = records.timing(gpu_states=[{"sm_mhz": 1980, "held_back_by": []}])
    results.write(root / "results" / "audit-timing-h100.json", record)
    assert "not held back" in written(root)
    record["cases"][2]["gpu_states"] = [{}, {"sm_mhz": 1620, "held_back_by": ["software thermal slowdown"]}]
    results.write(root / "results" / "audit-timing-h100.json", record)
    text = written(root)
    assert ", held back by software thermal slowdown;" in text
    assert "differs, no gate, clock held back by software thermal slowdown |" in text
    assert "| even |" in text


def test_a_run_that_did_not_end_is_not_reported(root: Path) -> None:
    results.write(root / "results" / "audit-timing-h100.json", records.timing(complete=False))
    assert security_text.NOT_MEASURED in written(root)


def test_the_newest_whole_audit_is_reported(root: Path) -> None:
    row = {"arch": 80, "variants": 134, "clean": 134, "instructions": 123_456, "branches": 7, "memory": 8,
           "tainted_branches": 0, "tainted_addresses": 0, "tainted_other": 0, "reads_lengths": 60, "undeclared": 60,
           "controls": 4, "controls_caught": 4}  # fmt: skip
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
    results.write(file, records.probed())
    out = root / timing_plot.FOLDER
    assert timing_plot.main([str(file), "--out", str(out)]) == 0
    image = out / "audit-timing-h100.png"
    assert image.read_bytes()[:4] == b"\x89PNG"
    assert "![Difference of means and t of every pair](validation/audit-timing-h100.png)" in written(root)
    results.write(file, records.validation())
    assert timing_plot.main([str(file), "--out", str(out)]) == 2
    assert "expected kind audit-timing" in capsys.readouterr().err
