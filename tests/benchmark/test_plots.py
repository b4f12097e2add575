"""The pictures: that they show the record's figures, and that those in docs/ are of the newest results."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import compare_peers, peers_text, plots, results
from flashcore.benchmark.shapes import NINE, SUITES, Shape
from tests.benchmark import records

Record = dict[str, Any]

_PEERS = functools.cache(records.peers)


def peers(suite: str = "nine", shapes: list[Shape] = NINE) -> Record:
    """A record of the suite, made of one case's figures; the bootstraps of records.peers() take half a second."""
    record: Record = copy.deepcopy(_PEERS()) | {"suite": suite, "file": f"peers-{suite}.json"}
    case = record["cases"][1]
    record["cases"] = [{**copy.deepcopy(case), "case": s.label, "shape": s.as_json()} for s in shapes]
    return record


def panels(record: Record) -> list[Any]:
    return list(plots.draw(record).axes)


def curves(panel: Any, name: str) -> list[float]:
    return [y for line in panel.lines if line.get_label() == name for y in line.get_ydata()]


def bars(panel: Any) -> list[float]:
    return [bar.get_y() + bar.get_height() for bar in panel.patches]


def source_of(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        text = image.info["Source"]
    assert isinstance(text, str)
    return text


def test_the_repositorys_pictures_are_of_its_newest_results() -> None:
    folder = results.ROOT / plots.FOLDER
    wanted = {plots.filename(record): plots.digest(record) for record in plots.newest(results.ROOT)}
    found = {path.name: source_of(path) for path in folder.glob("peers-*.png")}
    assert found == wanted, "run python -m flashcore.benchmark.plots"
    for path in folder.glob("*.png"):
        assert path.stat().st_size < 150_000


def test_the_documents_pictures_are_there() -> None:
    for document in (results.ROOT / plots.FOLDER).glob("*.md"):
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / name).is_file(), f"{document.name} shows {name}"


def test_every_figure_is_drawn() -> None:
    record = peers()
    record["cases"][3]["contestants"]["flashcore"]["gpu_warm"]["us"] = 12.5
    warm, cold, warm_ratio, _, warm_tflops, _ = panels(record)
    assert warm.get_title("left") == plots.TITLES["gpu_warm"] and cold.get_title("left") == plots.TITLES["gpu_cold"]
    for name in ("flashcore", "sdpa-cudnn", "triton-plain", "flex"):
        assert curves(warm, name) == [case["contestants"][name]["gpu_warm"]["us"] for case in record["cases"]]
    assert curves(warm, "fa4") == []  # was not installed
    assert bars(warm_ratio) == pytest.approx([1.5] * 9)
    assert bars(warm_tflops) == pytest.approx([peers_text.tflops(case) for case in record["cases"]])
    assert "700" in warm_tflops.texts[0].get_text()


def test_a_peer_ahead_pulls_the_bar_below_one() -> None:
    record = peers()
    contestants = record["cases"][2]["contestants"]
    rounds = [us * 0.8 for us in contestants["flashcore"]["gpu_warm"]["rounds"]]
    contestants["triton-plain"]["gpu_warm"] |= {"us": 8.0, "rounds": rounds}
    ratio = panels(record)[2]
    assert bars(ratio)[2] == pytest.approx(0.8)
    assert ratio.get_ylim()[0] < 0.79
    assert "0.80" in {text.get_text() for text in ratio.texts}


def test_warm_alone_without_ceilings_and_a_shape_that_nobody_serves() -> None:
    record = peers("b1", SUITES["b1"]) | {"ceilings": None}
    for case in record["cases"]:
        for found in case["contestants"].values():
            found.pop("gpu_cold", None)
    record["cases"][0]["contestants"] = {
        name: {**found, "status": "refused"} for name, found in record["cases"][0]["contestants"].items()
    }
    for found in record["cases"][0]["contestants"].values():
        found.pop("gpu_warm", None)
    latency, ratio, tflops = panels(record)
    assert len(curves(latency, "flashcore")) == len(bars(ratio)) == len(bars(tflops)) == 2


@pytest.mark.parametrize(
    ("suite", "ticks", "groups"),
    [
        ("nine", ["B8", "B16", "B32"] * 3, ["S128", "S256", "S512"]),
        ("b1", ["S128", "S512", "S1024"], ["B1"]),
        ("dims", ["S128", "S256", "S512", "S1024"] * 3, ["B32 D32", "B32 D96", "B32 D128"]),
        ("odd-dims", ["S257", "S512", "S1024"] * 5, [f"B32 H16 D{d}" for d in (24, 40, 72, 88, 104)]),
        ("causal", ["B8", "B32"] * 4, [f"S{s} causal" for s in (128, 512, 1024, 2048)]),
        ("bias", ["S128", "S256", "S512"] * 4,
         [f"B32{d} bias{n}" for d in (" D32", "") for n in (1, 32)]),
        ("softcap", ["S128", "S512", "S2048"], ["B8 causal softcap50"]),
        ("padded", ["S256", "S512"] * 2, ["B32 H12 padded", "B32 H12"]),
        ("odd", ["S197", "S256", "S257", "S320", "S577", "S640"], ["B32 H12"]),
        ("window", ["S128", "S512", "S2048"] * 2, ["B8 window128,128", "B8 window128,0"]),
        ("long", [f"S{s} B{16384 // s}" for s in (512, 1024, 2048, 4096, 8192, 16384)] * 4,
         ["H32", "H32 causal", "H16 D128", "H16 D128 causal"]),
    ],
)  # fmt: skip
def test_cases_are_named_and_grouped(suite: str, ticks: list[str], groups: list[str]) -> None:
    at = plots.places(peers(suite, SUITES[suite]))
    assert [place.tick for place in at] == ticks
    assert [group for group, _ in itertools.groupby(place.group for place in at)] == groups
    assert all(right.x - left.x > 0.99 for left, right in itertools.pairwise(at))


def test_roof() -> None:
    ceilings = {"matmul_tflops": 700.0, "l2_copy_tb_s": 5.0, "hbm_copy_tb_s": 2.5}
    # 4 * 128^2 * 64 operations a head and sequence; four tensors of 128 x 64 in fp16: 64 operations a byte
    assert peers_text.roof(Shape(8, 8, 128, 64), ceilings, "gpu_warm") == pytest.approx(64 * 5.0)
    assert peers_text.roof(Shape(8, 8, 128, 64), ceilings, "gpu_cold") == pytest.approx(64 * 2.5)
    assert peers_text.roof(Shape(8, 8, 512, 64), ceilings, "gpu_warm") == 700.0


def test_contestants_can_be_told_apart_without_colour() -> None:
    assert set(plots.STYLES) == set(compare_peers.NAMES)
    markers = [style.marker for style in (*plots.STYLES.values(), plots.UNKNOWN)]
    assert len(set(markers)) == len(markers)
    assert len({(style.colour, style.line) for style in plots.STYLES.values()}) == len(plots.STYLES)


def test_the_same_record_gives_the_same_file(tmp_path: Path) -> None:
    record = peers("long", SUITES["long"])
    first, second = (plots.save(record, tmp_path / name) for name in ("a", "b"))
    assert first.name == "peers-long-h100.png"
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) < 150_000
    assert source_of(first) == plots.digest(record)
    for chunk in (b"tIME", b"Software", b"Creation"):
        assert chunk not in first.read_bytes()
    record["cases"][0]["contestants"]["flashcore"]["gpu_warm"]["us"] += 1
    assert plots.digest(record) != source_of(first)


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    results.write(tmp_path / "p.json", peers("b1", SUITES["b1"]))
    assert plots.main([str(tmp_path / "p.json"), "--out", str(tmp_path / "out")]) == 0
    assert "peers-b1-h100.png written" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "peers-b1-h100.png") as image:
        assert image.width == 1200


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results.write(tmp_path / "v.json", {**peers(), "kind": "validation"})
    results.write(tmp_path / "empty.json", peers(shapes=[]))
    results.write(tmp_path / "p.json", peers())
    for name, why in {"v.json": "got validation", "empty.json": "no case", "none.json": "No such file"}.items():
        assert plots.main([str(tmp_path / name), "--out", str(tmp_path)]) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.main([str(tmp_path / "p.json"), "--out", str(tmp_path)]) == 2
    assert "pip install 'flashcore-attn[bench]'" in capsys.readouterr().err
    assert list(tmp_path.glob("*.png")) == []
