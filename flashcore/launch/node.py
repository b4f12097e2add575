"""The graph node of calls with gradients in C++: _node.cpp, built in the background and used from then on.

A call that requires grad then costs the host less than by torch.autograd.Function, which serves until there is a node
and where there can be none. Torch's headers keep a compiler busy for some ten seconds, too long for a first call. So
the first call that needs gradients begins the build in a process of its own, which puts it into Triton's cache, where
later processes find it; `build` waits for it. FLASHCORE_NODE=0 turns all of it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flashcore.launch import compiled, shim
from flashcore.launch.torch_private import compiled_autograd

if sys.platform != "win32":
    import fcntl

_NAME = "_flashcore_node"
_FILE = _NAME + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
_SOURCE = Path(__file__).with_name("_node.cpp")
_HEADER = "torch/csrc/autograd/python_cpp_function.h"
_LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10", "stdc++")  # the compiler may be one for C
_FLAGS = ("-std=c++20", "-O2", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
# -I and the path given: the process finds the modules that this one has, and none in the current folder.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from flashcore.launch import node; node._compile(int(sys.argv[1]))"
_PR_SET_PDEATHSIG = 1

_attach: Any = None  # what the shim calls, once it is loaded
_looked = False  # whether the cache was looked into
_building: _Build | None = None  # while it is under way
_off = False  # inside `disabled`
_failure: str | None = None  # why there is none: a build failed, or what it left could not be loaded
_lock = threading.RLock()  # held by whoever changes these, and by a fork


def status() -> str:
    """One line for `flashcore info`: active, or what to do, or why not."""
    if _off:
        return "off: disabled for now"
    if _building is not None:
        return "being built; autograd.Function serves meanwhile"
    unfit = _failure or _unfit()
    if unfit:
        return f"off: {unfit}"
    if _attach is not None:
        return "active"
    if _found() is not None:
        return "built; loaded at the first call that needs gradients"
    missing = _missing()
    return f"not built: {missing}" if missing else "not built yet; the first call that needs gradients begins it"


def load() -> bool:
    """Let the shim use the node if one was built, or begin to build it. Returns whether the shim uses one.

    Waits for nothing, and costs nothing when repeated.
    """
    global _attach, _looked, _failure
    if not _looked and not _off:
        with _lock:
            if not _looked and _unfit() is None:
                if (path := _found()) is not None:
                    try:
                        _attach = _import(path)
                    except Exception as error:  # whatever a loader may say of a file that is damaged
                        _failure = _line(error)
                        warning = f"flashcore: the graph node in C++ is off, {_failure}"
                        warnings.warn(warning, RuntimeWarning, stacklevel=2)
                elif _missing() is None:
                    _begin()
            _looked = True
    return shim.use_node(None if _off else _attach)


def build() -> None:
    """Build the node, unless Triton's cache has it, and let calls use it from now on, seen before or not.

    Waits for a build that is under way; one that failed is begun anew.

    Raises:
        RuntimeError: it is turned off, this machine lacks something for it, or the compiler failed.
    """
    if (why := _unfit()) is None:
        with _lock:
            load()
            if _attach is None and _building is None and (why := _missing()) is None:
                _begin()
            building = _building
        if building is not None:
            building.join()
        why = why or _failure
    if why is not None:
        raise RuntimeError(f"the graph node in C++: {why}")


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Let autograd.Functions serve meanwhile; for measuring and testing the node, not for use by several threads."""
    before = _off
    _switch(off=True)
    try:
        yield
    finally:
        _switch(off=before)


def _switch(*, off: bool) -> None:
    global _off
    with _lock:
        _off = off
        shim.use_node(None if off else _attach)


def _forked() -> None:
    """A child has not the thread that builds."""
    global _lock, _building, _looked
    _lock, _building, _looked = threading.RLock(), None, _looked and _building is None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_forked)


def _unfit() -> str | None:
    """Why a node would not be used, or None."""
    if os.environ.get("FLASHCORE_NODE") == "0":
        return "FLASHCORE_NODE=0"
    if compiled_autograd():
        return "compiled autograd is on, and takes no node in C++"
    missing = shim._missing()
    return f"it needs the compiled path: {missing}" if missing else None


def _missing() -> str | None:
    """What this machine lacks for building a node, beside what the shim needs, or None."""
    if sys.platform != "linux":
        return "it is built on Linux alone"
    if not Path(sys.executable or "").name.startswith("python"):
        return f"it takes a Python of its own, and this one is {sys.executable or 'unknown'}"
    if not Path(torch.__file__).with_name("include").joinpath(_HEADER).exists():
        return "this torch comes without its headers"
    return None


def _cache() -> Any:
    """Triton's folder for a node of this source, built against what runs here."""
    from triton.runtime.cache import get_cache_manager

    against = (torch.__version__, torch.version.git_version, sys.version, _FILE, _FLAGS, _LIBRARIES)
    return get_cache_manager(hashlib.sha256(f"{against}\n{_SOURCE.read_text()}".encode()).hexdigest())


def _found() -> str | None:
    """Where the cache has a node for what runs here, or None."""
    import triton

    if not Path(triton.knobs.cache.dir).exists():
        return None
    try:
        path: str | None = _cache().get_file(_FILE)
    except Exception:  # Triton makes a folder even to look, which a disk that is full or read-only refuses
        return None
    return path


class _Build(threading.Thread):
    """A build in the background. What it needs is imported by then: a fork must not find an import half done."""

    def __init__(self, *, anew: bool) -> None:
        super().__init__(name="flashcore-node", daemon=True)
        self._anew = anew

    def run(self) -> None:
        global _attach, _building, _failure
        attach, failure = None, None
        try:
            attach = _import(_built(self._anew))
        except Exception as error:  # whatever a compiler, a loader or a file system may say
            failure = _line(error)
        with _lock:
            _attach, _failure, _building = attach, failure, None
            shim.use_node(None if _off else attach)


def _begin() -> None:
    """Begin a build; anew, if what the last one left could not be loaded."""
    global _building, _failure
    building = _Build(anew=_failure is not None)
    try:
        building.start()
    except RuntimeError as error:  # no thread may start: Python is about to end, or the process has too many
        _failure = _line(error)
    else:
        _building, _failure = building, None


def _built(anew: bool) -> str:
    """Where the node is, once it was compiled here or by another process meanwhile."""
    with _alone():
        if anew or (path := _found()) is None:
            _run_compiler()
            path = _found()
    if path is None:
        raise RuntimeError("it was built, but is not in Triton's cache")
    return path


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time, so that those which start together run one compiler. The lock ends with its process."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{_NAME}.lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: several compilers, and the last one's file
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _run_compiler() -> None:
    """Run `_compile` in a process of its own, which ends with this one."""
    import triton

    command = [sys.executable, "-I", "-c", _PROGRAM, str(os.getpid()), *map(str, sys.path)]
    changed = {"TRITON_CACHE_DIR": os.path.abspath(triton.knobs.cache.dir), "LC_ALL": "C"}
    with _lock:  # which a fork waits for: it would hold open the pipes whose end is waited for here
        # A session of its own: its compiler can be ended with it, and a terminal's interrupt is not for it.
        process = subprocess.Popen(
            command, env={**os.environ, **changed}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    said = process.communicate()[1].splitlines()
    if process.returncode:
        said = said or [f"its compiler's process ended with status {process.returncode}"]
        raise RuntimeError(next((line for line in said if "error:" in line or "/ld:" in line), said[-1]))


def _compile(parent: int) -> None:
    """Compile the node into Triton's cache, in a process that has nothing else to do and ends with its parent."""
    signal.signal(signal.SIGTERM, _end)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended by now
        sys.exit(1)
    os.nice(10)  # what the caller does meanwhile comes first
    home = Path(torch.__file__).parent
    includes = [str(home / "include"), str(home / "include/torch/csrc/api/include")]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            os.environ["TMPDIR"] = folder  # for the compiler's own files
            path = compiled.build_library(
                _NAME, _SOURCE, folder, include_dirs=includes, library_dirs=[str(home / "lib")],
                libraries=list(_LIBRARIES), flags=list(_FLAGS),
            )  # fmt: skip
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the cache takes a whole file or none
            _cache().put(path.read_bytes(), _FILE, binary=True)
    except Exception as error:
        sys.exit(_line(error))


def _end(number: int, frame: FrameType | None) -> None:
    """End the compiler and what it runs, then this process, through whatever has to clean up."""
    signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)
    sys.exit(1)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("RuntimeError: ")


def _import(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.autograd.graph.Node.register(module.AttentionBackward)  # so that isinstance says what it is
    return module.attach
