"""How the GPU tests are dealt to processes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def run_on_gpu() -> Any:
    path = Path(__file__).with_name("run_on_gpu.py")
    spec = importlib.util.spec_from_file_location("run_on_gpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_on_gpu"] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


TESTS = [
    *(f"tests/behaviour/test_conventions.py::test_dims[{i}]" for i in range(300)),
    *(f"tests/fast/test_gradients_gpu.py::test_ways[{i}]" for i in range(80)),
    *(f"tests/integrations/test_transformers.py::test_model[{i}]" for i in range(8)),
    *(f"tests/launch/test_ops.py::test_opcheck[{i}]" for i in range(10)),
    "tests/behaviour/test_problems.py::test_on_a_gpu",
    "tests/benchmark/test_host.py::test_on_a_gpu",
    "tests/security/test_timing.py::test_on_a_gpu",
]


def test_every_test_is_in_one_shard_and_those_that_measure_are_alone(run_on_gpu: Any) -> None:
    names = [f"{i}/7" for i in range(7)] + [run_on_gpu.ALONE]
    dealt = [run_on_gpu.share(TESTS, name) for name in names]
    assert sorted(test for shard in dealt for test in shard) == sorted(TESTS)
    assert dealt[-1] == TESTS[-2:]


def test_shards_take_about_as_long(run_on_gpu: Any) -> None:
    loads = [sum(map(run_on_gpu.seconds, run_on_gpu.share(TESTS, f"{i}/7"))) for i in range(7)]
    assert max(loads) <= max(1.3 * sum(loads) / 7, *map(run_on_gpu.seconds, TESTS))
    slow, usual = (run_on_gpu.seconds(f"tests/{room}/test_x.py::test") for room in ("integrations", "kernels"))
    assert slow > usual


def test_one_shard_has_them_all(run_on_gpu: Any) -> None:
    assert sorted(run_on_gpu.share(TESTS, "0/1")) == sorted(TESTS[:-2])
