"""Runs the portable kernel in Triton's interpreter, for test_portable.py: pickled requests in, pickled answers out.

TRITON_INTERPRET decides for a whole process what a kernel is, and an address out of bounds ends the process.
"""

from __future__ import annotations

import os
import pickle
import sys

import torch
from torch import Tensor

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.launch import compiled, portable

torch.set_num_threads(1)


def run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config, is_causal: bool, scale: float, fold: bool
) -> tuple[Tensor, Tensor]:
    """The kernel with exactly this configuration, into `out`; `fold`: as if the batch passed the grid's limit."""
    (b, hq, sq, d), (_, hkv, sk, dv) = q.shape, v.shape
    strides = [t.stride()[:3] for t in (q, k, v, out)]
    problem = Problem(q.dtype, b, hq, hkv, sq, sk, d, dv, *strides, is_causal=is_causal, return_lse=True)
    limit, portable._MAX_GRID_Z = portable._MAX_GRID_Z, 0 if fold else 65_535
    binding = portable.bind(problem, config, scale)
    portable._MAX_GRID_Z = limit
    lse = torch.full((b, hq, sq), float("nan"))
    compiled.interpret(binding, {"q": q, "k": k, "v": v, "o": out, "lse": lse})
    return out, lse


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        q, k, v, out, far, *rest = request
        if far:  # the same keys, each so far from the last that the tile spans more than 2^31 elements
            apart = torch.empty(k.shape[2] * far, dtype=k.dtype).as_strided(k.shape, (0, 0, far, 1))
            k = apart.copy_(k)
        pickle.dump(run(q, k, v, out, *rest), answers)
        answers.flush()
