"""A slice of `flashcore audit faults` on both launch paths, and its controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashcore import reference
from flashcore.fast.attention_production import attention
from flashcore.launch.arguments import LARGEST
from flashcore.security import arguments_drawn, fake_gpu, faults


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["python", "shim"])
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "python":
        yield None
        return
    with fake_gpu.native() as module:
        if module is None:
            pytest.skip("no compiled path here")
        yield module


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_after_a_fault(fault: Any, native: Any) -> None:
    found = faults.inject(3 if fault in faults.RARELY else 10, 7, native, [fault])
    assert not found["broken"]


def test_random_arguments(native: Any) -> None:
    found = arguments_drawn.try_all(1_500, 3, native)
    assert not found["wrong"], found["examples"]
    assert found["problems"] > 300 and found["launched"] > 200


def test_swallowed_errors_of_the_driver_are_noticed() -> None:
    assert faults.control(0) == 20


def test_a_launch_path_without_checks_is_caught() -> None:
    assert faults.unchecked(500, 0)


def test_numbers_that_float32_cannot_hold_are_refused_before_anything_else() -> None:
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0)).half()
    for scale in (10**400, 1e300, 2 * LARGEST, float("nan")):
        with pytest.raises(ValueError, match="scale: expected"):
            attention(q, q, q, scale=scale)
    for softcap in (10**400, 1e300, 1e-300, -1.0):
        with pytest.raises(ValueError, match="softcap: expected"):
            attention(q, q, q, softcap=softcap)
    assert torch.equal(attention(q, q, q, window=(2**63 - 1, 2**62)), attention(q, q, q))
    for options in ({"window": (2**63, 0)}, {"block_m": 2**63}, {"block_n": -(10**400)}):
        with pytest.raises(ValueError, match=": expected"):
            attention(q, q, q, **options)  # type: ignore[arg-type]
    assert torch.equal(attention(q, q, q, scale=2), attention(q, q, q, scale=2.0))
    assert not reference.cpu(q, q, q, scale=2**50).isnan().any()
