"""Fixtures of the launch path: the fake GPU of flashcore/security/fake_gpu.py, by both paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flashcore.launch import launcher, shim, torch_private
from flashcore.security import fake_gpu


@pytest.fixture(params=["python", "shim"])
def gpu(request: pytest.FixtureRequest) -> Iterator[fake_gpu.FakeGpu]:
    """The fake GPU, once for each of the two paths."""
    module = None if request.param == "python" else request.getfixturevalue("native")
    with fake_gpu.installed(module) as fake:
        yield fake


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
