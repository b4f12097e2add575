"""Ranks of worker.py as processes of their own, over gloo; one run of 2, 3 and 4 of them serves all tests."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("worker.py")
RANKS = (2, 3, 4)
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # a host's name need not resolve
}  # fmt: skip
Outcome = dict[int, list[dict[str, str]]]  # number of ranks -> rank by rank, case -> "" or the reason why it failed


def case_names() -> list[str]:
    functions = (node for node in ast.parse(WORKER.read_text()).body if isinstance(node, ast.FunctionDef))
    return [f.name for f in functions if any(ast.unparse(d) == "case" for d in f.decorator_list)]


def run_ranks(folder: Path) -> Outcome:
    command = [sys.executable, WORKER, folder, *map(str, RANKS)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    missing = f"not reached\n{done.stderr[-4000:]}"

    def read(ranks: int, rank: int) -> dict[str, str]:
        result = folder / f"{ranks}-{rank}.json"
        cases = json.loads(result.read_text()) if result.exists() else {}
        return {name: cases.get(name, missing) for name in case_names()}

    return {ranks: [read(ranks, rank) for rank in range(ranks)] for ranks in RANKS}


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Outcome]:
    return cache(lambda: run_ranks(tmp_path_factory.mktemp("ranks")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", case_names())
