"""Two launches of one thread in a CUDA graph, which read an SM's clock and the time: how many cycles lie between?"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer, smid

from flashcore.security.elapsed import Reading
from flashcore.security.instrument import READ_CLOCK

_CLOCK = tl.constexpr(READ_CLOCK)


@triton.jit
def read(into):  # type: ignore[no-untyped-def]
    """The SM's cycles, which SM it is, and the GPU's time in nanoseconds, into three int64."""
    cycles = tl.inline_asm_elementwise(_CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = globaltimer()
    tl.store(into, cycles)
    tl.store(into + 1, smid().to(tl.int64))
    tl.store(into + 2, now)


class Probe:
    """The two launches, on the current stream.

    Neither is a programmatic dependent launch, and neither lets its successor start early: the first one starts when
    all in front of it has ended and has ended when what is behind it goes on, the second starts when all has ended.
    """

    def __init__(self, device: str) -> None:
        self._seen = torch.zeros((2, 4), dtype=torch.int64, device=device)  # rows aligned alike: one kernel for both

    def before(self) -> None:
        """Launch the first."""
        read[(1,)](self._seen[0], num_warps=1)

    def after(self) -> None:
        """Launch the second."""
        read[(1,)](self._seen[1], num_warps=1)

    def reading(self) -> Reading | None:
        """What lay between the two, once the device was waited for; None where they ran on two SMs, as each SM counts
        cycles of its own.
        """
        (began, first, start, _), (ended, second, end, _) = self._seen.tolist()
        return Reading(ended - began, end - start) if first == second else None
