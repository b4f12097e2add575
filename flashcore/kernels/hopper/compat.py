"""Gluon's names that moved between Triton 3.6 and the newest release."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
aggregate = getattr(gluon, "aggregate", None) or triton.language.core._aggregate
