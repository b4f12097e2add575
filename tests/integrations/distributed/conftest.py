"""Ranks of worker.py as processes of their own, over gloo; one set of 2, 3 and 4 each serves all tests."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("worker.py")
LIMIT_S = 90
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # a host's name need not resolve
}  # fmt: skip


def case_names() -> list[str]:
    functions = (node for node in ast.parse(WORKER.read_text()).body if isinstance(node, ast.FunctionDef))
    return [f.name for f in functions if any(ast.unparse(d) == "case" for d in f.decorator_list)]


def run_ranks(ranks: int, folder: Path) -> list[dict[str, str]]:
    """What came of every case, rank by rank: "" or the reason why it failed."""
    names = case_names()
    store = folder / "store"
    results = [folder / f"{rank}.json" for rank in range(ranks)]
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(ranks), store, results[rank], *names],
            cwd=ROOT, env=ENVIRONMENT, stdout=logs[rank], stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    end = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the cases that it did not come to say so
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = []
    for result, log in zip(results, logs, strict=True):
        log.seek(0)
        cases = json.loads(result.read_text()) if result.exists() else {}
        missing = f"not reached\n{log.read()[-4000:]}"
        found.append({name: cases.get(name, missing) for name in names})
        log.close()
    return found


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    return cache(lambda ranks: run_ranks(ranks, tmp_path_factory.mktemp(f"ranks{ranks}")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", case_names())
