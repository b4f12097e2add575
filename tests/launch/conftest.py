"""Fixtures of the launch path: the fake GPU of flashcore/security/fake_gpu.py, by every path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flashcore.launch import launcher, node, shim, torch_private
from flashcore.security import fake_gpu


@pytest.fixture(params=["python", "shim", "node"])
def gpu(request: pytest.FixtureRequest) -> Iterator[fake_gpu.FakeGpu]:
    """The fake GPU, once for each of the three paths: Python, the shim, and the shim with the graph node in C++."""
    module = None if request.param == "python" else request.getfixturevalue("native")
    attach = request.getfixturevalue("attach") if request.param == "node" else None
    with fake_gpu.installed(module, attach) as fake:
        yield fake


@pytest.fixture(scope="session")
def attach() -> Any:
    """What the C++ node gives the shim to call, built where the cache has none; or a skip that says what is missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLASHCORE_NODE")
        if why := node._unfit() or (None if node._found() else node._missing()):
            pytest.skip(f"no node in C++: {why}")
    return node._attach or node._import(node._built(anew=False))


@pytest.fixture
def native() -> Iterator[Any]:
    """The C module, or a skip that says what this machine lacks. Tests give it their own functions to call."""
    with fake_gpu.native() as module:
        if module is None:
            pytest.skip(f"no compiled path: {shim._missing()}")
        yield module


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch without the private functions that the launch path prefers."""
    monkeypatch.setattr(torch_private, "_dynamo", None)
    monkeypatch.setattr(launcher, "guard", torch_private.documented_guard)
