"""Attention over two sets of keys joined by one kernel: bound to the tensors' metadata, loaded once for each."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from triton import JITFunction

from flashcore.core import target as targets
from flashcore.kernels.portable.merge import merge
from flashcore.launch import packet
from flashcore.launch.binding import Binding, Pointer, Scalar, Tma

_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_STRIDES = {"out": "ob oh om", "lse": "lb lh", "part": "pb ph pm", "part_lse": "plb plh", "into": "ib ih im"}
_ELEMENTS = 4096  # of a tile: 32 a thread, several loads of 16 bytes of each tensor under way at once
_UNIT = 8  # elements of 16 bits in 16 bytes
_lock = Lock()


class Layout(NamedTuple):
    """A tensor but for its address."""

    dtype: torch.dtype
    strides: tuple[int, ...]
    aligned: bool  # its address is a multiple of 16 bytes


def serves(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, into: Tensor) -> bool:
    """Whether the kernel joins these: rows without gaps on a GPU that it is compiled for, sums in fp32."""
    rows_like, lse_like = (out, part, into), (lse, part_lse)
    return (
        out.is_cuda and targets.current(out.get_device()).arch >= 80
        and all(t.dtype in _TYPES and t.stride(-1) == 1 for t in rows_like)
        and all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in lse_like)
    )  # fmt: skip


def layout(tensor: Tensor) -> Layout:
    """What of a tensor a binding depends on."""
    return Layout(tensor.dtype, tensor.stride(), tensor.data_ptr() % 16 == 0)


def bind(shape: tuple[int, ...], tensors: dict[str, Layout]) -> Binding:
    """What to compile and pass to join rows of `shape` [B, H, S, D]; `tensors` by the kernel's names for them.

    A grid with a 0 in it means that there is nothing to join and nothing must be launched.
    """
    batch, heads, rows, dim = shape
    block_d = max(16, 1 << (dim - 1).bit_length())
    block_m = max(1, _ELEMENTS // block_d)
    wide = ("out", "part", "into")
    unit = _UNIT if all(s % _UNIT == 0 for name in wide for s in tensors[name].strides[:3]) else 1
    args: dict[str, Pointer | Tma | Scalar] = {
        name: Pointer(name, _TYPES[t.dtype], t.aligned and name in wide) for name, t in tensors.items()
    }
    for name, axes in _STRIDES.items():
        for axis, stride in zip(axes.split(), tensors[name].strides, strict=False):
            args[f"stride_{axis}"] = Scalar("i64", stride // unit if name in wide else stride)
    args |= {"heads": Scalar("i32", heads), "rows": Scalar("i32", rows)}
    emulated = tensors["into"].dtype == torch.bfloat16 and not isinstance(merge, JITFunction)
    constexprs = {
        "HEAD_DIM": dim, "STRIDE_UNIT": unit, "EMULATED": emulated, "BLOCK_M": block_m, "BLOCK_D": block_d
    }  # fmt: skip
    grid = (-(-rows // block_m) * heads * batch, 1, 1)
    # enable_fp_fusion: its default is off from Triton 3.10 on.
    return Binding(merge, False, grid, args, constexprs, {"num_warps": 4, "enable_fp_fusion": True})


@lru_cache(maxsize=64)
def _launch(device: int, shape: tuple[int, ...], *layouts: Layout) -> packet.Launch:
    binding = bind(shape, dict(zip(_STRIDES, layouts, strict=True)))
    with _lock:
        return packet.load(binding, device, targets.current(device).arch)


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, into: Tensor) -> None:
    """Join `part` and `part_lse` with `out` and `lse`: rows into `into`, which may be `out`, their lse in place.

    Args:
        out, part, into: [B, H, S, D].
        lse, part_lse: fp32 [B, H, S].
    """
    if 0 in out.shape:
        return
    tensors = out, lse, part, part_lse, into
    with torch.cuda.device(out.device):
        launch = _launch(out.get_device(), tuple(out.shape), *map(layout, tensors))
        stream = torch.cuda.current_stream().cuda_stream
        launch.launch(launch.fill(stream, *[t.data_ptr() for t in tensors]))
