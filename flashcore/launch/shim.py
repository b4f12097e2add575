"""The compiled fast path, where this machine can have it: _shim.c, built once with the tools that Triton uses.

It is never needed. Where anything is missing, the pure-Python path in launcher.py serves the same calls, and
`status` says why. FLASHCORE_SHIM=0 turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashcore.core.problem import Problem
from flashcore.launch import driver
from flashcore.launch.packet import Launch
from flashcore.launch.torch_private import empty_strided_cuda, saved_attribute

_NAME = "_flashcore_shim"
_EXTRA = (("mask", "seqused_k"), ("cu_seqlens_q", "cu_seqlens_k"))  # of dense tensors, and of packed sequences

# (q, k, v, out, extra, extra, *options) -> result or None; None while there is no shim. The extra tensors are attn_mask
# and seqused_k, or cu_seqlens_q and cu_seqlens_k.
attend: Callable[..., Any] | None = None
Entry = Any  # a call that the shim serves: a capsule
_module: Any = None  # once it is built and set up
_off = False  # inside `disabled`
_failure: str | None = None  # why the last attempt to load it failed
_lock = threading.RLock()  # held by whoever loads it
_building: _Build | None = None  # a build that `start` began and nobody has waited for yet


def status() -> str:
    """One line for `flashcore info`: active, or why not."""
    if attend is not None:
        return "active"
    if _off:
        return "off: disabled for now"
    if _failure is not None:
        return f"off: {_failure}"
    missing = _missing()
    return f"off: {missing}" if missing else "not loaded yet; built at the first call on a GPU"


def start() -> None:
    """Begin to build the shim, for a `load` soon to come: its compiler can run beside a kernel's."""
    global _building
    with _lock:
        if _module is None and _failure is None and _building is None and _missing() is None:
            _building = _Build()
            _building.start()


def load() -> bool:
    """Build the shim, or take it from Triton's cache, and let it serve. Returns whether there is one.

    Inside `disabled` it is there, and learns calls, but does not serve them.
    """
    global attend, _module, _failure, _building
    if _module is not None:
        return True
    if _failure is not None:
        return False
    with _lock:
        if _module is not None or _failure is not None:  # by another thread meanwhile
            return _module is not None
        building, _building = _building, None
        _failure = None if building else _missing()
        if _failure is None:
            try:
                module = building.result() if building else _build()
                _set_up(module)
                _module = module
                attend = _serving()
            except Exception as error:  # whatever a compiler, a loader or a file system may say
                _failure = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"flashcore: the compiled launch path is off, {_failure}", RuntimeWarning, stacklevel=2)
        return _module is not None


def add(
    tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], launch: Launch, problem: Problem, *,
    shape: tuple[int, ...], strides: tuple[int, ...], rows: tuple[int, ...] | None, row_strides: tuple[int, ...],
) -> Entry | None:
    """Let the shim serve calls that look like this one: `tensors` is (q, k, v, out, extra, extra), None = left out.

    Returns:
        The entry for `differentiate`, None where there is none.
    """
    template = launch.template
    if _module is None or template is None:
        return None
    places = dict(zip(launch.tensors, template.slots, strict=True))
    names = ("q", "k", "v", "o", "lse", *_EXTRA[problem.packed is not None])
    slots = tuple(places.get(name, (-1, None)) for name in names)
    config = template.config
    numbers = (*config.grid, config.block[0], config.shared)
    outputs = (shape, strides, problem.dtype, rows, row_strides, torch.float32)
    mask_aligned = -1 if problem.mask is None else int(problem.mask.aligned)
    return _module.add(
        tensors, options, problem.aligned, mask_aligned, outputs, launch.loaded.context, launch.function, numbers,
        bytes(template.attributes), template.block, tuple(template.offsets), slots,
    )  # fmt: skip


def forward(otherwise: Callable[..., Any], *, keeps: bool, gives_lse: bool) -> Callable[..., Any]:
    """The forward of an autograd.Function for `differentiate`.

    For a call that the shim has launched it saves the tensors given and, where it `keeps` them, the output and lse.
    Other calls go to otherwise(ctx, q, k, v[, extra, extra]).
    """
    made: Callable[..., Any] = _module.forward_of(otherwise, keeps, gives_lse)
    return made


def differentiate(
    entry: Entry, launched: Entry, apply: Callable[..., Any], backward: Callable[..., Any], *, keeps: bool
) -> None:
    """Let apply(q, k, v[, extra, extra]), or a node where `use_node` was given one, serve those calls of `entry` that
    need gradients.

    They launch what `launched` does. The Function's forward is one that `forward` made, of the same `keeps`, and its
    backward is `backward`, which the node runs as well.
    """
    _module.set_apply(entry, launched, apply, backward, keeps)


def use_node(attach: Any) -> bool:
    """Let the capsule that _node.cpp gives, or None, make the nodes of calls with gradients; says whether it does."""
    if _module is None:
        return False
    _module.use_node(attach)
    return attach is not None


def forget() -> None:
    """Drop every call that was added."""
    if _module is not None:
        _module.forget()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Let the pure-Python path serve meanwhile; for measuring and testing it, not for use by several threads."""
    global attend, _off
    before, _off = _off, True
    attend = None
    try:
        yield
    finally:
        _off = before
        attend = _serving()


def _serving() -> Callable[..., Any] | None:
    return None if _off or _module is None else _module.attend


def _missing() -> str | None:
    """What this machine lacks for the shim, or None."""
    if os.environ.get("FLASHCORE_SHIM") == "0":
        return "FLASHCORE_SHIM=0"
    if sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "it needs CPython with its global lock"
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return f"it needs torch 2.10 or newer, this is {torch.__version__}"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h is not installed"
    if not any(shutil.which(cc) for cc in (os.environ.get("CC", ""), "gcc", "clang") if cc):
        return "no C compiler was found"
    return _unsafe_cache()


def _unsafe_cache() -> str | None:
    """Why code must not be loaded from Triton's cache folder, or None."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    if not folder.exists():
        return None  # Triton makes it, for this user
    found = folder.stat()
    by_group = found.st_mode & 0o020 and found.st_gid != os.getegid()
    if found.st_uid != os.geteuid() or found.st_mode & 0o002 or by_group:
        return f"others can write into the cache folder {folder}"
    return None


class _Build(threading.Thread):
    """`_build` in a thread of its own. What it needs is imported by then: a fork must not find an import half done."""

    def __init__(self) -> None:
        super().__init__(name="flashcore-shim")
        self._module: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._module = _build()
        except Exception as error:
            self._error = error

    def result(self) -> Any:
        """What `_build` gave or raised, once it has."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._module


def _forked() -> None:
    """A child has neither the thread that builds nor the one that holds the lock."""
    global _lock, _building
    _lock, _building = threading.RLock(), None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


def _build() -> Any:
    from triton.runtime.build import compile_module_from_src

    # Triton's cache is keyed by the source alone, but the shim also depends on what it is built against.
    source = f"/* {torch.__version__}, {sys.version} */\n" + Path(__file__).with_name("_shim.c").read_text()
    libraries = [str(Path(torch.__file__).parent / "lib")]
    return compile_module_from_src(source, _NAME, library_dirs=libraries, libraries=["libc10.so"])


def _set_up(
    module: Any,
    empty_strided: Callable[..., Tensor] = empty_strided_cuda,
    get_context: int | None = None,
    launch_kernel: int | None = None,
) -> None:
    """Give the module what it calls: functions of torch and of libcuda, or a test's stand-ins."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    grad_mode = _address(torch_cpu.aoti_torch_grad_mode_is_enabled)
    if get_context is None:
        get_context = _address(driver.library().cuCtxGetCurrent)
    if launch_kernel is None:
        launch_kernel = _address(driver.library().cuLaunchKernelEx)
    exchange = Tensor.__dlpack_c_exchange_api__
    module.setup(
        exchange, Tensor, torch.nn.Parameter, empty_strided, forward_ad, saved_attribute, grad_mode, get_context,
        launch_kernel,
    )  # fmt: skip


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
