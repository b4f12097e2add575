"""Which rows of a sequence each rank holds, so that a causal mask gives every rank the same work.

A sequence is cut into 2 * ranks chunks of equal length, the first ones a row longer where it doesn't divide. Rank r
holds chunk r and then chunk 2 * ranks - 1 - r: one that sees little and one that sees much (the "zigzag" order).
Without a mask the order of rows means nothing to attention, so this one order serves every call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None


class Rows(NamedTuple):
    """A sequence of `seqlen` rows on `ranks` ranks."""

    seqlen: int
    ranks: int

    def chunk(self, index: int) -> int:
        """Rows in chunk 0 .. 2 * ranks - 1."""
        return self.seqlen // (2 * self.ranks) + (index < self.seqlen % (2 * self.ranks))

    def halves(self, rank: int) -> tuple[int, int]:
        """Rows in a rank's two chunks; its tensors hold them in this order."""
        return self.chunk(rank), self.chunk(2 * self.ranks - 1 - rank)

    def of(self, rank: int) -> int:
        """Rows that a rank holds."""
        return sum(self.halves(rank))

    @property
    def most(self) -> int:
        """Rows of the rank that holds the most."""
        return max(self.of(rank) for rank in range(self.ranks))

    def take(self, whole: Tensor, rank: int, dim: int, out: Tensor | None = None) -> Tensor:
        """A rank's rows of a tensor that has all of them, in memory of their own or in `out`."""
        chunks = whole.split([self.chunk(i) for i in range(2 * self.ranks)], dim)
        return torch.cat([chunks[rank], chunks[2 * self.ranks - 1 - rank]], dim, out=out)

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """All rows in the sequence's order, from what the ranks hold; part r has at least rank r's rows."""
        first, second = [], []
        for rank, part in enumerate(parts):
            near, far = self.halves(rank)
            first.append(part.narrow(dim, 0, near))
            second.append(part.narrow(dim, near, far))
        return torch.cat([*first, *reversed(second)], dim)


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group that a caller means: None is all processes, a mesh of one dimension is its group.

    Raises:
        ValueError: this process is not in it.
    """
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    found = dist.group.WORLD if group is None else group
    if found is None:
        raise ValueError("group: expected a process group; torch.distributed.init_process_group was not called")
    if dist.get_rank(found) < 0:
        raise ValueError("group: expected one that this process is a member of")
    return found


def agreed(length: int, seqlen: int | None, group: dist.ProcessGroup, device: torch.device) -> Rows:
    """The rows of a sequence of which this rank holds `length`; without `seqlen` the ranks tell each other.

    Raises:
        ValueError: a rank holds another number of rows than `shard` gives it, or there are fewer rows than chunks.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if seqlen is None:
        mine = torch.tensor([length], device=device)
        everyone = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(everyone, mine, group=group)
        lengths = torch.cat(everyone).tolist()
        rows = Rows(sum(lengths), ranks)
    else:
        rows = Rows(seqlen, ranks)
        lengths = [length if r == rank else rows.of(r) for r in range(ranks)]
    _check_enough(rows)
    expected = [rows.of(r) for r in range(ranks)]
    if lengths != expected:
        raise ValueError(f"q: expected {expected} rows on the ranks for {rows.seqlen} in all, got {lengths}")
    return rows


def _check_enough(rows: Rows) -> None:
    if rows.seqlen < 2 * rows.ranks:
        raise ValueError(f"seqlen: expected at least {2 * rows.ranks} rows for {rows.ranks} ranks, got {rows.seqlen}")


def shard(tensor: Tensor, group: Group = None, *, dim: int = 2) -> Tensor:
    """This rank's rows of a tensor that every rank has in full.

    Args:
        tensor: any tensor with the sequence in `dim`: q, k or v, token ids, positions, a target.
        group: the ranks; a process group, a mesh of one dimension, or None for all processes.
        dim: the sequence's dimension (2 in [B, H, S, D], 1 in [B, S]).

    Returns:
        A copy of chunks r and 2 * ranks - 1 - r of 2 * ranks. Differentiable.

    Raises:
        ValueError: fewer rows than chunks, or a group without this process.
    """
    group = group_of(group)
    rows = Rows(tensor.shape[dim], dist.get_world_size(group))
    _check_enough(rows)
    return rows.take(tensor, dist.get_rank(group), dim)


def unshard(tensor: Tensor, group: Group = None, *, dim: int = 2) -> Tensor:
    """All rows in the sequence's order on every rank: what `shard` undoes. A collective call.

    Args:
        tensor: this rank's rows, as `shard` gives them.
        group: as for `shard`.
        dim: the sequence's dimension.

    Raises:
        ValueError: the ranks' rows are not those of `shard`.
        RuntimeError: a gradient would be needed: compute the loss on each rank's rows, or detach them.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("unshard: has no gradient, but the tensor requires one; detach it first")
    group = group_of(group)
    rows = agreed(tensor.shape[dim], None, group, tensor.device)
    shape = list(tensor.shape)
    shape[dim] = rows.most  # collectives want one size: lengths differ by at most one row
    mine = tensor.new_zeros(shape)
    mine.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(mine) for _ in range(rows.ranks)]
    dist.all_gather(parts, mine, group=group)
    return rows.join(parts, dim)
