"""Attention on several GPUs, through torch.distributed alone (NCCL on GPUs, gloo on CPUs).

Heads or batch entries on different GPUs: `register_sharding` and `sharded_attention`, for DTensors.
Parts of one long sequence on different GPUs: `shard`, `context_parallel_attention`, `unshard`.
"""

from __future__ import annotations

from flashcore.integrations.distributed.context_parallel import context_parallel_attention
from flashcore.integrations.distributed.rows import shard, unshard
from flashcore.integrations.distributed.sharding import register_sharding, sharded_attention

__all__ = ["context_parallel_attention", "register_sharding", "shard", "sharded_attention", "unshard"]
