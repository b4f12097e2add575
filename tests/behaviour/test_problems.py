"""Every option together with every other: random problems of attention() and attention_varlen() through every gate.

In Triton's interpreter they are small, on a GPU `python -m flashcore.testing.problems` runs as many as one likes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.core import target as targets
from flashcore.core.errors import UnsupportedError
from flashcore.launch import capability, compiled, portable
from flashcore.launch.arguments import Options, packed_problem_of, problem_of
from flashcore.launch.binding import packed_tiles
from flashcore.launch.select import select
from flashcore.testing.problems import (
    KIN,
    LARGEST_LOGIT,
    LONGEST,
    MASK_DTYPES,
    Call,
    draw,
    random_problem,
    repro,
    run,
    run_seed,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = 40  # rows, and keys, of a sequence
STEP = KIN + 1  # each with another kernel
IN_EACH_PROCESS = 800


def test_thousands_of_problems_in_the_interpreter() -> None:
    """The portable kernel; what fails prints the command that repeats it."""
    command = [sys.executable, "-W", "ignore", "-m", "flashcore.testing.problems", "--device", "cpu"]
    command += ["--backend", "portable", "--longest", str(SMALL), "--step", str(STEP), "--count", str(IN_EACH_PROCESS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    at_once = [
        subprocess.Popen(
            [*command, str(first)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for first in (0, IN_EACH_PROCESS * STEP)
    ]
    said = [process.communicate()[0] for process in at_once]
    assert [process.returncode for process in at_once] == [0, 0], "\n".join(said)
    assert all(f"{IN_EACH_PROCESS} problems: 0 wrong, 0 refused" in text for text in said)


def test_the_reference_path() -> None:
    assert [run_seed(seed, "reference") for seed in range(0, 400 * STEP, STEP)] == [""] * 400


def test_any_problem(interpreter: Any) -> None:
    """The same space drawn by hypothesis, which looks for the smallest problem that fails."""

    @given(st.randoms(note_method_calls=False, use_true_random=False))
    @settings(max_examples=60)
    def holds(random: Random) -> None:
        call = draw(random, random, SMALL)
        assert interpreter.ask("problem", call) == "", call

    holds()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["portable", "hopper", None])
def test_on_a_gpu(backend: str | None) -> None:
    refused = 0
    for seed in range(300):
        try:
            assert run_seed(seed, backend, "cuda") == ""
        except UnsupportedError:
            refused += 1
    assert refused < 300 if backend == "hopper" else refused == 0


# -- the generator ------------------------------------------------------------------------------------------------


def kinds(call: Call) -> set[str]:
    """What is asked for, in the words of the parameters."""
    given = {**call.options, **call.tensors}
    found = {name for name in ("is_causal", "return_lse", "out", "block_m", "softcap") if given.get(name)}
    found |= {name for name in ("scale", "window", "attn_mask", "seqused_k", "cu_seqlens_q") if name in given}
    if given.get("layout") == "bshd":
        found.add("bshd")
    if call.tensors["q"].shape[-1] != call.tensors["v"].shape[-1]:
        found.add("Dv")
    return found


def test_every_option_meets_every_other() -> None:
    met: Counter[frozenset[str]] = Counter()
    masks: set[tuple[torch.dtype, bool, bool]] = set()
    for seed in range(0, 3000 * STEP, STEP):
        call = random_problem(seed, SMALL)
        met.update(map(frozenset, combinations(sorted(kinds(call)), 2)))
        if (mask := call.tensors.get("attn_mask")) is not None:
            masks.add((mask.dtype, mask.stride(-1) > 1, mask.data_ptr() % 16 == 0))
    names = {name for pair in met for name in pair}
    assert len(names) == 12
    never = {frozenset(pair) for pair in combinations(sorted(names), 2)} - set(met)
    assert never == {frozenset({"cu_seqlens_q", name}) for name in ("attn_mask", "seqused_k", "bshd")}
    forms = ((False, True), (False, False), (True, True))
    assert masks == {(dtype, *form) for dtype in MASK_DTYPES for form in forms}


@pytest.mark.parametrize(("longest", "block_m"), [(SMALL, 16), (LONGEST, 64)])
def test_packed_sequences_meet_both_grids(longest: int, block_m: int) -> None:
    met: Counter[bool] = Counter()
    for seed in range(0, 400 * STEP, STEP):
        if (call := random_problem(seed, longest)).packed:
            q, k, v = (call.tensors[name] for name in "qkv")
            most = call.options["max_seqlen_q"], call.options["max_seqlen_k"]
            sequences = len(call.tensors["cu_seqlens_q"]) - 1
            met[packed_tiles(packed_problem_of(q, k, v, None, sequences, *most, Options()), block_m) > 0] += 1
    assert min(met[False], met[True]) > 5


def test_the_hopper_kernel_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_triton", lambda: capability.TRITON_RELEASES[0])
    chosen: Counter[str] = Counter()
    for seed in range(0, 200 * STEP, STEP):
        call = random_problem(seed)
        given = Options(**{name: call.options[name] for name in Options._fields if name in call.options})
        if not call.packed:
            q, k, v = (call.tensors[name] for name in "qkv")
            asked = problem_of(q, k, v, None, given, call.tensors.get("attn_mask"), call.tensors.get("seqused_k"))
            chosen[select(asked, targets.H100, block_m=given.block_m, block_n=given.block_n).kernel] += 1
    assert chosen["hopper"] > chosen.total() / 4 and chosen["portable"] > chosen.total() / 4


def test_no_logit_is_larger_than_promised() -> None:
    reached = 0.0
    for seed in range(0, 400 * STEP, STEP):
        call = random_problem(seed, SMALL)
        q, k = (call.tensors[name].double().nan_to_num(0.0, 0.0, 0.0) for name in "qk")
        if q.numel() and k.numel():
            norms = [t.norm(dim=-1).max().item() for t in (q, k)]
            reached = max(reached, abs(call.options.get("scale", q.shape[-1] ** -0.5)) * norms[0] * norms[1])
    assert 2.0**26 < reached < 1.001 * LARGEST_LOGIT


def test_a_problem_is_its_seed_s() -> None:
    for seed in (0, 12345, 10**9):
        one, two = random_problem(seed), random_problem(seed)
        assert str(one) == str(two)
        assert all(torch.equal(t, two.tensors[n]) or t.isnan().any() for n, t in one.tensors.items())
    assert str(random_problem(1)) != str(random_problem(2))


def test_kin_share_their_kernels() -> None:
    """A GPU's time goes into running problems, not into compiling one kernel for each."""

    def identity(call: Call) -> Any:
        given = {name: call.options[name] for name in Options._fields if name in call.options}
        q, k, v = (call.tensors[name] for name in "qkv")
        options = Options(**given)
        if call.packed:
            sequences = len(call.tensors["cu_seqlens_q"]) - 1
            most = call.options["max_seqlen_q"], call.options["max_seqlen_k"]
            problem = packed_problem_of(q, k, v, None, sequences, *most, options)
        else:
            problem = problem_of(q, k, v, None, options, call.tensors.get("attn_mask"), call.tensors.get("seqused_k"))
        config = select(problem, targets.H100, backend="portable", block_m=options.block_m, block_n=options.block_n)
        return compiled.identity(portable.bind(problem, config, options.scale_for(q.shape[-1])))

    families = range(0, 20 * KIN, KIN)
    kernels = [len({identity(random_problem(first + i)) for i in range(KIN)}) for first in families]
    assert sum(kernels) / len(kernels) < 0.2 * KIN, kernels


def test_a_wrong_result_names_the_command_that_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.fast import attention_production

    right = attention_production.attention
    calls = ((seed, random_problem(seed)) for seed in range(0, 10**6, KIN))
    seed = next(seed for seed, call in calls if not call.packed and call.options["return_lse"])
    assert run(random_problem(seed)) == ""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)
        return out.mul_(1.01), lse

    monkeypatch.setattr(attention_production, "attention", wrong)
    failure = run_seed(seed)
    assert failure.startswith(repro(seed, None, "cpu") + "\n") and "exceeds" in failure
