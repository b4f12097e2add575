"""The graph node of calls with gradients in C++: _node.cpp, built when somebody asks for it and used from then on.

A call that requires grad then costs the host less than by torch.autograd.Function, which serves where there is no node.
It needs torch's headers and a C++ compiler for some ten seconds, too long for a first call: so it is built by `build`
alone, into Triton's cache, and later processes find it there. FLASHCORE_NODE=0 turns it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flashcore.launch import shim

_NAME = "_flashcore_node"
_FILE = _NAME + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
_HEADER = "torch/csrc/autograd/python_cpp_function.h"
_LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")

_attach: Any = None  # what the shim calls, once it is loaded
_looked = False  # whether the cache was looked into
_off = False  # inside `disabled`
_failure: str | None = None  # why what was found there could not be loaded
_lock = threading.RLock()


def status() -> str:
    """One line for `flashcore info`: active, or what to do, or why not."""
    if _off:
        return "off: disabled for now"
    unfit = _failure or _unfit()
    if unfit:
        return f"off: {unfit}"
    if _attach is not None:
        return "active"
    if _found() is not None:
        return "built; loaded at the first call that needs gradients"
    missing = _missing()
    return f"not built: {missing}" if missing else "not built; flashcore.warmup(shapes, gradients=True) builds it"


def load() -> bool:
    """Let the shim use the node if one was built. Returns whether it does; costs nothing when repeated."""
    global _attach, _looked, _failure
    if not _looked:
        with _lock:
            if not _looked and _unfit() is None and (path := _found()) is not None:
                try:
                    _attach = _import(path)
                except Exception as error:  # whatever a loader may say of a file that is damaged
                    _failure = f"{type(error).__name__}: {error}".splitlines()[0]
                    warnings.warn(f"flashcore: the graph node in C++ is off, {_failure}", RuntimeWarning, stacklevel=2)
            _looked = True
    return shim.use_node(None if _off else _attach)


def build() -> None:
    """Build the node, unless Triton's cache has it, and let calls use it from now on, seen before or not.

    Raises:
        RuntimeError: it is turned off, this machine lacks something for it, or the compiler failed.
    """
    global _looked, _failure
    if (why := _unfit()) is not None:
        raise RuntimeError(f"the graph node in C++: {why}")
    if _found() is None or _failure is not None:
        if (why := _missing()) is not None:
            raise RuntimeError(f"the graph node in C++: {why}")
        _compile()
    with _lock:
        if _attach is None:
            _looked, _failure = False, None
        load()
        if _failure is not None:
            raise RuntimeError(f"the graph node in C++: {_failure}")


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Let autograd.Functions serve meanwhile; for measuring and testing the node, not for use by several threads."""
    global _off
    before, _off = _off, True
    shim.use_node(None)
    try:
        yield
    finally:
        _off = before
        shim.use_node(None if _off else _attach)


def _forked() -> None:
    """A child has not the thread that holds the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


def _unfit() -> str | None:
    """Why a node would not be used, or None."""
    if os.environ.get("FLASHCORE_NODE") == "0":
        return "FLASHCORE_NODE=0"
    missing = shim._missing()
    return f"it needs the compiled path: {missing}" if missing else None


def _missing() -> str | None:
    """What this machine lacks for building a node, or None."""
    if _compiler() is None:
        return "no C++ compiler was found"
    if not Path(torch.__file__).with_name("include").joinpath(_HEADER).exists():
        return "this torch comes without its headers"
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _cache() -> Any:
    """Triton's folder for a node of this source, built against what runs here."""
    from triton.runtime.cache import get_cache_manager

    against = (torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi(), sys.version, _FILE)
    source = Path(__file__).with_name("_node.cpp").read_text()
    return get_cache_manager(hashlib.sha256(f"{against}\n{source}".encode()).hexdigest())


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


def _compile() -> None:
    try:
        from torch.utils import cpp_extension  # which asks for setuptools
    except ImportError as error:
        raise RuntimeError(f"the graph node in C++: {error}") from error

    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, _FILE)
        command = [
            _compiler() or "g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-w",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            str(Path(__file__).with_name("_node.cpp")), "-o", str(built),
            *[f"-I{path}" for path in includes], *[f"-L{path}" for path in cpp_extension.library_paths()],
            *[f"-l{name}" for name in _LIBRARIES],
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise RuntimeError(f"the graph node in C++: {command[0]}: {said}")
        _cache().put(built.read_bytes(), _FILE, binary=True)


def _import(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.autograd.graph.Node.register(module.AttentionBackward)  # so that isinstance says what it is
    return module.attach
