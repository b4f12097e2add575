"""What the hot path takes from PyTorch beyond its documented interface, each with a documented substitute.

The substitutes cost a few microseconds a call and change nothing else; both are tested alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Guard = Callable[..., bool]

_dynamo: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


def guard(*tensors: Tensor) -> Guard:
    """A function that tells whether tensors look exactly like these, in a dispatcher in exactly this state.

    Compared are: Python type, dtype, device, sizes, strides, requires_grad, dispatch keys (conjugation and
    negation bits, inference tensors), and the thread's dispatch keys (autocast, inference mode, functorch,
    tracing). Not compared are: values, addresses, grad mode, forward-mode tangents, `dispatch_modes`.
    """
    tensor_guards = getattr(_dynamo, "TensorGuards", None)
    if tensor_guards is None:
        return documented_guard(*tensors)
    exact: dict[str, Any] = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
    if len({id(t) for t in tensors}) == len(tensors):
        together: Guard = tensor_guards(*tensors, **exact).check
        return together
    # One tensor in two places is what TensorGuards refuses, so each place gets its own.
    checks = [tensor_guards(t, **exact).check for t in tensors]
    return lambda *others: all([check(t) for check, t in zip(checks, others, strict=True)])


def documented_guard(*tensors: Tensor) -> Guard:
    """`guard` without torch._C._dynamo."""
    expected = [_looks(t) for t in tensors], _thread_keys()
    return lambda *others: ([_looks(t) for t in others], _thread_keys()) == expected


def _looks(t: Tensor) -> tuple[Any, ...]:
    bits = (t.is_conj(), t.is_neg(), t.is_inference())
    return type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.layout, bits


def _thread_keys() -> tuple[bool, ...]:
    return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda"), is_plain()


# The thread's dispatch keys outside of everything that has to see an operator instead of a kernel launch.
_HARMLESS = ("BackendSelect", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")


def is_plain() -> bool:
    """Whether nothing in this thread traces, transforms or intercepts operators.

    Tracing, functorch, dispatch modes, functionalization and their like each add a dispatch key to the thread's;
    keys that are not known to be harmless count as theirs.
    """
    if dispatch_modes():
        return False
    keys = torch._C._dispatch_tls_local_include_set()
    for name in _HARMLESS:
        keys = keys.remove(getattr(torch._C.DispatchKey, name))
    return bool(keys.raw_repr() == 0)


def functorch_is_active() -> bool:
    """Whether a functorch transform (vmap, grad, jvp ...) is running in this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def apply_function(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for where no functorch transform runs: the wrapper that looks for one, which torch has up to
    2.13, costs 2 microseconds.
    """
    try:
        plain: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    except AttributeError:
        return function.apply
    return plain


def compiled_autograd() -> bool:
    """Whether torch._dynamo.config.compiled_autograd is on. Does not load torch._dynamo, which takes seconds."""
    return bool(getattr(sys.modules.get("torch._dynamo.config"), "compiled_autograd", False))


def _documented_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _documented_empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _documented_modes() -> int:
    return len(torch.utils._python_dispatch._get_current_dispatch_mode_stack())


raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _documented_stream)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _documented_modes)
# The attribute of a Function's context that save_for_backward sets; None = that is to be called.
saved_attribute: str | None = "to_save" if hasattr(getattr(torch._C, "_FunctionBase", None), "to_save") else None
empty_strided_cuda: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    _dynamo, "_empty_strided_cuda", _documented_empty
)
