"""All-to-all attention (DeepSpeed-Ulysses, Jacobs et al. 2023): parts of the sequence for parts of the heads.

Before attention every rank gives away its rows of the others' heads and gets all rows of its own heads; afterwards the
outputs go back the same way. Two exchanges whose size falls with the number of ranks, none of it behind computation.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from flashcore.fast.attention_production import attention
from flashcore.integrations.distributed import partial
from flashcore.integrations.distributed.ring import Call, Kept


def check_heads(q: Tensor, k: Tensor, ranks: int) -> None:
    """Refuse heads that ranks can't share evenly; q and k are [B, H, S, D].

    Raises:
        ValueError: they can't.
    """
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[1] % ranks:
            raise ValueError(
                f"{name}: expected heads that {ranks} ranks share evenly for method 'all_to_all', got "
                f"{tensor.shape[1]}; method 'ring' serves any number"
            )


def _to_heads(tensors: list[Tensor], call: Call) -> list[Tensor]:
    """[B, H, own rows, x] -> [B, H / ranks, all rows, x] in the sequence's order."""
    ranks, rank = call.ring.size, call.ring.rank
    lengths = [call.rows.of(r) for r in range(ranks)]
    started = []
    for tensor in tensors:
        send = tensor.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
        row = send[0].numel() // lengths[rank]  # elements that a row has in all batches and heads of a piece
        received = send.new_empty(row * call.rows.seqlen)
        sizes = [row * length for length in lengths]
        work = dist.all_to_all_single(
            received, send.view(-1), sizes, [send[0].numel()] * ranks, group=call.ring.group, async_op=True
        )
        started.append((work, send, received, sizes))
    found = []
    for work, send, received, sizes in started:
        work.wait()
        _, batch, heads, _, dim = send.shape
        parts = [p.view(batch, heads, n, dim) for p, n in zip(received.split(sizes), lengths, strict=True)]
        found.append(call.rows.join(parts, 2))
    return found


def _to_rows(tensors: list[Tensor], call: Call) -> list[Tensor]:
    """[B, H / ranks, all rows, x] in the sequence's order -> [B, H, own rows, x]."""
    ranks, rank = call.ring.size, call.ring.rank
    started = []
    lengths = [call.rows.of(r) for r in range(ranks)]
    for tensor in tensors:
        batch, heads, _, dim = tensor.shape
        row = batch * heads * dim  # elements
        send = tensor.new_empty(tensor.numel())
        sizes = [row * length for length in lengths]
        for r, piece in enumerate(send.split(sizes)):
            call.rows.take(tensor, r, 2, out=piece.view(batch, heads, lengths[r], dim))
        received = tensor.new_empty(ranks, batch, heads, lengths[rank], dim)
        work = dist.all_to_all_single(
            received.view(-1), send, [received[0].numel()] * ranks, sizes, group=call.ring.group, async_op=True
        )
        started.append((work, send, received))
    found = []
    for work, _, received in started:
        work.wait()
        found.append(received.movedim(0, 1).flatten(1, 2).contiguous())
    return found


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Kept]:
    """Attention of this rank's rows over all keys; arguments and results as ring.forward."""
    qh, kh, vh = _to_heads([q, k, v], call)
    out, lse = attention(
        qh, kh, vh, is_causal=call.is_causal, scale=call.scale, return_lse=True, backend=call.backend
    )
    own_out, own_lse = _to_rows([out, lse.unsqueeze(-1)], call)
    return own_out, own_lse.squeeze(-1), (qh, kh, vh, out, lse)


def backward(kept: Kept, grad_out: Tensor, grad_lse: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of this rank's q, k and v."""
    qh, kh, vh, out, lse = kept
    grad_outs = _to_heads([grad_out] if grad_lse is None else [grad_out, grad_lse.unsqueeze(-1)], call)
    grad, of_lse = grad_outs[0], None if grad_lse is None else grad_outs[1].squeeze(-1)
    delta = None if partial.by_kernel(qh, vh, of_lse) else partial.correction(grad, out, of_lse)
    grads = partial.gradients(
        grad, qh, kh, vh, out, lse, delta, is_causal=call.is_causal, scale=call.scale
    )
    grad_q, grad_k, grad_v = _to_rows([g.to(qh.dtype) for g in grads], call)
    return grad_q, grad_k, grad_v
