"""Ring attention (Liu et al. 2023): each rank keeps its rows, and keys and values travel from rank to rank.

Step s of rank r works on the keys of rank r - s. While it computes, they are already on their way to rank r + 1 and
the next ones on their way here: NCCL moves them on a stream of its own, from one of two buffers into the other.

A GPU hands out its SMs in the order of launches: the blocks of a kernel sit down where those of the one before run out.
So the first transfer, the longest to launch, comes behind a few of a rank's own rows, so that the GPU does not wait
for the host, and before most others, so that NCCL does not wait for the whole of the computation. The last step, in
front of which no transfer has to find room, does not wait for the end of the one before. And the own rows that see
the fewest keys come last of all: their short blocks fill what the long ones of the last step leave idle as they end.

In the backward pass the gradients of keys and values follow one step behind the keys they belong to, in fp32, and come
home in the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from flashcore.fast.attention_production import attention
from flashcore.integrations.distributed import partial
from flashcore.integrations.distributed.rows import Rows

Kept = tuple[Tensor, ...]  # what a backward pass needs: q, k, v, out, lse
_TILE = 128  # rows of the largest tile: no other cut between own rows costs a tile of its own


class Ring:
    """Passes tensors on to the next rank of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> list[dist.Work]:
        """Start sending contiguous tensors to rank + 1, and receiving as many from rank - 1; wait for what it returns.

        On GPUs it starts when the current stream has come here, and waiting holds up the stream, not the caller.
        """
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [dist.P2POp(dist.isend, t, group=self.group, group_peer=after) for t in send]
        operations += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=before) for t in receive]
        works: list[dist.Work] = dist.batch_isend_irecv(operations)
        return works


@dataclass(frozen=True)
class Call:
    """What all ranks agree on."""

    ring: Ring
    rows: Rows
    is_causal: bool
    scale: float
    backend: str | None = None


class _Buffers:
    """Room for a pair of travelling tensors, twice: one is read and sent while the other receives."""

    def __init__(self, call: Call, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self._call = call
        self._like = k, v
        self._dtype = dtype
        self._flat: dict[int, list[Tensor]] = {}  # two ranks need one pair for keys and values

    def of(self, turn: int, rank: int) -> list[Tensor]:
        """[B, H, S, D] for the rows of `rank`, contiguous; even and odd turns do not share memory."""
        rows, most = self._call.rows.of(rank), self._call.rows.most
        if turn % 2 not in self._flat:
            self._flat[turn % 2] = [t.new_empty(t[:, :, :1].numel() * most, dtype=self._dtype) for t in self._like]
        shapes = [(t.shape[0], t.shape[1], rows, t.shape[3]) for t in self._like]
        pairs = zip(self._flat[turn % 2], shapes, strict=True)
        return [flat[: shape[0] * shape[1] * rows * shape[3]].view(shape) for flat, shape in pairs]


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Beside:
    """Another stream of the GPU, which has come as far as the current one; CPUs do everything in turn."""

    def __init__(self, device: torch.device) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.current_stream(device), _second_stream(device)
        self.follow()

    def here(self) -> AbstractContextManager[object]:
        """What is launched in it goes beside."""
        return torch.cuda.stream(self._streams[1]) if self._streams else nullcontext()

    def follow(self) -> None:
        """Let what goes beside from now on wait for the current stream as it is."""
        if self._streams:
            self._streams[1].wait_stream(self._streams[0])

    def join(self) -> None:
        """Let the current stream wait for what went beside."""
        if self._streams:
            self._streams[0].wait_stream(self._streams[1])


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def _part(call: Call, source: int) -> tuple[slice, slice, bool]:
    """Which of this rank's rows see which keys of rank `source`, and whether those by a causal mask.

    Chunks are in the sequence's order on every rank, and this rank's two lie around or between the other one's two.
    Either way half of the scores are left, as on the diagonal.
    """
    rank = call.ring.rank
    if not call.is_causal or source == rank:
        return slice(None), slice(None), call.is_causal
    if source < rank:  # its first chunk is before both of ours, its second one behind them
        return slice(None), slice(call.rows.halves(source)[0]), False
    return slice(call.rows.halves(rank)[0], None), slice(None), False


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Kept]:
    """Attention of this rank's rows over all keys.

    Args:
        q: [B, Hq, S, D], k, v: [B, Hkv, S, D], this rank's rows as `shard` gives them.

    Returns:
        out [B, Hq, S, D] in q's dtype, lse [B, Hq, S], and what `backward` needs.
    """
    ring, last = call.ring, call.ring.size - 1
    here = coming = [k.contiguous(), v.contiguous()]
    kept_k, kept_v = here
    buffers = _Buffers(call, kept_k, kept_v, k.dtype)
    if last:
        coming = buffers.of(0, (ring.rank - 1) % ring.size)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    beside = _Beside(q.device)
    works: list[dist.Work] = []

    def attend(rows: slice, keys: slice, is_causal: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        part, lse = attention(
            q[:, :, rows], here[0][:, :, keys], here[1][:, :, keys], is_causal=is_causal, scale=call.scale,
            return_lse=True, backend=call.backend, out=out,
        )  # fmt: skip
        return part, lse

    near, far = call.rows.halves(ring.rank)
    shortest = near * 3 // 4 // _TILE * _TILE
    parts = [(shortest, near), (near, near + far), (0, shortest)] if last else [(0, near + far)]
    lses = {}
    for first, end in parts:
        if first < end:
            keys = slice(end if call.is_causal else None)  # of this rank's own, those up to the last row
            lses[first] = attend(slice(first, end), keys, call.is_causal, out[:, :, first:end])[1]
        if last and end == near:
            with beside.here():
                works = ring.pass_on(here, coming)
    lse = torch.cat([lses[first] for first in sorted(lses)], 2)

    # Between two joins nothing is rounded to 16 bits; two ranks join once, from the output into the output.
    sums = out if last < 2 else torch.empty_like(out, dtype=partial.precision_of(out.dtype))
    for step in range(1, ring.size):
        source = (ring.rank - step) % ring.size
        rows, keys, is_causal = _part(call, source)
        with beside.here() if step == last else nullcontext():
            _wait(works)
            here = coming
            if step < last:
                coming = buffers.of(step, (source - 1) % ring.size)
                works = ring.pass_on(here, coming)
            part, part_lse = attend(rows, keys, is_causal)
            if step == last:
                beside.follow()
            before, after = out if step == 1 else sums, out if step == last else sums
            partial.merge_(before[:, :, rows], lse[:, :, rows], part, part_lse, into=after[:, :, rows])
    beside.join()
    if last > 1 and ring.rank and rows.start:  # rows that the last step left alone
        out[:, :, : rows.start] = sums[:, :, : rows.start]
    return out, lse, (q, kept_k, kept_v, out, lse)


def backward(kept: Kept, grad_out: Tensor, grad_lse: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of this rank's q, k and v."""
    q, k, v, out, lse = kept
    ring = call.ring
    precision = partial.precision_of(q.dtype)
    delta = None if partial.by_kernel(q, v, grad_lse) else partial.correction(grad_out, out, grad_lse)
    here = [k, v]
    buffers, grad_buffers = _Buffers(call, k, v, k.dtype), _Buffers(call, k, v, precision)
    grad_q = q.new_zeros(q.shape, dtype=precision)
    grads = grad_buffers.of(0, ring.rank)
    grad_works: list[dist.Work] = []
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        works, coming = [], here
        if step + 1 < ring.size:
            coming = buffers.of(step, (source - 1) % ring.size)
            works = ring.pass_on(here, coming)
        rows, keys, is_causal = _part(call, source)
        more_q, *more = partial.gradients(
            grad_out[:, :, rows], q[:, :, rows], here[0][:, :, keys], here[1][:, :, keys], out[:, :, rows],
            lse[:, :, rows], None if delta is None else delta[:, :, rows], is_causal=is_causal, scale=call.scale,
        )  # fmt: skip
        grad_q[:, :, rows] += more_q
        _wait(grad_works)
        for grad, part in zip(grads, more, strict=True):
            if step == 0:
                grad.copy_(part)
            else:
                grad[:, :, keys] += part
        if ring.size > 1:  # onwards with the keys; after the last step they are one rank from home
            arriving = grad_buffers.of(step + 1, (source - 1) % ring.size)
            grad_works = ring.pass_on(grads, arriving)
            grads = arriving
        _wait(works)
        here = coming
    _wait(grad_works)
    grad_k, grad_v = grads
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
