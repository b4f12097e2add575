"""The graph node in C++: when it is built and loaded, what is said of it. Its graphs: test_launcher_gradients.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from flashcore import diagnostics
from flashcore.core.target import A100
from flashcore.fast.attention_production import attention
from flashcore.fast.planning import warmup
from flashcore.launch import compiled, node, shim
from flashcore.security import fake_gpu

LIMIT_S = 60  # for what takes seconds


@pytest.fixture
def unused(monkeypatch, tmp_path) -> Path:
    """The node as a new process has it, on a machine that lacks nothing for it, with an empty cache: its folder."""
    for name, value in (("_attach", None), ("_looked", False), ("_failure", None), ("_building", None)):
        monkeypatch.setattr(node, name, value)
    monkeypatch.delenv("FLASHCORE_NODE")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shim, "_missing", lambda: None)
    monkeypatch.setattr(shim, "_module", None)
    return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> Callable[[str], Path]:
    """Lets a script be the compiler: compiler(its commands). Gives the file that has the path of each output asked for.

    The script knows that path as $out.
    """

    def install(commands: str) -> Path:
        script, asked = tmp_path / "cc", tmp_path / "asked"
        asked.touch()
        script.write_text(
            f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout=$2\necho "$out" >> {asked}\n{commands}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        return asked

    return install


@pytest.fixture
def served(monkeypatch) -> list[Any]:
    """What the shim was given to call; a file that was built is its own content."""
    seen: list[Any] = []
    monkeypatch.setattr(node, "_import", lambda path: Path(path).read_bytes())
    monkeypatch.setattr(shim, "use_node", lambda attach: seen.append(attach) or attach is not None)
    return seen


WORKS = "printf 'machine code' > $out"
FAILS = "echo 'node.cpp:1: error: no memory left' >&2\nexit 1"


def put(content: bytes) -> None:
    node._cache().put(content, node._FILE, binary=True)


def finish() -> None:
    """Wait for a build that is under way."""
    if (building := node._building) is not None:
        building.join(LIMIT_S)
        assert not building.is_alive()


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def never() -> None:
    pytest.fail("a build was begun")


def test_a_plain_look_builds_nothing(unused, monkeypatch):
    monkeypatch.setattr(node, "_begin", never)
    assert node.status().startswith("not built yet;") and diagnostics.collect()["node"] == node.status()
    with node.disabled():
        assert node.load() is False
    assert not unused.exists()


def test_the_first_call_of_many_threads_begins_one_build_which_then_serves(unused, served, compiler, tmp_path):
    go = tmp_path / "go"
    asked = compiler(f"while [ ! -e {go} ]; do sleep 0.02; done\n{WORKS}")
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(node.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [False] * 8 and node.status() == "being built; autograd.Function serves meanwhile"
    go.touch()
    finish()
    assert node.status() == "active" and served[-1] == b"machine code"
    assert node.load() and len(asked.read_text().split()) == 1
    assert not Path(asked.read_text().strip()).parent.exists()


def test_who_asks_for_it_waits_for_the_build_that_is_under_way(unused, served, compiler):
    asked = compiler(f"sleep 0.5\n{WORKS}")
    assert not node.load()
    node.build()
    assert node.status() == "active" and len(asked.read_text().split()) == 1
    node.build()
    assert len(asked.read_text().split()) == 1


def test_a_call_seen_before_takes_the_node_once_it_is_there(native, attach, unused, compiler, monkeypatch, tmp_path):
    go = tmp_path / "go"
    compiler(f"while [ ! -e {go} ]; do sleep 0.02; done\n{WORKS}")
    monkeypatch.setattr(node, "_import", lambda path: attach)
    q = torch.randn(1, 2, 16, 16).half().requires_grad_()

    def function() -> bool:
        return isinstance(attention(q, q, q).grad_fn, torch.autograd.function.BackwardCFunction)

    with fake_gpu.installed(native), mock.patch.object(node, "load", LOAD):
        assert function() and function()
        go.touch()
        finish()
        assert node.status() == "active" and not function()


def test_a_build_that_fails_costs_no_call_anything_and_is_told(native, unused, compiler):
    asked = compiler(FAILS)
    q = torch.randn(1, 2, 16, 16).half().requires_grad_()
    with fake_gpu.installed(native), mock.patch.object(node, "load", LOAD):
        for _ in range(2):
            attention(q, q, q).sum().backward()
            finish()
    assert node.status() == "off: node.cpp:1: error: no memory left"
    assert len(asked.read_text().split()) == 1


PROCESS = """
import os, sys, time
from flashcore.launch import node, shim
shim._missing = lambda: None
node._import = lambda path: path
"""


def process(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROCESS + program], stdout=subprocess.PIPE, text=True)


def test_processes_that_start_together_run_one_compiler(unused, compiler):
    asked = compiler(f"sleep 2\n{WORKS}")
    started = [process("node.load(); node.build(); print(node.status())") for _ in range(2)]
    assert [each.communicate(timeout=LIMIT_S)[0].strip() for each in started] == ["active"] * 2
    assert len(asked.read_text().split()) == 1


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_process_that_ends_leaves_no_compiler_and_no_file(unused, compiler, tmp_path, how):
    running = tmp_path / "running"
    asked = compiler(f"touch $TMPDIR/half\nsleep 60 &\necho $$ $! > {running}.new; mv {running}.new {running}\nwait")
    until = "time.sleep(60)" if how == "killed" else f"while not os.path.exists({str(running)!r}): time.sleep(0.02)"
    parent = process(f"node.load()\n{until}")
    wait_for(running.exists, "no compiler was started")
    if how == "killed":
        parent.send_signal(signal.SIGKILL)
    assert parent.wait(LIMIT_S) == (-signal.SIGKILL if how == "killed" else 0)
    parent.communicate()

    def alive(pid: str) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        return False

    wait_for(lambda: not any(map(alive, running.read_text().split())), "the compiler runs on")
    folder = Path(asked.read_text().strip()).parent
    wait_for(lambda: not folder.exists(), "its folder is still there")
    assert not (tmp_path / "half").exists() and node._found() is None and not list(unused.rglob("tmp.*"))


def test_a_compiler_whose_process_comes_too_late_is_not_started(unused, compiler):
    asked = compiler(WORKS)
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-I", "-c", node._PROGRAM, str(gone.pid), *sys.path]
    assert subprocess.run(command, start_new_session=True).returncode == 1 and not asked.read_text()


def test_a_fork_has_no_build_and_begins_its_own(unused, compiler):
    compiler(f"sleep 1\n{WORKS}")
    done = process("""
node.load()
print(node.status(), flush=True)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(node.status())
node.load()
print(node.status())
node.build()
print(node.status())
""")
    said = done.communicate(timeout=LIMIT_S)[0].splitlines()
    assert done.returncode == 0 and [line.split(";")[0] for line in said] == [
        "being built", "not built yet", "being built", "active",
    ]  # fmt: skip


def test_forks_meanwhile_hold_nothing_up(unused, compiler):
    """A fork while a pipe is open holds it open, and who waits for the pipe's end would wait for the fork's."""
    compiler(WORKS)
    done = process(f"""
node.load()
forks = []
while len(forks) < 30:
    if not (child := os.fork()):
        time.sleep({LIMIT_S})
        os._exit(0)
    forks.append(child)
node.build()
print(node.status())
for child in forks:
    os.kill(child, 9)
""")
    assert done.communicate(timeout=LIMIT_S / 2)[0].strip() == "active"


def test_no_thread_no_node_and_no_harm(unused, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(node._Build, "start", refuse)
    assert node.load() is False and node.status() == "off: can't start new thread"


def test_a_cache_that_cannot_be_written_has_no_node_and_breaks_no_call(unused, monkeypatch, compiler, tmp_path):
    asked = compiler(WORKS)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert node.load() is False
    finish()
    assert node.status().startswith("off: NotADirectoryError") and not asked.read_text()


def test_a_cache_that_cannot_be_read_has_no_node(unused, monkeypatch):
    def refuse(key: str) -> None:
        raise OSError(30, "Read-only file system")

    unused.mkdir()
    monkeypatch.setattr("triton.runtime.cache.get_cache_manager", refuse)
    assert node._found() is None


def test_without_locks_each_process_builds(unused, served, monkeypatch, compiler):
    compiler(WORKS)
    monkeypatch.setattr(node.fcntl, "lockf", mock.Mock(side_effect=OSError(38, "Function not implemented")))
    node.build()
    assert node.status() == "active"


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_triton_that_builds_no_libraries_gives_a_reason(monkeypatch, tmp_path, how):
    if how == "gone":
        monkeypatch.delattr("triton.runtime.build._build")
    else:
        monkeypatch.setattr("triton.runtime.build._build", lambda name, source: source)
    with pytest.raises(RuntimeError, match="this Triton does not build libraries"):
        compiled.build_library(
            "x", tmp_path / "x.cpp", str(tmp_path), include_dirs=[], library_dirs=[], libraries=[], flags=[]
        )


def test_a_node_that_was_built_is_found_by_a_later_process(unused, served, monkeypatch):
    monkeypatch.setattr(node, "_begin", never)
    put(b"machine code")
    assert node.status().startswith("built;")
    assert node.load() and node.status() == "active" and served == [b"machine code"]
    with node.disabled():
        assert not node.load() and node.status() == "off: disabled for now"
    assert served[-1] == b"machine code"


def test_compiled_autograd_is_noticed():
    from torch._dynamo import config

    assert not node.compiled_autograd()
    with config.patch(compiled_autograd=True):
        assert node.compiled_autograd()


def test_another_torch_has_a_node_of_its_own(unused, monkeypatch):
    put(b"machine code")
    assert node._found() is not None
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert node._found() is None


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("variable", "FLASHCORE_NODE=0"), ("no shim", "others can write"),
        ("compiled autograd", "compiled autograd is on"),
    ],
)  # fmt: skip
def test_a_node_that_has_no_use_is_not_loaded_and_not_built(unused, monkeypatch, how, why):
    if how == "variable":
        monkeypatch.setenv("FLASHCORE_NODE", "0")
    elif how == "compiled autograd":
        monkeypatch.setattr(node, "compiled_autograd", lambda: True)
    else:
        monkeypatch.setattr(shim, "_missing", lambda: "others can write into the cache folder")
    monkeypatch.setattr(node, "_import", lambda path: pytest.fail("loaded"))
    monkeypatch.setattr(node, "_begin", never)
    assert node.load() is False
    node._looked = False
    put(b"machine code")
    assert node.load() is False
    assert node.status().startswith("off: ") and why in node.status()
    with pytest.raises(RuntimeError, match=why):
        node.build()


@pytest.mark.parametrize(
    ("where", "name", "value", "why"),
    [
        (node, "_HEADER", "nowhere.h", "this torch comes without its headers"),
        (sys, "executable", "/opt/app/frozen", "it takes a Python of its own, and this one is /opt/app/frozen"),
    ],
)
def test_what_a_machine_lacks_is_said_before_anything_is_begun(unused, monkeypatch, where, name, value, why):
    monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(node, "_begin", never)
    assert node.load() is False and node.status() == f"not built: {why}"
    with pytest.raises(RuntimeError, match=why):
        warmup([(2, 4, 128, 64)], target=A100, gradients=True, progress=False)


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        (FAILS, "error: no memory left"),
        ("echo 'warning: old' >&2\necho '/usr/bin/ld: cannot find -lc10' >&2\nexit 1", "ld: cannot find -lc10"),
        ("exit 3", "cc ended with status 3"),
        ("kill -9 $PPID", "ended with status -9"),
        ("exit 0", "FileNotFoundError"),
    ],
)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(unused, compiler, commands, said):
    asked = compiler(commands)
    with pytest.raises(RuntimeError, match=said):
        node.build()
    assert node._found() is None and node.load() is False
    assert not Path(asked.read_text().strip()).parent.exists() or "kill" in commands


def test_a_build_that_failed_is_begun_anew_on_request_alone(unused, served, compiler):
    asked = compiler(FAILS)
    assert not node.load()
    finish()
    compiler(WORKS)
    assert not node.load() and node.status().startswith("off: ") and len(asked.read_text().split()) == 1
    node.build()
    assert node.status() == "active" and len(asked.read_text().split()) == 2


def test_a_damaged_file_warns_once_and_is_built_anew_on_request(unused, compiler, monkeypatch):
    put(b"no machine code")
    with pytest.warns(RuntimeWarning, match="graph node in C.. is off"):
        assert node.load() is False
    assert node.load() is False and node.status().startswith("off: ")
    compiler(WORKS)
    monkeypatch.setattr(node, "_import", lambda path: Path(path).read_bytes())
    node.build()
    assert node.status() == "active" and node._attach == b"machine code"


def test_warming_up_for_gradients_compiles_the_kernel_that_writes_lse_too(monkeypatch):
    asked = []
    monkeypatch.setattr(node, "build", lambda: asked.append("node"))
    (done,) = warmup([(2, 4, 128, 64)], target=A100, gradients=True, progress=False)
    assert asked == ["node"] and done.kernels == 2
    (done,) = warmup([(2, 4, 128, 64)], target=A100, gradients=True, return_lse=True, progress=False)
    assert done.kernels == 1


LOAD = node.load  # the fake GPU has another
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
