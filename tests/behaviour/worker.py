"""Calls attention() in a process of its own, where Triton interprets its kernels: conftest.py speaks with it.

TRITON_INTERPRET decides for a whole process what a kernel is, and other tests of the same run compile them; and a
kernel that reads outside of its tensors ends this process, not the tests. Requests and answers are pickles on stdin
and stdout; tensors travel with all the memory around them, so that what was written beside an output comes back too.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from typing import Any

import torch

from flashcore.core import target as targets
from flashcore.fast.attention_production import attention
from flashcore.launch import portable
from flashcore.testing.mutants import MUTANTS, plant
from flashcore.testing.problems import run

torch.set_num_threads(1)
# The interpreter computes with numpy, which warns of infinities and NaN where a GPU does not.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
KERNEL, BIND = portable.attention_forward, portable.bind
TARGETS = {"H100": targets.H100, "A100": targets.A100}


def answer(request: tuple[Any, ...]) -> Any:
    kind, *rest = request
    if kind == "call":
        targets.H100 = TARGETS[rest[0]]  # the one whose tile launch/cpu.py takes
        args, kwargs = rest[1:]
        return attention(*args, **kwargs), kwargs.get("out")
    if kind == "problem":
        return run(rest[0], "portable")
    if kind == "plant":
        (name,) = rest
        module = None if name is None else plant(MUTANTS[name])
        portable.attention_forward = getattr(module, "attention_forward", KERNEL)
        portable.bind = getattr(module, "bind", BIND)
        return None
    raise ValueError(kind)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints is no answer
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            reply: Any = (True, answer(request))
        except Exception as error:
            reply = (False, error)
        pickle.dump(reply, answers)
        answers.flush()
