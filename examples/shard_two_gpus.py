"""One attention layer on several GPUs, in the two ways there are: its heads shared, or its sequence.

    python -m torch.distributed.run --nproc-per-node 2 examples/shard_two_gpus.py

Each way computes a layer forward and backward and is held against the same layer on one device. Without a GPU for
every process it runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flashcore import attention
from flashcore.integrations.distributed import (
    context_parallel_attention,
    register_sharding,
    shard,
    sharded_attention,
    unshard,
)


class Layer(nn.Module):
    """Causal self-attention of [B, S, C] with its four projections."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(channels, channels, bias=False) for _ in range(4))
        self.attend = attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, is_causal=True, layout="bshd").flatten(2))


def layer(heads: int, device: torch.device, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    return Layer(64 * heads, heads).to(device, dtype)


def heads_shared(model: Layer, x: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Tensor parallel: every GPU has some heads' columns of q, k and v and the matching rows of o."""
    columns, rows = ColwiseParallel(use_local_output=False), RowwiseParallel()
    parallelize_module(model, mesh, {"q": columns, "k": columns, "v": columns, "o": rows})
    register_sharding()
    with torch.no_grad():
        served = model(x)  # attention() now takes DTensors as it takes tensors
    model.attend = sharded_attention  # the same with gradients
    out = model(x)
    out.sum().backward()
    assert torch.equal(out, served)
    return served, model.k.weight.grad.full_tensor()


def sequence_shared(model: Layer, x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Context parallel: every GPU has some rows of the sequence and all of the weights."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return context_parallel_attention(q, k, v, group, seqlen=x.shape[1], **options)

    model.attend = attend
    out = model(shard(x, group, dim=1))
    out.sum().backward()  # of this rank's rows: gradients of weights are summed over ranks, as in data parallel
    dist.all_reduce(model.k.weight.grad, group=group)
    return unshard(out.detach(), group, dim=1), model.k.weight.grad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    options = parser.parse_args()
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    mesh = init_device_mesh(device.type, (ranks,))
    dtype = torch.bfloat16 if on_gpu else torch.float32

    torch.manual_seed(1)
    x = torch.randn(1, options.seqlen, 64 * options.heads).to(device, dtype)
    alone = layer(options.heads, device, dtype)
    want = alone(x)
    want.sum().backward()
    ok = True
    for way, share in ((heads_shared, mesh), (sequence_shared, mesh.get_group())):
        found = way(layer(options.heads, device, dtype), x, share)
        expected = want.detach(), alone.k.weight.grad
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        ok &= max(errors) < (2e-2 if on_gpu else 1e-4)
        if dist.get_rank() == 0:
            words = f"relative error of the output {errors[0]:.2g}, of a gradient {errors[1]:.2g}"
            print(f"{way.__name__} on {ranks} {device.type} devices: {words}")
    dist.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
