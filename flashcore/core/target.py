"""Facts of the GPUs FlashCore runs on or compiles for; the only place that queries a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU as the kernel selection sees it."""

    name: str
    capability: tuple[int, int]
    sms: int
    smem_per_block: int  #: bytes of shared memory that one block may opt in to
    smem_per_sm: int  #: bytes
    l2_bytes: int

    @property
    def arch(self) -> int:
        """Compute capability as one number, as 80, 89 or 90."""
        return self.capability[0] * 10 + self.capability[1]


# Datasheet values, used to choose and compile without the GPU; `current` reads the device itself.
H100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, 233_472, 50 * 2**20)
H200 = Target("NVIDIA H200", (9, 0), 132, 232_448, 233_472, 60 * 2**20)
A100 = Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 167_936, 40 * 2**20)
L4 = Target("NVIDIA L4", (8, 9), 58, 101_376, 102_400, 48 * 2**20)
KNOWN: tuple[Target, ...] = (H100, H200, A100, L4)


@cache
def current(device_index: int) -> Target:
    """The GPU with this CUDA index.

    Raises:
        RuntimeError: there is no CUDA device (torch's own message).
    """
    import torch

    p = torch.cuda.get_device_properties(device_index)
    return Target(
        p.name, (p.major, p.minor), p.multi_processor_count,
        p.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing from torch's stubs
        p.shared_memory_per_multiprocessor,
        p.L2_cache_size,
    )
