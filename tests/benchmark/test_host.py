"""The host benchmark's contestants and text; measuring itself needs a GPU."""

from __future__ import annotations

import json
import time

import pytest
import torch

from flashcore.benchmark import host
from flashcore.benchmark.peers import Peer, Prepared


def scripted(name: str, seconds: float, wrong: bool = False) -> Peer:
    def prepare(shape, q, k, v):
        def call():
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                pass
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return out * 1.5 if wrong else out

        return Prepared(call)

    return Peer(name, name.upper(), prepare)


def unavailable(error: Exception) -> Peer:
    def prepare(shape, q, k, v):
        raise error

    return Peer("absent", "ABSENT", prepare, install="pip install absent")


@pytest.fixture
def on_cpu(monkeypatch):
    inputs = host.Shape(1, 2, 16, 16).inputs("cpu")
    monkeypatch.setattr(host.Shape, "inputs", lambda self: inputs)
    monkeypatch.setattr(host.clocks.Cuda, "synchronize", lambda self: None)


def test_a_table_has_times_for_what_is_right_and_reasons_for_the_rest(on_cpu, monkeypatch):
    contestants = {
        "sdpa": scripted("sdpa", 4e-3),
        "flashcore": scripted("flashcore", 1e-3),
        "wrong": scripted("wrong", 0, wrong=True),
        "absent": unavailable(ImportError("absent")),
        "refusing": unavailable(host.NotServedError("it would rather not")),
        "broken": unavailable(RuntimeError("it fell over")),
    }
    monkeypatch.setattr(host, "CONTESTANTS", contestants)
    monkeypatch.setattr(host, "WITH_GRADIENTS", list(contestants))
    told = []
    case = host.measure(False, blocks=5, calls=5, advance=told.append)
    found = case["contestants"]
    assert {name: each["status"] for name, each in found.items()} == {
        "sdpa": "ok", "flashcore": "ok", "wrong": "wrong", "absent": "missing", "refusing": "refused",
        "broken": "failed",
    }  # fmt: skip
    assert [name for name, each in found.items() if "host" in each] == ["sdpa", "flashcore"]
    assert found["sdpa"]["over_sdpa"]["value"] == 1.0
    assert 0 < found["flashcore"]["over_sdpa"]["value"] < 1
    assert found["flashcore"]["host"]["min"] <= found["flashcore"]["host"]["p50"] <= found["flashcore"]["host"]["p99"]
    text = "\n".join(host.table(json.loads(json.dumps(case))))
    assert "pip install absent" in text and "it fell over" in text and "FLASHCORE" in text
    assert len(told) == 2


def test_an_output_without_a_gradient_is_not_timed_where_gradients_are_wanted(on_cpu, monkeypatch):
    def prepare(shape, q, k, v):
        attend = torch.nn.functional.scaled_dot_product_attention
        return Prepared(lambda: attend(q.detach(), k.detach(), v.detach()))

    contestants = {"sdpa": scripted("sdpa", 0), "dropping": Peer("dropping", "DROPPING", prepare)}
    monkeypatch.setattr(host, "CONTESTANTS", contestants)
    monkeypatch.setattr(host, "WITH_GRADIENTS", list(contestants))
    found = host.measure(True, blocks=2, calls=2, advance=lambda n: None)["contestants"]
    assert found["sdpa"]["status"] == "ok"
    assert found["dropping"]["status"] == "refused" and "host" not in found["dropping"]


def test_gradients_are_timed_with_the_node_in_the_default_row_and_without_it_beside(on_cpu, monkeypatch):
    inputs = [t.requires_grad_() for t in host.SHAPE.inputs()]
    monkeypatch.setattr(host.shim, "load", lambda: True)
    waited = []
    monkeypatch.setattr(host.node, "build", lambda: waited.append("build"))
    default, function = (host.CONTESTANTS[name] for name in ("flashcore", host.FUNCTION))
    assert {"flashcore", host.FUNCTION} <= set(host.WITH_GRADIENTS)
    with default.prepare(host.SHAPE, *inputs).context():
        assert waited == ["build"] and not host.node._off
    with function.prepare(host.SHAPE, *inputs).context():
        assert waited == ["build"] and host.node._off
    default.prepare(host.SHAPE, *(t.detach() for t in inputs))
    assert waited == ["build"]

    def refuse() -> None:
        raise RuntimeError("no headers")

    monkeypatch.setattr(host.node, "build", refuse)
    with pytest.raises(host.NotServedError, match="no headers"):
        default.prepare(host.SHAPE, *inputs)


def test_the_other_figures_as_text():
    timing = {"us": 3.5, "over_kernel": {"value": 1.01, "low": 1.0, "high": 1.02}}
    record = {
        "replay": {"call": timing, "allocating call": timing, "kernel": {**timing, "us": 3.4}},
        "first_calls": {"cold": {"process": 1.25, "kernel": 0.5}, "warm": {"failed": "TimeoutExpired"}},
    }
    text = "\n".join(host.rest(record))
    assert "kernel 3.40 us" in text and "1.010x" in text and "process 1.250 s" in text and "TimeoutExpired" in text


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host.main([]) == 1
    assert "no" in capsys.readouterr().err


@pytest.mark.gpu
def test_it_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.delenv("FLASHCORE_NODE")
    assert host.main(["--blocks", "5", "--calls", "50", "--json", str(tmp_path / "host.json")]) == 0
    record = json.loads((tmp_path / "host.json").read_text())
    for case in record["cases"]:
        for name in ("flashcore-python", "sdpa"):
            assert case["contestants"][name]["status"] == "ok"
    assert record["first_calls"]["warm"]["process"] > 0
