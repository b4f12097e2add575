"""Admission to a contest, and what a contestant that fails while it is timed costs the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.benchmark import contest
from flashcore.benchmark.peers import NotServedError, Peer, Prepared
from flashcore.benchmark.shapes import Shape
from flashcore.core.errors import UnsupportedError
from flashcore.measure import clocks

SHAPE = Shape(1, 2, 64, 32)


def peer(compute: Callable[[Tensor, Tensor, Tensor], Tensor], name: str = "p") -> Peer:
    return Peer(name, name, lambda shape, q, k, v: Prepared(lambda: compute(q, k, v)), install="pip install p")


def raising(error: Exception) -> Peer:
    def prepare(*_: Any) -> Prepared:
        raise error

    return Peer("p", "p", prepare, install="pip install p")


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def unwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = right(q, k, v).clone()
    out[0, 1, 63, 31] = float("nan")
    return out


@pytest.mark.parametrize(
    ("contestant", "status", "reason"),
    [
        (peer(right), "ok", ""),
        (peer(lambda q, k, v: right(q, k, v) * 1.01), "wrong", "frobenius"),
        (peer(unwritten), "wrong", "non_finite"),
        (peer(lambda q, k, v: right(q, k, v)[:, :1]), "failed", "ValueError"),
        (raising(ModuleNotFoundError("no p")), "missing", "pip install p"),
        (raising(NotServedError("odd lengths")), "refused", "odd lengths"),
        (raising(UnsupportedError("no kernel")), "refused", "no kernel"),
        (raising(RuntimeError("broken")), "failed", "RuntimeError: broken"),
    ],
)
def test_admission(contestant: Peer, status: str, reason: str) -> None:
    found = contest.admit(contestant, SHAPE, SHAPE.inputs("cpu"))
    assert found.status == status and reason in found.reason
    assert (found.prepared is not None) == (status == "ok")
    assert set(found.as_json(contestant)) == {"status", "reason", "version", "errors"}


def test_one_failure_leaves_the_others_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Shape.inputs
    monkeypatch.setattr(Shape, "inputs", lambda self, device="cpu", seed=42: inputs(self, "cpu", seed))

    def gpu_times(contestants: Any, replays: int, watch: Any) -> tuple[dict[str, list[float]], dict[str, int]]:
        for name, contestant in contestants.items():
            watch(name)
            for call in contestant.calls:
                call()
        us = {"flashcore": 2.0, "good": 3.0}
        return {name: [us[name]] * replays for name in contestants}, dict.fromkeys(contestants, 7)

    def breaks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("not inside a graph")

    monkeypatch.setattr(clocks, "gpu_times", gpu_times)
    heard: list[str] = []
    peers = {"flashcore": peer(right), "bad": peer(breaks), "good": peer(right)}
    timed, failed = contest.gpu_clock(peers, SHAPE, cold=True, l2_bytes=20_000, replays=4, watch=heard.append)
    assert failed == {"bad": "RuntimeError: not inside a graph"}
    assert list(timed) == ["flashcore", "good"] and heard[-1] == "good"
    assert timed["good"]["us"] == 3.0 and timed["good"]["over_flashcore"]["value"] == 1.5
    assert timed["good"]["sets"] * SHAPE.input_bytes > 60_000


def test_every_peer_is_known_by_its_name() -> None:
    from flashcore.benchmark import compare_peers
    from flashcore.benchmark.peers import ALL

    assert all(name == each.name for name, each in ALL.items())
    assert set(compare_peers.NAMES) == set(ALL)
