from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.benchmark import compare_peers, contest, peers_text, results
from flashcore.benchmark.isolation import Journal, Writer
from flashcore.benchmark.peers import ALL, Peer, Prepared
from flashcore.benchmark.shapes import NINE, SUITES, Shape
from flashcore.measure import ceilings, clocks, machine, second_opinion
from tests.benchmark import records

PEERS = ("--peers", "sdpa-cudnn", "triton-plain", "fa4", "flex")  # those of the made-up record


def text_of(record: dict[str, Any]) -> str:
    lines = [line for case in record["cases"] for line in peers_text.rows(case, record["protocol"], record["ceilings"])]
    return "\n".join([*peers_text.head(record["protocol"]), *lines, *peers_text.rest(record)])


def test_rows_name_the_best_peer_and_the_ratio() -> None:
    text = text_of(records.peers())
    row = next(line for line in text.splitlines() if line.startswith("S128 B16"))
    assert row.split()[2:] == [
        "gpu", "warm", "10.00", "16.00", "15.00", "-", "20.00", "1.50x", "54", "17%", "triton-plain"
    ]
    assert "gpu warm: the best peer takes 1.500x as long (geometric mean over 9; 1.50x to 1.50x" in text
    assert "fa4: missing (everywhere): pip install it" in text
    assert "flex: failed (S128 B8): RuntimeError: no" in text


def test_who_is_left_out_is_told_briefly() -> None:
    record = records.peers()
    for case in record["cases"][1:7]:
        case["contestants"]["flex"] = {"status": "refused", "reason": "no mask", "version": "9", "errors": {}}
    record["cases"][0]["contestants"]["fa4"] |= {"status": "refused", "reason": "no bias"}
    assert list(peers_text.left_out(record)) == [
        "fa4: missing (everywhere): pip install it",
        "flex: failed (S128 B8): RuntimeError: no",
        "flex: refused (S128 B16, S128 B32, S256 B8, S256 B16 and 2 more): no mask",
    ]


def test_a_failure_of_ours_has_no_ratio_and_no_pass() -> None:
    record = records.peers()
    assert peers_text.passed(record)
    record["cases"][0]["contestants"]["flashcore"] = {"status": "wrong", "reason": "off", "version": "", "errors": {}}
    assert not peers_text.passed(record)
    assert peers_text.tflops(record["cases"][0]) is None
    assert "flashcore: wrong (S128 B8): off" in text_of(record)


def test_our_own_kernels_are_no_peers() -> None:
    case = records.peers()["cases"][0]
    case["contestants"]["flashcore-portable"] = records.ok(**records.gpu({"gpu_warm": 1.0}))
    assert peers_text.best_peer(case) == "triton-plain"


def options(*argv: str) -> argparse.Namespace:
    return compare_peers._options(argv)


def test_arguments() -> None:
    assert compare_peers._shapes(options()) == NINE
    assert compare_peers._shapes(options("--suite", "nine", "mid", "nine")) == [*NINE, *SUITES["mid"]]
    own = options("--shape", "4,8,100,64", "--causal", "--dtype", "bfloat16")
    assert compare_peers._shapes(own) == [Shape(4, 8, 100, 64, True, "bfloat16")]
    features = ("--bias", "batch", "--window", "8", "-1", "--heads-kv", "2")
    featured = options("--shape", "4,8,100,64", "2,8,64,64", *features)
    assert compare_peers._shapes(featured) == [
        Shape(b, 8, s, 64, heads_kv=2, window=(8, -1), bias=b) for b, s in ((4, 100), (2, 64))
    ]
    model = options("--from-model", "vit-base-patch16-224", "--batch", "3", "--dtype", "bfloat16")
    assert compare_peers._shapes(model) == [Shape(3, 12, 197, 64, dtype="bfloat16")]
    assert options("--peers", "fa4", "flex", "fa4").peers == ["fa4", "flex"]
    assert compare_peers._clocks(options()) == ["gpu_warm"]
    assert compare_peers._clocks(options("--clock", "call", "--cold")) == ["call"]
    assert compare_peers._clocks(options("--clock", "all", "--cold")) == ["gpu_warm", "gpu_cold", "call", "host"]
    assert compare_peers._clocks(options("--alone")) == ["gpu_warm", "gpu_alone"]
    assert options("--cross-check").cross_check == "flashcore"
    for bad in (["--shape", "1,2,3"], ["--shape", "1,2,0,4"], ["--suite", "ten"], ["--peers", "nobody"]):
        with pytest.raises(SystemExit):
            options(*bad)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert compare_peers.main([]) == 1 and "none here" in capsys.readouterr().err


def test_misuse_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_peers.main(["--shape", "4,8,100,64", "--causal", "--window", "4", "0"]) == 2
    assert "flashcore bench: window: " in capsys.readouterr().err
    for stray in (["--bias", "one"], ["--from-model", "t5-base", "--causal"], ["--dtype", "bfloat16"]):
        assert compare_peers.main(stray) == 2
        assert "for your own shapes" in capsys.readouterr().err
    assert compare_peers.main(["--from-model", "/nowhere"]) == 2
    said = capsys.readouterr().err  # with transformers or without
    assert said.startswith("flashcore bench: --from-model: ") and "'/nowhere'" in said


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker runs here: inputs on the CPU, and stand-ins for what measures a GPU."""
    inputs = Shape.inputs
    monkeypatch.setattr(Shape, "inputs", lambda self, device="cpu", seed=42: inputs(self, "cpu", seed))
    monkeypatch.setattr(machine, "environment", lambda: records.environment())
    monkeypatch.setattr(ceilings, "ceilings", lambda l2: records.peers()["ceilings"])
    monkeypatch.setattr(clocks, "gpu_times", lambda c, **_: ({n: [3.0, 3.1] for n in c}, dict.fromkeys(c, 9)))
    monkeypatch.setattr(clocks, "alone_times", lambda c, **_: ({n: [4.0, 4.2] for n in c}, dict.fromkeys(c, 9)))


def test_a_worker_on_every_clock(on_a_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The worker's own code on a CPU: the clocks are stand-ins, and what it writes makes a record."""
    monkeypatch.setattr(clocks, "event_floor", lambda trials: [11.0] * trials)
    monkeypatch.setattr(clocks, "call_times", lambda c, **_: {n: [30.0, 31.0] for n in c})
    monkeypatch.setattr(clocks, "host_times", lambda c, **_: {n: [20.0, 21.0] for n in c})
    monkeypatch.setattr(second_opinion, "cross_check", lambda contestant: {"tool": "t", "us": 3.0})
    asked = options("--shape", "2,2,24,16", "--peers", "sdpa", "triton-plain", "--clock", "all", "--cold",
                    "--alone", "--cross-check", "sdpa", "--lengths", "padded", "--trials", "5")  # fmt: skip
    path = tmp_path / "journal"
    compare_peers.measure(compare_peers._shapes(asked), asked, path)
    journal = Journal.read(path)
    assert journal.facts["event_floor_us"]["p50"] == 11.0
    (case,) = journal.cases.values()
    assert journal.facts["cross_check"] == {"contestant": "sdpa", "case": case["case"], "tool": "t", "us": 3.0}
    for name in ("flashcore", "sdpa"):
        found = case["contestants"][name]
        assert found["status"] == "ok" and found["gpu_warm"]["us"] == pytest.approx(3.05)
        assert {"gpu_cold", "call", "host"} <= set(found) and found["host"]["p50"] == 20.5
        assert found["gpu_alone"]["us"] == pytest.approx(4.1) and len(found["gpu_alone"]["rounds"]) == 2
        assert found["call"]["over_flashcore"]["value"] == 1.0
    assert case["contestants"]["triton-plain"]["status"] == "refused" and case["seconds"] > 0
    protocol = {"name": " + ".join(peers_text.CLOCKS.values()), "contestants": ["flashcore", *asked.peers]}
    rows = list(peers_text.rows(case, protocol, records.peers()["ceilings"]))
    assert [row[29:38].strip() for row in rows] == ["gpu warm", "gpu cold", "gpu alone", "call", "host"]
    assert peers_text.figure(case, "sdpa", "host") == 20.5 and peers_text.tflops(case, "call") is None
    Writer(path)(fault=["S24 B2 H2 D16 padded", "call", "hung"])
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if '"case"' not in line)
    path.write_text(text)
    compare_peers.measure(compare_peers._shapes(asked), asked, path)  # taken up again: the clock that hung is left out
    (case,) = Journal.read(path).cases.values()
    assert "call" not in case["contestants"]["sdpa"] and "host" in case["contestants"]["sdpa"]


def test_who_serves_one_feature_alone_enters_no_other_contest(on_a_cpu: None, tmp_path: Path) -> None:
    for lengths, entered in ((["--lengths", "padded"], True), ([], False)):
        path = tmp_path / f"journal{entered}"
        asked = options("--shape", "2,2,24,16", "--peers", "sdpa", "sdpa-cudnn-square", *lengths)
        compare_peers.measure(compare_peers._shapes(asked), asked, path)
        (case,) = Journal.read(path).cases.values()
        assert ("sdpa-cudnn-square" in case["contestants"]) == entered
        assert peers_text.figure(case, "sdpa-cudnn-square") is None
        assert peers_text.best_peer(case) == "sdpa"


def test_a_cross_check_that_says_nothing_says_why(
    on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_opinion, "cross_check", lambda contestant: pytest.fail("nothing was admitted"))

    def of(path: Path, name: str) -> str:
        asked = options("--shape", "2,2,24,16", "--peers", "sdpa", "--lengths", "padded", "--cross-check", name)
        compare_peers.measure(compare_peers._shapes(asked), asked, path)
        journal = Journal.read(path)
        assert len(journal.cases) == 1
        record = records.peers() | {"cross_check": journal.facts["cross_check"]}
        said = next(line for line in peers_text.rest(record) if line.startswith("cross-check: "))
        what, _, reason = said.partition(": none: ")
        assert what == f"cross-check: {name} on S24 B2 H2 D16 padded"
        return reason

    assert of(tmp_path / "refused", "triton-plain").startswith("refused: a plain kernel")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert of(tmp_path / "missing", "fa4").startswith("missing: pip install")
    path = tmp_path / "hung"
    Writer(path)(fault=["cross-check", contest.OTHER_CLOCK, "no progress for 150 s"])
    assert of(path, "sdpa") == "no progress for 150 s"
    assert Journal.read(path).blamed("S24 B2 H2 D16 padded", "sdpa") is None


def test_memory_is_told() -> None:
    record = records.peers()
    for case, held in zip(record["cases"], range(9), strict=True):
        case["contestants"]["flashcore"]["memory_bytes"] = held * 2**20
    assert "memory of a call beyond its inputs, at most: flashcore 8.0 MiB" in text_of(record)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for the worker process: it finishes the cases that the journal lacks, two of them at a time."""
    started: list[list[str]] = []
    cases = {case["case"]: case for case in records.peers()["cases"]}

    def supervise(command: list[str], path: Path, **arguments: Any) -> bool:
        started.append(command)
        write = Writer(path)
        write(environment=records.environment())
        left = [label for label in cases if label not in Journal.read(path).cases]
        for label in left[:5]:
            write(**cases[label])
            arguments["heard"](cases[label])
        return len(left) <= 5

    monkeypatch.setattr(compare_peers, "supervise", supervise)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return started


def test_an_interrupted_run_is_taken_up_again(worker: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "nine.json"
    command = ["--json", str(path), "--html", str(tmp_path / "p.html"), "--cold", *PEERS]
    assert compare_peers.main(command) == 1
    assert len(results.read(path)["cases"]) == 5 and not results.read(path)["complete"]
    assert path.with_suffix(".journal").exists()
    assert compare_peers.main(command) == 0
    record = results.read(path)
    assert record["complete"] and len(record["cases"]) == 9 and record["suite"] == "nine"
    assert not path.with_suffix(".journal").exists()
    assert (tmp_path / "p.html").read_text().count("<tr>") == 2 * (1 + 9)
    assert worker[0][-2:] == ["--worker", str(path.with_suffix(".journal"))]


def test_a_page_of_ones_own_shapes(worker: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    shapes = [f"{s.batch},{s.heads},{s.seqlen},{s.head_dim}" for s in NINE]
    command = ["--shape", *shapes, "--json", str(path), "--html", str(tmp_path / "p.html"), *PEERS]
    assert compare_peers.main(command) == 1 and compare_peers.main(command) == 0
    record = results.read(path)
    assert record["complete"] and record["suite"] == "own" and record["suites"] == {}
    text = (tmp_path / "p.html").read_text()
    assert "<h2 class=first>Your shapes</h2>" in text and text.count("<tr>") == 1 + 9
    assert peers_text.of_suite(record, "own") is not None and peers_text.of_suite(record, "nine") is None


def test_another_run_starts_from_the_beginning(worker: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "nine.json"
    compare_peers.main(["--json", str(path), *PEERS])
    compare_peers.main(["--json", str(path), *PEERS, "--replays", "9"])
    assert len(results.read(path)["cases"]) == 5


def test_shapes() -> None:
    assert [(s.seqlen, s.batch) for s in NINE] == [(s, b) for s in (128, 256, 512) for b in (8, 16, 32)]
    assert NINE[0].label == "S128 B8" and NINE[0].flops == 4 * 8 * 8 * 128 * 128 * 64
    assert Shape(1, 32, 4, 128, True, "bfloat16", 8).label == "S4 B1 H32 KV8 D128 causal bfloat16"
    assert Shape(1, 1, 4, 8, True).flops == 4 * 10 * 8
    assert Shape(2, 4, 16, 8, heads_kv=2).input_bytes == 2 * 16 * 8 * 2 * (4 + 2 + 2)
    assert all(s.batch * s.seqlen == 16384 and s.heads * s.head_dim == 2048 for s in SUITES["long"])
    for suite in SUITES.values():
        assert len({shape.label for shape in suite}) == len(suite)
    json.dumps([shape.as_json() for shape in NINE])


def test_shapes_with_features() -> None:
    packed, padded = (Shape(32, 12, 256, 64, lengths=kind) for kind in ("packed", "padded"))
    assert packed.sequence_lengths == padded.sequence_lengths and min(packed.sequence_lengths) >= 64
    assert max(packed.sequence_lengths) <= 256 and len(set(packed.sequence_lengths)) > 10
    assert packed.scores == padded.scores == sum(n * n for n in packed.sequence_lengths)
    assert packed.input_bytes == 3 * packed.output_bytes == 3 * sum(packed.sequence_lengths) * 12 * 64 * 2
    assert Shape(2, 2, 8, 8, bias=2).input_bytes == 2 * (3 * 2 * 2 * 8 * 8 + 2 * 2 * 8 * 8)
    assert Shape(1, 1, 5, 8, window=(1, 0)).scores == 1 + 2 * 4 and Shape(1, 1, 5, 8, window=(1, 1)).scores == 13
    assert Shape(1, 1, 5, 8, window=(-1, 0)).scores == Shape(1, 1, 5, 8, True).scores == 15
    assert Shape(2, 8, 64, 64, bias=1, softcap=5.0).label == "S64 B2 softcap5 bias1"
    assert Shape(2, 8, 64, 64, window=(32, -1)).label == "S64 B2 window32,-1" and padded.label.endswith("H12 padded")
    for shape in (packed, Shape(2, 8, 64, 64, window=(32, 0)), Shape(2, 8, 64, 64, bias=2)):
        assert Shape(**json.loads(json.dumps(shape.as_json()))) == shape
    for wrong in ({"bias": 3}, {"lengths": "ragged"}, {"is_causal": True, "window": (4, 0)},
                  {"is_causal": True, "lengths": "padded"}, {"bias": 1, "lengths": "packed"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"^(bias|lengths|window): "):
            Shape(2, 8, 64, 64, **wrong)  # type: ignore[arg-type]


def test_packing_is_undone() -> None:
    shape = Shape(3, 2, 16, 8, lengths="packed")
    q = shape.inputs("cpu")[0]
    packed = shape.pack(q)
    assert packed.shape == (sum(shape.sequence_lengths), 2, 8) and packed.is_contiguous()
    starts = shape.cu_seqlens(q.device).tolist()
    assert starts[-1] == len(packed)
    assert torch.equal(packed[starts[1] : starts[2]], q[1, :, : shape.sequence_lengths[1]].transpose(0, 1))
    used = shape.in_use(q.device)[:, None, :, None]
    assert torch.equal(shape.unpack(packed), q.masked_fill(~used, 0.0))


def test_one_record_of_several_suites() -> None:
    shapes = list(dict.fromkeys([*SUITES["padded"], *SUITES["odd"]]))
    record = records.peers("padded odd", shapes) | {"suites": {"padded": True, "odd": False}}
    for case in record["cases"]:
        case["suites"] = [name for name in ("padded", "odd") if Shape(**case["shape"]) in SUITES[name]]
    padded, odd = (peers_text.of_suite(record, name) for name in ("padded", "odd"))
    assert padded and odd and peers_text.of_suite(record, "nine") is None
    assert [Shape(**case["shape"]) for case in padded["cases"]] == SUITES["padded"]
    assert [Shape(**case["shape"]) for case in odd["cases"]] == SUITES["odd"]  # 256 stands in both
    assert padded["complete"] and not odd["complete"]
    whole = records.peers("nine", [])
    assert peers_text.of_suite(whole, "nine") is whole


def test_comparisons_across_cases() -> None:
    record = records.peers("padded varlen odd", [*SUITES["padded"], *SUITES["varlen"], *SUITES["odd"][:2]])
    found = {(beside.shape.label, beside.other.label): beside for beside in peers_text.across(record)}
    assert len(found) == 5
    for kind in ("padded", "packed"):
        beside = found[f"S256 B32 H12 {kind}", "S256 B32 H12"]
        assert beside.ratio == pytest.approx(1.5) and beside.what.startswith("triton-plain on the padded batch")
    odd = found["S197 B32 H12", "S256 B32 H12"]
    assert odd.ratio == pytest.approx((256 / 197) ** 2)  # all made-up calls take equally long
    text = text_of(record)
    line = next(line for line in text.splitlines() if line.startswith("S197 B32 H12: time per score"))
    assert line.endswith("that of S256 B32 H12: 1.69x (bar 1.15x; whole tiles of 64 rows alone: 1.30x, computed)")


def test_padded_batches_are_compared_form_by_form() -> None:
    names = ["sdpa-cudnn", "sdpa-efficient", "sdpa-cudnn-square", "sdpa-efficient-square", "flex", "fa4"]
    record = records.peers("padded", SUITES["padded"])
    timed = records.gpu({"flashcore": 10.0, **{name: 20.0 + i for i, name in enumerate(names)}})
    record["cases"][0]["contestants"] = {name: records.ok(gpu_warm=timing) for name, timing in timed.items()}
    for case in record["cases"][1:]:
        case["contestants"] = {"flashcore": records.ok(gpu_warm=timed["flashcore"])}
    assert list(peers_text.by_form(record)) == [
        f"S256 B32 H12 padded: {name} with {form} / FlashCore with key counts: {ratio:.2f}x"
        for name, form, ratio in (
            ("sdpa-cudnn", "a mask [B, 1, 1, S]", 2.0), ("sdpa-cudnn-square", "a mask [B, 1, S, S]", 2.2),
            ("flex", "a block mask", 2.4), ("fa4", "key counts", 2.5),
        )
    ]  # fmt: skip
    assert "S256 B32 H12 padded: fa4 with key counts / FlashCore with key counts: 2.50x" in text_of(record)


def test_compiling_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write = f"import sys, time; open({str(log)!r}, 'a').write(sys.argv[-1] + ' ')"
    script = f"{write}; time.sleep(60 * ('hang' in sys.argv))"
    took = compare_peers._compile_in_processes([sys.executable, "-c", script], 2, 60.0)
    assert sorted(log.read_text().split()) == ["0/2", "1/2"] and took < 30
    took = compare_peers._compile_in_processes([sys.executable, "-c", script, "hang"], 2, 1.0)
    assert took < 10
    assert compare_peers._compile_in_processes(["nobody"], 0, 1.0) < 1

    called: list[str] = []

    def peer(name: str, fails: bool) -> Peer:
        def call() -> None:
            called.append(name)
            assert not fails

        return Peer(name, name, lambda *_: Prepared(call), refuses={"gqa": "no"} if name == "triton-plain" else {})

    inputs = Shape.inputs
    monkeypatch.setattr(Shape, "inputs", lambda self: inputs(self, "cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("flashcore", "flex", "triton-plain", "sdpa-cudnn"):
        monkeypatch.setitem(ALL, name, peer(name, fails=name == "flashcore"))
    shapes = [Shape(1, 2, 8, 8, heads_kv=1), Shape(1, 2, 16, 8)]
    compare_peers.compile_ahead(shapes, ["flex", "sdpa-cudnn", "triton-plain"])
    assert called == ["flashcore", "flashcore", "triton-plain", "flex", "flex"]
    assert options("--compile", "3/8").compile == (3, 8)


def test_inputs_are_the_same_for_the_same_seed() -> None:
    shape = Shape(1, 4, 8, 16, heads_kv=2)
    first, again, other = shape.inputs("cpu"), shape.inputs("cpu"), shape.inputs("cpu", seed=7)
    assert [t.shape[1] for t in first] == [4, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[1], first[2])


@pytest.mark.gpu
def test_suites_together_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    command = ["--suite", "varlen", "padded", "--peers", "sdpa-cudnn", "varlen", "--replays", "5", "--jobs", "4"]
    assert compare_peers.main([*command, "--json", str(path)]) == 0
    record = results.read(path)
    assert record["suites"] == {"varlen": True, "padded": True} and len(record["cases"]) == 6
    assert len(peers_text.across(record)) == 4
    by_label = {case["case"]: case["contestants"] for case in record["cases"]}
    assert by_label["S256 B32 H12 packed"]["varlen"]["status"] == "ok"
    assert by_label["S256 B32 H12 padded"]["sdpa-cudnn"]["status"] == "ok"


@pytest.mark.gpu
def test_compare_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    peers = ["sdpa-flash", "sdpa-cudnn", "triton-plain", "flex"]
    assert compare_peers.main(["--shape", "8,8,128,64", "--peers", *peers, "--cold", "--json", str(path)]) == 0
    (case,) = results.read(path)["cases"]
    assert {name: found["status"] for name, found in case["contestants"].items()} == dict.fromkeys(
        ["flashcore", *peers], "ok"
    )
    assert all(found["gpu_warm"]["us"] < found["gpu_cold"]["us"] * 1.1 for found in case["contestants"].values())
