"""Documents follow results/: the repository's own, and ones made of records that never happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import page, peers_text, report, results
from flashcore.benchmark.shapes import SUITES
from tests.benchmark import records

README = "# Title\n\n<!-- results:nine -->\n<!-- /results -->\n\nThe end.\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    results.write(tmp_path / "results" / "validation.json", records.validation())
    results.write(tmp_path / "results" / "peers.json", records.peers())
    return tmp_path


def test_the_repositorys_documents_say_what_its_results_say() -> None:
    assert report.stale(results.ROOT) == [], "run python -m flashcore.benchmark.report"


def test_documents_are_written_once(root: Path) -> None:
    written = {path.relative_to(root) for path in report.write(root)}
    assert written == {Path("README.md"), report.VALIDATION, report.PEERS, report.CROSS_GPU, report.SUPPORT}
    assert report.write(root) == [] and report.stale(root) == []


def test_an_edited_figure_is_noticed(root: Path) -> None:
    report.write(root)
    for document in (root / report.VALIDATION, root / "README.md"):
        text = document.read_text()
        document.write_text(text.replace("1.", "7.", 1))
        assert report.stale(root) == [document]
        document.write_text(text)


def test_a_new_measurement_makes_documents_stale(root: Path) -> None:
    report.write(root)
    newer = records.validation(environment=records.environment(recorded="2002-01-01T00:00:00+00:00"))
    newer["cases"][4]["contestants"]["flashcore"]["call"]["p50"] *= 2
    results.write(root / "results" / "a-validation.json", newer)
    assert root / report.VALIDATION in report.stale(root)
    report.write(root)
    assert "2002-01-01" in (root / report.VALIDATION).read_text()


def test_without_results_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    assert report.write(tmp_path) == [tmp_path / report.SUPPORT]  # which is about code
    report_path = tmp_path / report.VALIDATION
    report_path.parent.mkdir(parents=True)
    report_path.write_text("figures from nowhere")
    assert report.stale(tmp_path) == [report_path]
    report.write(tmp_path)
    assert not report_path.exists()


def test_the_readme_states_the_headline(root: Path) -> None:
    report.write(root)
    text = (root / "README.md").read_text()
    assert text.startswith("# Title") and text.endswith("The end.\n")
    assert "9 of 9 configurations correct" in text
    assert "| S128 B8 | 10.00 | 15.00 | triton-plain | 1.50x |" in text


def test_a_wrong_configuration_is_stated_and_has_no_speed(tmp_path: Path) -> None:
    results.write(tmp_path / "results" / "v.json", records.wrong(records.validation()))
    report.write(tmp_path)
    text = (tmp_path / report.VALIDATION).read_text()
    assert "VERDICT: NOT PASSED" in text and "8 of 9 configurations correct" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| S128B8 | portable")]
    assert row == "| S128B8 | portable 64x64 | - | - | - | - | - |"


def test_a_slower_result_is_called_slower(tmp_path: Path) -> None:
    record = records.validation()
    for case in record["cases"]:
        case["contestants"]["flashcore"]["gpu_warm"]["us"] *= 4
    results.write(tmp_path / "results" / "v.json", record)
    report.write(tmp_path)
    assert "gpu warm: 3.20x slower than torch's best SDPA backend" in (tmp_path / report.VALIDATION).read_text()


def test_peers_report_has_every_suite_and_every_absence(root: Path) -> None:
    results.write(root / "results" / "c.json", records.peers("causal", shapes=[]))
    report.write(root)
    text = (root / report.PEERS).read_text()
    assert "### The nine configurations" in text and "### Causal" in text
    assert "- fa4: missing (everywhere): pip install it" in text
    assert "- flex: failed (S128 B8): RuntimeError: no" in text
    assert "1.50x (1.49 to 1.51)" in text or "1.50x (1.50 to 1.50)" in text


def resources_record() -> dict[str, object]:
    def case(arch: int, head_dim: int, registers: int, spills: int = 0, error: str = "") -> dict[str, object]:
        config = {"kernel": "portable", "block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, "schedule": ""}
        return {
            "kernel": "portable", "config": config, "problem": {"head_dim": head_dim}, "arch": arch, "triton": "9.8",
            "registers": registers, "spills": spills, "shared": 1000 * registers, "error": error, "ok": not error,
        }  # fmt: skip

    return {
        "kind": "resources", "environment": records.environment(gpu=None),  # type: ignore[arg-type]
        "targets": {"80": {"gpu": "NVIDIA A100-SXM4-80GB", "shared": 166_912}, "90": {"gpu": records.GPU, "shared": 1}},
        "cases": [case(80, 64, 100), case(80, 64, 90, spills=8), case(80, 128, 255, error="too much"), case(90, 64, 7)],
    }  # fmt: skip


def test_what_was_compiled_is_not_called_measured(root: Path) -> None:
    results.write(root / "results" / "resources.json", resources_record())
    audit = {"kind": "audit-sass", "environment": {"recorded": "2001-02-03", "gpu": None}, "summary": [
        {"arch": 80, "variants": 50, "clean": 49, "controls": 2, "controls_caught": 2, "tainted_branches": 1,
         "tainted_addresses": 0, "tainted_other": 0, "written": 49, "gaps_noticed": 50}]}  # fmt: skip
    results.write(root / "results" / "audit.json", audit)
    report.write(root)
    text = (root / report.CROSS_GPU).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| NVIDIA A100")]
    assert rows == [
        "| NVIDIA A100-SXM4-80GB | sm_80 | portable | 64 | 2 of 2 | 1 | 100 | 100,000 of 166,912 |",
        "| NVIDIA A100-SXM4-80GB | sm_80 | portable | 128 | 0 of 1 | 0 | 255 | 255,000 of 166,912 |",
    ]
    assert "has not been run on NVIDIA A100-SXM4-80GB: no speed and no result there has been measured" in text
    assert "found 49 of 50 variants clean and caught 2 of 2 planted controls" in text
    assert f"| {records.GPU} | 2001-01-01 | 9 of 9 |" in text and "sm_90" not in text
    assert "| The nine configurations | gpu warm | 1.50x (9 of 9) |" in text
    assert "There is no record of an H200 yet." in text and "no record of an H100" not in text


def test_another_gpu_is_another_column(root: Path) -> None:
    other = records.environment(gpu="NVIDIA H200")
    slower = records.peers(environment=other)
    for case in slower["cases"]:
        for name, peer in case["contestants"].items():
            if name != "flashcore" and "gpu_warm" in peer:
                peer["gpu_warm"]["rounds"] = [us * 0.5 for us in peer["gpu_warm"]["rounds"]]
        case["gpu_states"] = [{"sm_mhz": 1, "held_back_by": ["software power cap"]}]
    submission = {"kind": "submission", "environment": other, "validation": records.validation(environment=other),
                  "peers": [slower]}  # fmt: skip
    results.write(root / "results" / "submission.json", submission)
    report.write(root)
    text = (root / report.CROSS_GPU).read_text()
    assert "| The nine configurations | gpu warm | 1.50x (9 of 9) | 0.75x (0 of 9) |" in text
    assert "NVIDIA H200: the clock was held back during some of these runs (software power cap)." in text
    assert "no record of" not in text and "| NVIDIA H200 | 2001-01-01 |" in text
    assert "## NVIDIA H200" in (root / report.PEERS).read_text()


def test_the_same_suites_on_two_gpus_stand_side_by_side(tmp_path: Path) -> None:
    here = records.measured("peers-features-h100-*.json")
    there = records.elsewhere(here, "NVIDIA H200", ours=0.8, others=0.9)
    there["cases"][0]["contestants"].pop("sdpa-efficient", None)  # contestants need not be the same
    for record in (here, there):
        results.write(tmp_path / "results" / f"peers-{results.slug(record['environment']['gpu'])}.json", record)
    report.write(tmp_path)
    text = (tmp_path / report.CROSS_GPU).read_text()
    assert "| Suite | Clock | NVIDIA H100 80GB HBM3 | NVIDIA H200 |" in text and "no record of" not in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "| gpu warm |" in line]
    assert [title.strip() for title, *_ in rows] == [
        title for suite, title in page.SUITE_TITLES.items() if here["suites"].get(suite)
    ]
    for _, _, *cells in rows:
        ratios = [float(cell.split("x")[0]) for cell in cells]
        assert ratios[1] == pytest.approx(ratios[0] * 0.9 / 0.8, abs=0.015)
    peers = (tmp_path / report.PEERS).read_text()
    assert "## NVIDIA H100 80GB HBM3" in peers and "## NVIDIA H200" in peers and "peers-odd-h200.png" in peers


def test_what_each_takes_alone_is_told_beside_what_it_takes_in_turns(tmp_path: Path) -> None:
    record = records.peers()
    path = tmp_path / "results" / "p.json"
    results.write(path, record)
    assert "gpu alone" not in "\n".join(report.suites(path.parent))
    for case in record["cases"]:
        us = {"flashcore": 2.0, "sdpa-cudnn": 1.0, "triton-plain": 3.0}
        for name, timing in records.gpu(us).items():
            case["contestants"][name]["gpu_alone"] = timing
    results.write(path, record)
    text = "\n".join(report.suites(path.parent))
    assert "each by itself for seconds" in text and "| The nine configurations | gpu warm | 1.50x" in text
    assert "| The nine configurations | gpu alone | 0.50x (0.50 to 0.50)" in text
    assert "each contestant alone for seconds" in "\n".join(report.peers_report(path.parent))


def test_an_incomplete_run_is_not_reported(tmp_path: Path) -> None:
    results.write(tmp_path / "results" / "p.json", records.peers(complete=False))
    assert report.write(tmp_path) == [tmp_path / report.SUPPORT]


def test_a_row_for_each_suite(root: Path) -> None:
    (root / "docs" / "guide.md").write_text("<!-- results:suites -->\n<!-- /results -->\n")
    results.write(root / "results" / "b1.json", records.peers("b1", SUITES["b1"]))
    here = records.peers("b1", SUITES["b1"])
    there = records.elsewhere(here, "NVIDIA H200", ours=0.8, others=0.4)
    results.write(root / "results" / "h200.json", there)
    results.write(root / "results" / "mid.json", records.peers("mid", [], environment=records.environment("A100")))
    report.write(root)
    header, _, *rows = (line for line in (root / "docs" / "guide.md").read_text().splitlines() if line.startswith("|"))
    assert header == f"| Suite | Clock | {records.GPU} | NVIDIA H200 |"
    ahead, behind = "1.50x (1.50 to 1.50), 2001-01-01", "0.75x (0.75 to 0.75), 2001-01-01"
    assert rows == [
        f"| The nine configurations | gpu warm | {ahead} | - |",
        f"| The nine configurations | gpu cold | {ahead} | - |",
        f"| One sequence | gpu warm | {ahead} | {behind} |",
        f"| One sequence | gpu cold | {ahead} | {behind} |",
    ]


def test_a_run_that_did_not_hear_the_fastest_peer_replaces_none(tmp_path: Path) -> None:
    old, newer = records.peers("b1", SUITES["b1"]), records.environment(recorded="2002-01-01T00:00:00+00:00")
    new = records.peers("b1", SUITES["b1"], environment=newer)
    results.write(tmp_path / "old.json", old)

    def stands(last: dict[str, Any]) -> str:
        results.write(tmp_path / "new.json", new | {"cases": [*new["cases"][:-1], last]})
        return str(peers_text.newest(tmp_path, "b1")[records.GPU]["file"])

    last, fastest = new["cases"][-1], "triton-plain"
    others = {name: found for name, found in last["contestants"].items() if name != fastest}
    assert stands(last) == "new.json"
    assert stands(last | {"contestants": others}) == "old.json"
    for status, file in (("missing", "old.json"), ("refused", "new.json"), ("failed", "new.json")):
        assert stands(last | {"contestants": others | {fastest: {"status": status, "reason": "no"}}}) == file
    assert stands(last | {"contestants": {"flashcore": last["contestants"]["flashcore"]}}) == "old.json"
    timed = records.gpu({"flashcore": 10.0, "fa3": 1.0})["fa3"]
    for clock, file in (("gpu_alone", "new.json"), ("gpu_cold", "old.json")):  # the new run measured only the second
        heard = old["cases"][0]["contestants"] | {"fa3": records.ok(**{clock: timed})}
        first = old["cases"][0] | {"contestants": heard}
        results.write(tmp_path / "old.json", old | {"cases": [first, *old["cases"][1:]]})
        assert stands(last) == file
    old["cases"][0]["contestants"] |= {"fa3": records.ok(gpu_warm=timed)}
    del old["cases"][0]["contestants"][fastest]
    results.write(tmp_path / "old.json", old)
    assert stands(last) == "new.json", "neither heard all of them"


def test_an_unknown_block_is_an_error(root: Path) -> None:
    (root / "README.md").write_text("<!-- results:ten -->\n<!-- /results -->\n")
    with pytest.raises(ValueError, match="results:ten.*expected one of nine"):
        report.write(root)


def test_records_survive_writing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    results.write(path, {"kind": "x", "values": [1.23456789, float("inf")], "nested": {"n": 3}, "text": "a [1, 2] b"})
    assert results.read(path) == {
        "schema": 1, "kind": "x", "values": [1.23457, None], "nested": {"n": 3}, "text": "a [1, 2] b",
    }  # fmt: skip
    assert "[1.23457, null]" in path.read_text() or json.loads(path.read_text())
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 1"):
        results.read(path)


@pytest.mark.parametrize(
    ("gpu", "slug"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L4", "l4"), ("NVIDIA A100-SXM4-80GB", "a100"), (None, "no-gpu"),
     ("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090")],
)  # fmt: skip
def test_slug(gpu: str | None, slug: str) -> None:
    assert results.slug(gpu) == slug
