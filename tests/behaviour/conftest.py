"""The ways on which one call of attention() can be computed; a test with a `route` runs on each of them.

    reference     CPU tensors, as a laptop computes them
    interpreter   CPU tensors, the portable kernel in Triton's interpreter (a process of its own: worker.py)
    portable      the portable kernel on a GPU
    chosen        whatever a GPU chooses by itself
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.fast.attention_production import attention
from flashcore.testing import require
from flashcore.testing.inputs import place
from flashcore.testing.problems import JUDGED

ROOT = Path(__file__).resolve().parents[2]


class Interpreter:
    """The worker process, started at the first call and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, *request: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
            )
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            succeeded, result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self.close()
            raise AssertionError(f"the interpreter's process ended with status {status}") from error
        if not succeeded:
            raise result
        return result

    def attention(self, *args: Any, target: str = "H100", **kwargs: Any) -> Any:
        """attention(), with the tile and the schedule that `target` of flashcore.core.target would get."""
        result, written = self.ask("call", target, args, kwargs)
        out = kwargs.get("out")
        if out is None:
            return result
        out.untyped_storage().copy_(written.untyped_storage())
        return (out, result[1]) if isinstance(result, tuple) else out

    def close(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
        return process.wait(timeout=60)


@dataclass(frozen=True)
class Route:
    """One of the ways; it takes CPU tensors and returns tensors on its own device."""

    name: str
    device: str
    backend: str | None
    interpreter: Interpreter | None = None

    def __call__(self, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        """attention() of these arguments; every tensor among them is placed on the route's device first."""
        placed = {id(value): self.place(value) for value in (q, k, v, *kwargs.values())}  # what is one stays one
        kwargs = {"backend": self.backend, **{name: placed[id(value)] for name, value in kwargs.items()}}
        compute = self.interpreter.attention if self.interpreter else attention
        return compute(placed[id(q)], placed[id(k)], placed[id(v)], *args, **kwargs)

    def checked(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """attention() with its lse, both through every gate."""
        out, lse = self(q, k, v, return_lse=True, **options)
        heads_first = [t.transpose(1, 2) if options.get("layout") == "bshd" else t for t in (out, q, k, v)]
        out_, q_, k_, v_ = (self.place(t) for t in heads_first)
        judged = {name: self.place(value) for name, value in options.items() if name in JUDGED}
        assert out.dtype == q.dtype and lse.dtype == torch.float32
        require(out_, q_, k_, v_, lse=lse, **judged)
        return out, lse

    @property
    def is_kernel(self) -> bool:
        return self.name != "reference"

    def examples(self, interpreted: int) -> int:
        """How many examples of a property to try here, when the interpreter can afford so many."""
        return (2 if self.device == "cuda" else 1) * interpreted

    def place(self, value: Any) -> Any:
        """A tensor on this route's device, with its strides, its alignment and the memory around it."""
        return place(value, self.device) if isinstance(value, Tensor) and value.device.type == "cpu" else value


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these take longer on two threads than on one, above all while both cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    worker = Interpreter()
    yield worker
    assert worker.close() in (0, None)


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("portable", "chosen")]


@pytest.fixture(scope="session", params=["reference", "interpreter", *ON_GPU])
def route(request: pytest.FixtureRequest, interpreter: Interpreter) -> Route:
    return {
        "reference": Route("reference", "cpu", None),
        "interpreter": Route("interpreter", "cpu", "portable", interpreter),
        "portable": Route("portable", "cuda", "portable"),
        "chosen": Route("chosen", "cuda", None),
    }[request.param]
