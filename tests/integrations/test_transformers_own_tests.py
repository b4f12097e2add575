"""The script that runs transformers' own tests: what it makes of two runs, and that it reaches the attention."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

TEST = "tests/models/bert/test_modeling_bert.py::BertModelTest::test_"
# What a checkout of transformers has for a model, in small.
CHECKOUT = """
import unittest

import torch
import transformers

class TinyModelTester:
    def __init__(self, attn_implementation="eager"):
        self.attn_implementation = attn_implementation

class BertModelTest(unittest.TestCase):
    def model(self, **asked):
        size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        return transformers.BertModel(transformers.BertConfig(**size, **asked))

    def forward(self, model):
        return model.train()(torch.ones(1, 4, dtype=int))

    def test_default(self):
        self.forward(self.model())

    def test_named(self):
        self.forward(self.model(attn_implementation="sdpa"))

    def test_tester(self):
        assert TinyModelTester().attn_implementation is None

    def test_is_sdpa(self):
        assert self.model().config._attn_implementation == "sdpa"

    def test_eager(self):
        assert self.model(attn_implementation="eager").config._attn_implementation == "eager"
"""


@pytest.fixture(scope="module")
def own() -> Any:
    path = Path(__file__).with_name("transformers_own_tests.py")
    spec = importlib.util.spec_from_file_location("transformers_own_tests", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(own: Any, implementation: str, calls: int = 3, **outcomes: str) -> dict[str, Any]:
    """A run's notes, read: of each test what came of it."""
    notes: list[dict[str, Any]] = []
    for name, outcome in outcomes.items():
        told = {"passed": {"calls": {implementation: 1}}, "failed": {"message": "wrong"}}.get(outcome, {})
        notes += [{"test": TEST + name, "outcome": own.UNFINISHED}, {"test": TEST + name, "outcome": outcome, **told}]
    return own.read_notes(map(json.dumps, [*notes, {"calls": {implementation: calls}}]))


def test_a_regression_is_a_test_that_passes_without_flashcore_and_not_with_it(own: Any) -> None:
    before = run(own, "sdpa", kept="passed", lost="passed", left="passed", gone="passed", never="failed", won="failed")
    after = run(own, "fcore", kept="passed", lost="failed", left="skipped", never="failed", won="passed")
    found = own.compare(before, after)
    names = ("lost", "left", "gone")
    errors = ("wrong", "skipped", "not run")
    assert found["regressions"] == {f"BertModelTest::test_{name}": e for name, e in zip(names, errors, strict=True)}
    assert set(found["failing_without"]) == {"BertModelTest::test_never", "BertModelTest::test_won"}
    assert found["runs"]["fcore"]["passed_calling"] == found["runs"]["fcore"]["passed"] == 2
    assert found["faults"] == []


def test_a_skipped_test_that_fails_with_flashcore_is_one_too(own: Any) -> None:
    before = run(own, "sdpa", ok="passed", aside="skipped", both="skipped", more="skipped")
    after = run(own, "fcore", ok="passed", aside="failed", both="skipped", more="passed")
    assert own.compare(before, after)["regressions"] == {"BertModelTest::test_aside": "wrong"}


def test_an_exception_is_told_with_its_reason(own: Any) -> None:
    error, reason = own.EXCEPTIONS["*::test_model_outputs_equivalence"]
    before, after = (run(own, name, good="passed", model_outputs_equivalence="passed") for name in ("sdpa", "fcore"))
    name = "BertModelTest::test_model_outputs_equivalence"
    after["tests"][name] = {"outcome": "failed", "message": f"UnsupportedError: {error}; use 'eager'"}
    found = own.compare(before, after)
    assert found["regressions"] == {}
    assert found["excepted"] == {name: {"error": f"UnsupportedError: {error}; use 'eager'", "reason": reason}}


def test_an_exception_is_one_test_and_one_error(own: Any) -> None:
    error, reason = own.EXCEPTIONS["*::test_model_outputs_equivalence"]
    assert own.reason_of("XModelTest::test_eager_matches_sdpa_inference_24_fp32_output_attentions", error) == reason
    assert own.reason_of("XModelTest::test_eager_matches_sdpa_inference_00_fp16_pad_left", error) is None
    assert own.reason_of("XModelTest::test_model_outputs_equivalence_more", error) is None
    assert own.reason_of("XModelTest::test_model_outputs_equivalence", "AssertionError: not close") is None


def test_runs_that_say_nothing_are_faults(own: Any) -> None:
    good, unfinished = run(own, "sdpa", a="passed"), {**run(own, "fcore", a="passed"), "calls": None}
    assert own.compare(good, unfinished)["faults"] == ["fcore: did not run to its end"]
    assert own.compare(good, run(own, "fcore", 0, a="passed"))["faults"] == ["fcore: 1 tests passed, 0 calls of it"]
    silent = own.compare(good, run(own, "sdpa", a="passed"))["faults"]
    assert silent == ["fcore: 1 tests passed, 0 calls of it", "fcore: 3 calls of sdpa"]


def test_a_test_has_failed_when_any_part_of_it_did(own: Any) -> None:
    notes = [{"test": TEST + "a", "outcome": outcome, "message": "wrong"} for outcome in ("failed", "passed")]
    assert own.read_notes(map(json.dumps, notes))["tests"]["BertModelTest::test_a"]["outcome"] == "failed"


def test_what_resolves_to_sdpa_is_computed_by_flashcore(own: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the integrations extra")
    folder = tmp_path / "tests" / "models" / "bert"
    folder.mkdir(parents=True)
    (folder / "test_modeling_bert.py").write_text(CHECKOUT)
    found = own.compare(*(own.run_apart(tmp_path, "bert", name, tmp_path, []) for name in (own.BASELINE, own.FCORE)))
    assert found["faults"] == [] and found["failing_without"] == {}, (tmp_path / "bert-fcore.log").read_text()
    assert list(found["regressions"]) == ["BertModelTest::test_is_sdpa"]
    assert [found["runs"][name]["calls"] for name in (own.BASELINE, own.FCORE)] == [{"sdpa": 2}, {"fcore": 2}]
    assert found["runs"]["fcore"]["passed_calling"] == 2
