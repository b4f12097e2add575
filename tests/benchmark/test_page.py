"""The pages: that they state the record's figures, stand alone, and that those in docs/ are of the newest results."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import page, peers_text, plots, results
from flashcore.benchmark.shapes import SUITES, Shape
from tests.benchmark import records

Record = dict[str, Any]


class Reader(HTMLParser):
    """Tables as rows of cells, and every reference to something outside of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.outside: list[str] = []
        self.source = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "meta" and found.get("name") == "source":
            self.source = found["content"] or ""
        links = [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.outside += [link for link in links if not link.startswith(("#", "data:"))]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def peers(**changes: Any) -> Record:
    return {**records.peers(), "file": "p.json", **changes}


def test_the_repositorys_pages_are_of_its_newest_results() -> None:
    wanted = {name: page.source(found) for name, found in page.newest(results.ROOT).items()}
    found = {
        path.name: Reader(path.read_text(encoding="utf-8")).source
        for path in (results.ROOT / plots.FOLDER).glob("peers-*.html")
    }
    assert found == wanted, "run python -m flashcore.benchmark.page"


def test_a_page_states_the_figures_and_stands_alone() -> None:
    record = peers()
    record["cases"][2]["contestants"]["flashcore"]["gpu_warm"]["us"] = 8.0  # B32: 0.25 a sequence
    text = page.page([record])
    read = Reader(text)
    assert not read.open and read.outside == [] and "<script" not in text
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    header = ["Shape", "flashcore", "sdpa-cudnn", "triton-plain", "flex", "Ratio (95%)", "TFLOP/s", "of the roof"]
    assert read.rows[0] == header and len(read.rows) == 2 * (1 + 9)
    row = read.rows[3]
    assert row[:5] == ["S128 B32", "0.25", "0.50", "0.47", "0.62"] and row[5].startswith("1.50x (")
    shape = Shape(32, 8, 128, 64)
    done = shape.flops / 8e6
    share = done / peers_text.roof(shape, record["ceilings"], "gpu_warm")
    assert row[6:] == [f"{done:.0f}", f"{100 * share:.0f}%"]
    assert read.rows[1][4] == "-"  # flex failed there
    assert text.count("<svg") == 1 and "fa4: missing (everywhere): pip install it" in text
    assert page.page([record]) == text


def test_suites_are_sections() -> None:
    shapes = [*SUITES["padded"], *SUITES["odd"]]
    record = peers(**records.peers("padded odd", list(dict.fromkeys(shapes)))) | {"file": "p.json"}
    record["suites"] = {"padded": True, "odd": True}
    for case in record["cases"]:
        case["suites"] = [name for name in ("padded", "odd") if Shape(**case["shape"]) in SUITES[name]]
    text = page.page([record])
    assert re.findall(r"<h2[^>]*>([^<]+)", text) == [page.SUITE_TITLES["padded"], page.SUITE_TITLES["odd"]]
    assert text.count("<svg") == 2 and "time per score / that of" in text


def test_other_clocks_and_names_that_html_would_read() -> None:
    record = peers(suite="own")
    record["protocol"] |= {"name": "call"}
    record["environment"]["gpu"] = "<b>GPU & co</b>"
    for case in record["cases"]:
        for found in case["contestants"].values():
            for clock in ("gpu_warm", "gpu_cold"):
                found.pop(clock, None)
            if found["status"] == "ok":
                found["call"] = records.call(64.0)
    record |= {"event_floor_us": records.call(11.0), "cross_check": {
        "contestant": "flashcore", "case": "S128 B8", "tool": "NVBench", "version": "0.3", "us": 2.0, "ours_us": 2.02,
        "ratio": 1.01}}  # fmt: skip
    text = page.page([record])
    read = Reader(text)
    assert "&lt;b&gt;GPU &amp; co&lt;/b&gt;" in text and "<b>GPU" not in text
    assert read.rows[1][:2] == ["S128 B8", "8.00"] and "TFLOP/s" not in read.rows[0]
    assert "No picture" in text and "Your shapes" in text
    assert "(+1.0%)" in text and "read 11.00 µs" in text


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results.write(tmp_path / "p.json", records.peers())
    results.write(tmp_path / "other.json", records.peers(environment=records.environment(gpu="another")))
    results.write(tmp_path / "v.json", {**records.peers(), "kind": "validation"})
    assert page.main([str(tmp_path / "p.json")]) == 0
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    for wrong, why in (("other.json", "one GPU"), ("v.json", "validation"), ("none.json", "No such file")):
        assert page.main([str(tmp_path / "p.json"), str(tmp_path / wrong)]) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert page.main([str(tmp_path / "p.json")]) == 0
    assert "pip install" in (tmp_path / "p.html").read_text()
