"""How a problem is going to be computed: a kernel and its compile-time choices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """One choice of kernel and tile, as tuning tables store it and `flashcore.explain` shows it."""

    kernel: str  #: "portable", "hopper", "reference"
    block_m: int  #: query rows per tile
    block_n: int  #: keys per tile
    num_warps: int
    num_stages: int  #: K/V tiles in flight
    schedule: str = ""  #: which of a kernel's schedules, "" where it has one
    maxnreg: int | None = None  #: register cap per thread, None = the compiler's
