"""What every test shares: `gpu` tests wait for a GPU, and properties are drawn from a fixed seed."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A kernel interpreted on two busy cores takes seconds; that is slow, not wrong. Fixed examples keep a red run red.
settings.register_profile(
    "flashcore", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("flashcore")

# A test that is not about the graph node in C++ begins no build of it: no compiler runs beside what measures time.
os.environ["FLASHCORE_NODE"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
