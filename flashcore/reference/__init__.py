"""Attention in plain torch: the fp64 oracle that every kernel is measured against, and the path CPU tensors take."""

from __future__ import annotations

from flashcore.reference.oracle import attention, cpu

__all__ = ["attention", "cpu"]
