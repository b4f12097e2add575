"""Attention of DTensors: every device computes the batch entries and heads that it has, without communication.

A mesh dimension may split the batch, or the heads where it divides those of q and of k alike (query heads stay with
the key head they read). Tensors that are split in another way are gathered along that mesh dimension first, as are
those that don't agree with q.

PyTorch's own `register_sharding` remembers a decision by shapes, placements and integer options: a call in another
`layout`, or one that returns lse, would get the decision made for the first one. So the operator gets a rule of its
own for DTensors, which sees every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flashcore.fast.attention_production import attention

_INPUTS = ("q", "k", "v")


@cache
def register_sharding() -> None:
    """Make `flashcore.attention` take DTensors, in this process and from now on.

    Without it a DTensor is refused by DTensor's dispatcher. Output and lse are DTensors, sharded as q is where the
    rule in this module's docstring allows. Gradients need `sharded_attention`.
    """
    torch.library.register_torch_dispatch("flashcore::attention", DTensor, _dispatch)


def sharded_attention(q: DTensor, k: DTensor, v: DTensor, **options: Any) -> DTensor | tuple[DTensor, DTensor]:
    """`flashcore.attention` of DTensors; differentiable, and needs no registration.

    Args:
        q: [B, Hq, Sq, D], sharded by batch or heads; other placements are gathered.
        k, v: [B, Hkv, Sk, D] on q's mesh.
        options: as for `flashcore.attention`, except `out`; attn_mask and seqused_k are DTensors on q's mesh, too.

    Returns:
        The output, or (output, lse), as DTensors sharded like q.

    Raises:
        TypeError: a tensor is no DTensor.
        ValueError: tensors on different meshes, `out`, or what `flashcore.attention` raises.
    """
    if options.get("out") is not None:
        raise ValueError("out: expected None, got a tensor; DTensors are written to new memory")
    tensors, rest = _tensors({"q": q, "k": k, "v": v, **options})

    def run(local: dict[str, Any]) -> tuple[Tensor, Tensor]:
        result = attention(**local, **rest)
        return result if isinstance(result, tuple) else (result, result.new_empty(0))

    return_lse = rest.get("return_lse", False)
    both = _apply(run, tensors, rest.get("layout", "bhsd"), return_lse)
    return both if return_lse else both[0]


def _dispatch(cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
    """The operator, called on at least one DTensor."""
    names = [argument.name for argument in func._schema.arguments]
    tensors, rest = _tensors({**dict(zip(names, args, strict=False)), **(kwargs or {})})

    def run(local: dict[str, Any]) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = func(**local, **rest)
        return both

    return _apply(run, tensors, rest.get("layout", "bhsd"), rest.get("return_lse", False))


def _tensors(arguments: dict[str, Any]) -> tuple[dict[str, DTensor], dict[str, Any]]:
    """Arguments that are tensors, and the others.

    Raises:
        TypeError: some are DTensors and others plain tensors, whose meaning then is anybody's guess.
    """
    tensors, rest = {}, {}
    for name, value in arguments.items():
        if isinstance(value, DTensor):
            tensors[name] = value
        elif isinstance(value, Tensor) or name in _INPUTS:
            raise TypeError(f"{name}: expected a DTensor as the other tensors are, got {type(value).__name__}")
        else:
            rest[name] = value
    return tensors, rest


def _apply(
    run: Callable[[dict[str, Any]], tuple[Tensor, Tensor]], tensors: dict[str, DTensor], layout: str,
    return_lse: bool,
) -> tuple[DTensor, DTensor]:
    """`run` on every device's own part; its second result is empty unless `return_lse`."""
    q = tensors["q"]
    for name, tensor in tensors.items():
        if tensor.device_mesh != q.device_mesh:
            raise ValueError(f"{name}: expected q's mesh, {q.device_mesh}, got {tensor.device_mesh}")
    heads = 2 if layout == "bshd" else 1
    placements = _placements(q, tensors["k"], heads)
    local = {}
    for name, tensor in tensors.items():
        wanted = placements if name in _INPUTS else [_beside(tensor, p, heads) for p in placements]
        # Where q is sharded and this tensor is not, each device has a part of its gradient.
        grads = [Partial() if w.is_replicate() and p.is_shard() else w for w, p in zip(wanted, placements, strict=True)]
        local[name] = tensor.redistribute(placements=wanted).to_local(grad_placements=grads)
    out, lse = run(local)
    shape = (*q.shape[:-1], tensors["v"].shape[-1])
    lse_shape: tuple[int, ...] = (0,)
    lse_placements: list[Placement] = [Replicate()] * len(placements)
    if return_lse:
        lse_shape = (q.shape[0], q.shape[heads], q.shape[3 - heads])
        lse_placements = [Shard(1) if p.is_shard(heads) else p for p in placements]
    return _global(out, q.device_mesh, placements, shape), _global(lse, q.device_mesh, lse_placements, lse_shape)


def _placements(q: DTensor, k: DTensor, heads: int) -> list[Placement]:
    """How q, k, v and the output are placed: as q is, dimension by dimension of the mesh, where that is served."""
    placements: list[Placement] = []
    sharing = 1  # devices that share the heads so far
    for dim, placement in enumerate(q.placements):
        size = sharing * q.device_mesh.size(dim)
        if placement == Shard(heads) and q.shape[heads] % size == 0 and k.shape[heads] % size == 0:
            sharing = size
            placements.append(Shard(heads))
        else:
            placements.append(Shard(0) if placement == Shard(0) else Replicate())
    return placements


def _beside(tensor: DTensor, placement: Placement, heads: int) -> Placement:
    """How attn_mask (broadcast to [B, Hq, Sq, Sk]) or seqused_k ([B]) is placed where q is placed so."""
    if tensor.dim() == 1 and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
        return placement if placement.is_shard(0) else Replicate()
    for of_q, of_mask in ((0, tensor.dim() - 4), (heads, tensor.dim() - 3)):
        if placement.is_shard(of_q) and of_mask >= 0 and tensor.shape[of_mask] > 1:
            return Shard(of_mask)
    return Replicate()


def _global(local: Tensor, mesh: DeviceMesh, placements: list[Placement], shape: tuple[int, ...]) -> DTensor:
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
