"""What this GPU can do at best, measured in the same process as everything that is held against it."""

from __future__ import annotations

from typing import Any

import torch
import triton

from flashcore.measure.clocks import Contestant, gpu_times
from flashcore.measure.statistics import median

MATMUL = 8192


def _nothing() -> None:
    pass


_empty_kernel = triton.jit(_nothing)


def ceilings(l2_bytes: int) -> dict[str, float]:
    """fp16 matmul (TFLOP/s), copies inside the L2 and through HBM (TB/s, read and write counted), an empty kernel (µs).

    All on the gpu clock. The copy inside the L2 touches half of it; the one through HBM 2 GiB. The SMs make both, as
    they do attention's loads and stores: a plain copy could go to a copy engine.
    """
    matrix = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.float16)
    product = torch.empty_like(matrix)
    small, large = (torch.randn(size // 4, device="cuda") for size in (l2_bytes // 4, 2**30))
    small_copy, large_copy = torch.empty_like(small), torch.empty_like(large)
    work: dict[str, Any] = {
        "matmul": lambda: torch.mm(matrix, matrix, out=product),
        "l2": lambda: torch.neg(small, out=small_copy),
        "hbm": lambda: torch.neg(large, out=large_copy),
        "empty": lambda: _empty_kernel[(1,)](enable_fp_fusion=True),  # from Triton 3.9 on, leaving it open warns
    }
    times, _ = gpu_times({name: Contestant([call]) for name, call in work.items()}, replays=20)
    microseconds = {name: median(values) for name, values in times.items()}
    return {
        "matmul_tflops": 2.0 * MATMUL**3 / microseconds["matmul"] / 1e6,
        "l2_copy_tb_s": 2.0 * small.nbytes / microseconds["l2"] / 1e6,
        "hbm_copy_tb_s": 2.0 * large.nbytes / microseconds["hbm"] / 1e6,
        "empty_kernel_us": microseconds["empty"],
    }
