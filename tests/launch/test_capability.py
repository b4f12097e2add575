"""Every reason of every kernel, each by a problem that has it alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashcore.core.problem import Problem
from flashcore.core.target import A100, H100, L4, Target
from flashcore.launch.capability import reasons

SERVED = Problem(
    torch.float16, 2, 8, 8, 128, 128, 64, 64, (65536, 8192, 64), (65536, 8192, 64), (65536, 8192, 64), (65536, 8192, 64)
)
T4 = Target("Tesla T4", (7, 5), 40, 65_536, 65_536, 4 * 2**20)


@pytest.mark.parametrize("target", [H100, A100, L4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (96, 40), (256, 256)])
def test_portable_serves(target: Target, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    problem = dataclasses.replace(SERVED, dtype=dtype, head_dim=dims[0], head_dim_v=dims[1])
    assert reasons("portable", problem, target) == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16, float32, not float64"),
        ({"head_dim": 4}, "q and k is 4"),
        ({"head_dim": 65}, "q and k is 65"),
        ({"head_dim": 264}, "q and k is 264"),
        ({"head_dim_v": 260}, "v is 260"),
        ({"heads_q": 65_536}, "65,535 heads"),
        ({"is_causal": True, "seqlen_q": 2**20}, "1,048,560 query rows"),
        ({"seqlen_q": 2**31 - 1}, "query rows"),
        ({"seqlen_k": 2**31 - 1}, "keys"),
    ],
)
def test_portable_refuses(change: dict[str, object], says: str) -> None:
    (reason,) = reasons("portable", dataclasses.replace(SERVED, **change), H100)  # type: ignore[arg-type]
    assert says in reason


def test_portable_needs_ampere() -> None:
    (reason,) = reasons("portable", SERVED, T4)
    assert "8.0 or newer" in reason and "Tesla T4 has 7.5" in reason


def test_every_reason_is_given() -> None:
    wrong = dataclasses.replace(SERVED, dtype=torch.float64, head_dim=7, head_dim_v=300)
    assert len(reasons("portable", wrong, T4)) == 4


def test_hopper_refuses_fp32_for_its_dtype_alone() -> None:
    refused = reasons("hopper", dataclasses.replace(SERVED, dtype=torch.float32), H100)
    assert refused == ("it computes float16, bfloat16, not float32",)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="'portable'.*got 'hoper'"):
        reasons("hoper", SERVED, H100)
