"""The peers: each way to compute attention that FlashCore is held against, one adapter a module."""

from __future__ import annotations

from flashcore.benchmark.peers import flash_attn, flashinfer, flex, ours, sdpa, triton_plain, varlen, xformers
from flashcore.benchmark.peers.peer import NotServedError, Peer, Prepared

__all__ = ["ALL", "OURS", "PEERS", "NotServedError", "Peer", "Prepared"]

OURS: dict[str, Peer] = {p.name: p for p in (ours.FLASHCORE, ours.PORTABLE, ours.HOPPER)}
PEERS: dict[str, Peer] = {
    p.name: p
    for p in (
        sdpa.DEFAULT, sdpa.FLASH, sdpa.CUDNN, triton_plain.TRITON_PLAIN, flash_attn.FA4, flash_attn.FA3,
        flash_attn.FA2, flex.FLEX, varlen.VARLEN, flashinfer.FLASHINFER, xformers.XFORMERS, sdpa.EFFICIENT,
        sdpa.CUDNN_SQUARE, sdpa.EFFICIENT_SQUARE, sdpa.MATH,
    )
}  # fmt: skip
ALL: dict[str, Peer] = {**OURS, **PEERS}
