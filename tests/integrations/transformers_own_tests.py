"""transformers' own tests of four models, with its default attention and with FlashCore's, and where they differ.

    python tests/integrations/transformers_own_tests.py CHECKOUT [--json PATH] [--models bert vit] [pytest's arguments]

CHECKOUT is transformers' repository at the commit nearest to the installed transformers, which is the one tested: its
package has no tests. Needs what these tests import (parameterized, accelerate, datasets). Every file runs twice, in
processes of their own, offline and without the tests marked slow. In the second run whatever resolves to "sdpa", the
default, resolves to "fcore". In both, attention dropout is 0, as FlashCore serves no other, and a tester that names an
implementation by itself takes the default. Tests that ask for "eager", to read the weights, get it in both.

Exit status 0: every test that passes without FlashCore passes with it, but for those in `EXCEPTIONS`; all files ran to
their end, called FlashCore in the second run and never in the first, and never called "sdpa" in the second.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("bert", "llama", "vit", "whisper")
BASELINE, FCORE = "sdpa", "fcore"  # the runs, named by the implementation that is the default in them
# FSDP and tensor parallelism are tested in processes that the plugin is not in.
MARKED = "not is_fsdp_test and not is_tensor_parallel_test"
UNFINISHED = "unfinished"  # the process ended in this test
OUTCOMES = ("passed", "failed", "skipped", UNFINISHED)
ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob")  # as configurations call that of attention
# Class::test, as fnmatch has it -> the error that it must fail with, and why it can't pass with FlashCore.
_NAME = ("AssertionError: False is not true", "expects the configuration to say 'sdpa', where it says 'fcore'")
_WEIGHTS = (
    "output_attentions: the weights are never held in memory",
    "asks for the attention weights, which 'sdpa' leaves away with a warning and 'fcore' refuses to",
)
EXCEPTIONS = {
    "*::test_can_set_attention_dynamically": _NAME,
    "*::test_sdpa_can_dispatch_non_composite_models": _NAME,
    "*::test_capture_outputs_decorator": _WEIGHTS,
    "*::test_eager_matches_sdpa_inference_*_output_attentions": _WEIGHTS,
    "*::test_model_outputs_equivalence": _WEIGHTS,
}


# -- one file, one implementation -------------------------------------------------------------------------------


class Plugin:
    """Makes one implementation the default, counts the calls of both, and notes what each test does, a line each."""

    def __init__(self, implementation: str, notes: TextIO) -> None:
        self.implementation, self.notes = implementation, notes
        self.calls: Counter[str] = Counter()
        self.before: Counter[str] = Counter()

    def pytest_configure(self) -> None:
        # Imported before the checkout's conftest.py puts its own transformers in front of the installed one.
        from transformers import AttentionInterface, PreTrainedModel
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        from flashcore.integrations import transformers as fcore

        fcore.register()
        for name in (BASELINE, FCORE):
            AttentionInterface.register(name, self.counted(name, ALL_ATTENTION_FUNCTIONS[name]))
        resolve, construct = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.__init__

        @functools.wraps(resolve)
        def resolved(*args: Any, **kwargs: Any) -> str:
            found = resolve(*args, **kwargs)
            return self.implementation if found == BASELINE else found

        @functools.wraps(construct)
        def constructed(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            for name in DROPOUTS:
                if hasattr(config, name):
                    setattr(config, name, 0.0)
            construct(model, config, *args, **kwargs)

        PreTrainedModel.get_correct_attn_implementation = resolved
        PreTrainedModel.__init__ = constructed

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # where a count would be a reason to compile again
                self.calls[name] += 1
            return function(*args, **kwargs)

        return call

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for module in {item.module for item in items if isinstance(item, pytest.Function)}:
            for name, tester in inspect.getmembers(module, inspect.isclass):
                if name.endswith("ModelTester") and "attn_implementation" in inspect.signature(tester).parameters:
                    tester.__init__ = functools.partialmethod(tester.__init__, attn_implementation=None)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.before = self.calls.copy()
        self.note(test=nodeid, outcome=UNFINISHED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else report.longreprtext.strip().splitlines()[-1]
            self.note(test=report.nodeid, outcome="failed", message=message.splitlines()[0])
        elif report.skipped:
            self.note(test=report.nodeid, outcome="skipped")
        elif report.when == "call":
            self.note(test=report.nodeid, outcome="passed", calls=dict(self.calls - self.before))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in ENDED:
            self.note(calls=dict(self.calls))

    def note(self, **found: Any) -> None:
        print(json.dumps(found), file=self.notes, flush=True)


def run_here(checkout: Path, model: str, implementation: str, notes: Path, arguments: list[str]) -> int:
    file = checkout / "tests" / "models" / model / f"test_modeling_{model}.py"
    options = [str(file), f"--rootdir={checkout}", "-p", "no:cacheprovider", "-m", MARKED, "--tb=short"]
    with notes.open("w") as stream:
        return int(pytest.main([*options, *arguments], plugins=[Plugin(implementation, stream)]))


# -- all of them ------------------------------------------------------------------------------------------------


def run_apart(checkout: Path, model: str, implementation: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    notes, log = (folder / f"{model}-{implementation}.{kind}" for kind in ("notes", "log"))
    command = [sys.executable, __file__, str(checkout), "--one", model, implementation, str(notes), *arguments]
    with log.open("wb") as stream:
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=checkout, stdout=stream, stderr=subprocess.STDOUT, env=offline, check=False)
    return read_notes(notes.read_text().splitlines() if notes.exists() else ())


def read_notes(lines: Iterable[str]) -> dict[str, Any]:
    """What is known of one run: `tests`, each by its Class::test, and the `calls`; None if it did not end."""
    tests: dict[str, dict[str, Any]] = {}
    calls = None
    for line in lines:
        found = json.loads(line)
        if "test" not in found:
            calls = found["calls"]
            continue
        name = found["test"].split("::", 1)[1]
        if tests.get(name, {}).get("outcome") != "failed":  # nor is it passed when a part of it or its teardown fails
            tests[name] = found
    return {"tests": tests, "calls": calls}


def compare(baseline: dict[str, Any], fcore: dict[str, Any]) -> dict[str, Any]:
    """One model's entry in the record, of its two runs."""
    excepted, regressions = {}, {}
    for name, test in baseline["tests"].items():
        now = fcore["tests"].get(name, {"outcome": "not run"})
        if lost(test["outcome"], now["outcome"]):
            error = now.get("message", now["outcome"])
            reason = reason_of(name, error)
            if reason is None:
                regressions[name] = error
            else:
                excepted[name] = {"error": error, "reason": reason}
    runs = {
        name: {
            "complete": run["calls"] is not None,
            **{outcome: sum(test["outcome"] == outcome for test in run["tests"].values()) for outcome in OUTCOMES},
            "passed_calling": sum(name in test.get("calls", ()) for test in run["tests"].values()),
            "calls": run["calls"] or {},
        }
        for name, run in ((BASELINE, baseline), (FCORE, fcore))
    }
    failing = {name: test["message"] for name, test in baseline["tests"].items() if test["outcome"] == "failed"}
    return {
        "runs": runs, "regressions": regressions, "excepted": excepted, "failing_without": failing,
        "faults": list(faults(runs)),
    }  # fmt: skip


def lost(before: str, now: str) -> bool:
    """A test that only FlashCore makes fail, or keeps from passing."""
    return before != now and (before == "passed" or now in ("failed", UNFINISHED)) and before != "failed"


def source_of(checkout: Path) -> dict[str, Any]:
    """The commit of the tests, and the files that are not as it has them."""

    def git(*command: str) -> list[str]:
        return subprocess.check_output(["git", "-C", str(checkout), *command], text=True).split()

    return {"tests_commit": git("rev-parse", "HEAD")[0], "tests_changed": git("diff", "--name-only", "HEAD")}


def reason_of(test: str, error: str) -> str | None:
    """Why this test may fail with this error; None where it may not."""
    for pattern, (expected, reason) in EXCEPTIONS.items():
        if fnmatchcase(test, pattern) and expected in error:
            return reason
    return None


def faults(runs: dict[str, Any]) -> Iterable[str]:
    """Why two runs say nothing about FlashCore."""
    for name, other in ((BASELINE, FCORE), (FCORE, BASELINE)):
        run = runs[name]
        if not run["complete"]:
            yield f"{name}: did not run to its end"
        elif not run["passed"] or not run["calls"].get(name):
            yield f"{name}: {run['passed']} tests passed, {run['calls'].get(name, 0)} calls of it"
        if run["calls"].get(other):
            yield f"{name}: {run['calls'][other]} calls of {other}"


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("checkout", type=Path, help="transformers' repository")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--processes", type=int, default=2, help="at once (default 2)")
    parser.add_argument("--logs", type=Path, help="where pytest's output is kept (default nowhere)")
    parser.add_argument("--json", type=Path, help="where to write the record (default nowhere)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen, arguments = parser.parse_known_args()
    checkout = chosen.checkout.resolve()
    if chosen.one:
        model, implementation, notes = chosen.one
        return run_here(checkout, model, implementation, Path(notes), arguments)

    from flashcore.benchmark import own_tests_text, results
    from flashcore.measure import machine

    jobs = [(model, implementation) for model in chosen.models for implementation in (FCORE, BASELINE)]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(chosen.processes) as pool:
        folder = (chosen.logs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = dict(zip(jobs, pool.map(lambda job: run_apart(checkout, *job, folder, arguments), jobs), strict=True))
    models = {model: compare(found[model, BASELINE], found[model, FCORE]) for model in chosen.models}
    sound = not any(entry["faults"] for entry in models.values())
    good = sound and not any(entry["regressions"] for entry in models.values())
    record = {
        "kind": own_tests_text.KIND,
        "environment": machine.environment(),
        "transformers": {"version": machine.installed("transformers"), **source_of(checkout)},
        "protocol": {
            "attention_dropout": 0,
            "slow_tests": False,
            "offline": True,
            "marked": MARKED,
            "arguments": arguments,
        },
        "complete": sound and set(chosen.models) == set(MODELS) and not arguments,
        "good": good,
        "models": models,
    }
    if chosen.json:
        results.write(chosen.json, record)
    print(json.dumps({name: record[name] for name in ("transformers", "good", "models")}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # it was this folder, where "transformers" is none
    sys.exit(main())
