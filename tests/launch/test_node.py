"""The graph node in C++: when it is built and loaded, what is said of it. Its graphs: test_launcher_gradients.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore import diagnostics
from flashcore.core.target import A100
from flashcore.fast.planning import warmup
from flashcore.launch import node, shim


@pytest.fixture
def unused(monkeypatch, tmp_path) -> Path:
    """The node as a new process has it, on a machine that lacks nothing for it, with an empty cache: its folder."""
    for name, value in (("_attach", None), ("_looked", False), ("_failure", None)):
        monkeypatch.setattr(node, name, value)
    monkeypatch.delenv("FLASHCORE_NODE", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shim, "_missing", lambda: None)
    monkeypatch.setattr(shim, "_module", None)
    return tmp_path / "cache"


def put(content: bytes) -> None:
    node._cache().put(content, node._FILE, binary=True)


def test_a_plain_look_builds_nothing(unused, monkeypatch):
    monkeypatch.setattr(node, "_compile", lambda: pytest.fail("built without being asked for"))
    assert node.load() is False and node.load() is False
    assert not list(unused.rglob("*.so"))
    assert "gradients=True" in node.status() and diagnostics.collect()["node"] == node.status()


def test_a_cache_that_cannot_be_written_has_no_node_and_breaks_no_call(unused, monkeypatch):
    def refuse(key: str) -> None:
        raise OSError(30, "Read-only file system")

    unused.mkdir()
    monkeypatch.setattr("triton.runtime.cache.get_cache_manager", refuse)
    assert node.load() is False and node.status().startswith("not built")


def test_a_look_into_the_cache_makes_no_folder(unused):
    assert node.status().startswith("not built") and node.load() is False
    assert not unused.exists()


def test_a_node_that_was_built_is_found_by_a_later_process(unused, monkeypatch):
    served = []
    monkeypatch.setattr(node, "_import", lambda path: Path(path).read_bytes())
    monkeypatch.setattr(shim, "use_node", lambda attach: served.append(attach) or attach is not None)
    put(b"machine code")
    assert node.status().startswith("built;")
    assert node.load() and node.status() == "active" and served == [b"machine code"]
    with node.disabled():
        assert not node.load() and node.status() == "off: disabled for now"
    assert served[-1] == b"machine code"


def test_another_torch_has_a_node_of_its_own(unused, monkeypatch):
    put(b"machine code")
    assert node._found() is not None
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert node._found() is None


@pytest.mark.parametrize("how", ["variable", "no shim"])
def test_a_node_that_has_no_use_is_not_loaded_and_not_built(unused, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv("FLASHCORE_NODE", "0")
    else:
        monkeypatch.setattr(shim, "_missing", lambda: "others can write into the cache folder")
    monkeypatch.setattr(node, "_import", lambda path: pytest.fail("loaded"))
    put(b"machine code")
    assert node.load() is False
    why = "FLASHCORE_NODE=0" if how == "variable" else "others can write"
    assert node.status().startswith("off: ") and why in node.status()
    with pytest.raises(RuntimeError, match=why):
        node.build()


def test_what_a_machine_lacks_is_said_before_anything_is_compiled(unused, monkeypatch):
    monkeypatch.setattr(node, "_compiler", lambda: None)
    assert node.status() == "not built: no C++ compiler was found"
    with pytest.raises(RuntimeError, match="no C.. compiler"):
        warmup([(2, 4, 128, 64)], target=A100, gradients=True, progress=False)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(unused, monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'node.cpp:1: error: no memory left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="error: no memory left"):
        node.build()
    assert node._found() is None and node.load() is False


def test_a_damaged_file_warns_once_and_is_built_anew_on_request(unused, monkeypatch):
    put(b"no machine code")
    with pytest.warns(RuntimeWarning, match="graph node in C.. is off"):
        assert node.load() is False
    assert node.load() is False and node.status().startswith("off: ")
    monkeypatch.setattr(node, "_compile", lambda: put(b"machine code"))
    monkeypatch.setattr(node, "_import", lambda path: Path(path).read_bytes())
    node.build()
    assert node.status() == "active"


def test_warming_up_for_gradients_compiles_the_kernel_that_writes_lse_too(monkeypatch):
    asked = []
    monkeypatch.setattr(node, "build", lambda: asked.append("node"))
    (done,) = warmup([(2, 4, 128, 64)], target=A100, gradients=True, progress=False)
    assert asked == ["node"] and done.kernels == 2
    (done,) = warmup([(2, 4, 128, 64)], target=A100, gradients=True, return_lse=True, progress=False)
    assert done.kernels == 1


PROGRAM = """
import torch
from unittest import mock
from flashcore.fast.attention_production import attention
from flashcore.launch import node
from flashcore.security import fake_gpu

load = node.load
with fake_gpu.native() as native, fake_gpu.installed(native), mock.patch.object(node, "load", load):
    q = torch.randn(1, 2, 16, 16).half().requires_grad_()
    attention(q, q, q)
    found = attention(q, q, q).grad_fn
    assert found.name() == "AttentionBackward" and isinstance(found, torch.autograd.graph.Node)
    function = isinstance(found, torch.autograd.function.BackwardCFunction)
    print("a Function," if function else "a node,", node.status())
"""


@pytest.mark.usefixtures("attach")
@pytest.mark.parametrize("off", [False, True])
def test_a_process_that_nobody_told_uses_it(off):
    """Also what an imported torch thinks of the node's type, which the process must see for the first time."""
    environment: dict[str, Any] = {**os.environ, "FLASHCORE_NODE": "0" if off else ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "a Function, off: FLASHCORE_NODE=0" if off else "a node, active"
    assert done.stdout.strip() == said
