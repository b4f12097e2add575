"""The benchmarks of whole models and of gradients, on the CPU with clocks that read its time."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from flashcore.benchmark import bench, gradients, models
from flashcore.benchmark.isolation import Journal

needs_transformers = pytest.mark.usefixtures("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs the integrations extra")


class Event:
    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Cpu:
    event = Event
    captured = 0

    def synchronize(self):
        pass

    def capture(self, calls):
        self.captured += 1
        return lambda: [call() for call in calls]


@pytest.fixture
def small(transformers, monkeypatch):
    def bert():
        config = transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
        )
        return transformers.BertModel(models._lively(config), add_pooling_layer=False), "random"

    def vit():
        config = transformers.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32,
            patch_size=8,
        )  # fmt: skip
        return transformers.ViTModel(models._lively(config), add_pooling_layer=False), "random"

    monkeypatch.setitem(models.MODELS, "minilm", models.Model("tiny", bert))
    monkeypatch.setitem(models.MODELS, "vit-b16", models.Model("tiny", vit, of_text=False))


@pytest.mark.parametrize("name", ["minilm", "vit-b16"])
def test_a_case_of_a_model(name, small):
    served = models.Served(name, torch.device("cpu"))
    assert {n: m.config._attn_implementation for n, m in served.models.items()} == {n: n for n in models.NAMES}
    assert len({next(m.parameters()).data_ptr() for m in served.models.values()}) == 1  # the weights are shared
    device = Cpu()
    found = models.measure(served, 3, 12, 3, device)
    assert device.captured == 3
    for each in found["contestants"].values():
        assert each["status"] == "ok" and each["error"] < 5e-3
        for mode in models.MODES:
            assert each[mode]["call"]["n"] == 3
            assert each[mode]["sequences_per_s"] == pytest.approx(3e6 / each[mode]["call"]["p50"])
    entry = json.loads(json.dumps({"case": models.label((name, 3, 12)), **found}))
    text = models.line(entry)
    assert text.count("x") == 2 and len(text) == len(models.HEADER)
    ratio = found["contestants"]["sdpa"]["CUDA graph"]["over_fcore"]["value"]
    assert models.means([entry])["CUDA graph"] == pytest.approx(ratio)


def test_a_wrong_model_and_one_that_fails_have_no_times(small, transformers, request):
    from flashcore.integrations import transformers as fcore

    def wrong(module, q, k, v, *rest, **named):
        return fcore.attend(module, q, k, v.roll(1, 2), *rest, **named)

    served = models.Served("minilm", torch.device("cpu"))
    request.addfinalizer(fcore.register)
    transformers.AttentionInterface.register("fcore", wrong)

    def fall(*args, **kwargs):
        raise RuntimeError("it fell over")

    served.models["sdpa"].forward = fall
    found = models.measure(served, 2, 8, 2, Cpu())["contestants"]
    assert {n: each["status"] for n, each in found.items()} == {"fcore": "wrong", "sdpa": "failed", "eager": "ok"}
    assert [n for n, each in found.items() if models.MODES[0] in each] == ["eager"]
    text = models.line({"case": "tiny", "contestants": found})
    assert "it fell over" in text and "relative error" in text


def test_a_checkpoint_in_16_bits_is_still_judged_by_fp32(small, monkeypatch):
    make = models.MODELS["minilm"].make
    monkeypatch.setitem(models.MODELS, "minilm", models.Model("tiny", lambda: (make()[0].half(), "real")))
    found = models.measure(models.Served("minilm", torch.device("cpu")), 2, 8, 2, Cpu())["contestants"]
    assert all(each["status"] == "ok" and each["error"] > 0 for each in found.values())


def test_a_model_that_cannot_be_captured_is_still_called(small):
    class Refusing(Cpu):
        def capture(self, calls):
            raise RuntimeError("capture is not permitted")

    found = models.measure(models.Served("minilm", torch.device("cpu")), 1, 8, 2, Refusing())["contestants"]
    assert all(models.MODES[0] in each and models.MODES[1] not in each for each in found.values())
    assert "no graph" in models.line({"case": "tiny", "contestants": found})


def test_texts_of_a_batch_are_padded(small):
    served = models.Served("minilm", torch.device("cpu"))
    given = models.inputs(served.exact, 8, 20, torch.device("cpu"))
    lengths = given["attention_mask"].sum(1)
    assert lengths[0] == 20 and lengths.min() >= 10 and len(set(lengths.tolist())) > 2
    assert (given["attention_mask"].diff(dim=1) <= 0).all()


def test_the_worker_goes_on_where_it_stopped(small, monkeypatch, tmp_path):
    monkeypatch.setattr(models.clocks, "Cuda", Cpu)
    path = tmp_path / "journal"
    todo = models.cases(["minilm", "vit-b16"], [1], [8, 12])
    assert [models.label(case) for case in todo] == ["minilm B1 S8", "minilm B1 S12", "vit-b16 B1 S197"]
    models.work(todo[:1], 2, path, "cpu")
    measured = []
    real = models.measure
    monkeypatch.setattr(models, "measure", lambda *args: (measured.append(args[1:3]), real(*args))[1])
    models.work(todo, 2, path, "cpu")
    assert measured == [(1, 12), (1, 197)]
    assert list(Journal.read(path).cases) == [models.label(case) for case in todo]


def scripted(timed, device):
    return {name: [1.0, 1.5] for name in timed}, dict.fromkeys(timed, 4)


@pytest.mark.parametrize("problem", gradients.PROBLEMS, ids=lambda p: p.name)
def test_a_case_of_gradients(problem, monkeypatch):
    small = gradients.Problem(
        problem.name, 2, problem.heads // 3, max(1, problem.heads_kv // 3), 16, problem.is_causal, problem.padded
    )
    monkeypatch.setattr(gradients.clocks, "gpu_times", scripted)
    found = gradients.measure(small, 3, Cpu(), "cpu")
    ours = found["contestants"]["flashcore"]
    assert ours["status"] == "ok" and ours["error"] < 5e-3 and ours["call"]["n"] == 3
    assert found["contestants"]["sdpa"]["gpu_warm"]["over_flashcore"]["value"] == 1.0
    assert problem.name in gradients.line(json.loads(json.dumps(found)))


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    def wrong(q, k, v, problem, mask):
        return gradients.attention(q, k, v) * 1.01

    monkeypatch.setitem(gradients.CONTESTANTS, "flashcore", wrong)
    monkeypatch.setattr(gradients.clocks, "gpu_times", scripted)
    found = gradients.measure(gradients.Problem("tiny", 1, 2, 2, 16), 2, Cpu(), "cpu")
    ours = found["contestants"]["flashcore"]
    assert ours["status"] == "wrong" and "call" not in ours
    assert "over_flashcore" not in found["contestants"]["sdpa"]["call"]
    assert "relative error" in gradients.line(found)


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is this CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (models, gradients):
        monkeypatch.setattr(module.clocks, "Cuda", Cpu)
        monkeypatch.setattr(module.machine, "environment", lambda: {"gpu": "NVIDIA H100", "recorded": "2026-11-28"})
        monkeypatch.setattr(module.machine, "gpu_state", dict)
    monkeypatch.setattr(gradients.clocks, "gpu_times", scripted)


def test_a_run_of_models(small, pretended, monkeypatch, tmp_path, capsys):
    real, wrong = models.measure, []

    def in_this_process(command, path, *, patience_s, budget_s, heard):
        assert command[1:4] == ["-m", "flashcore.benchmark.models", "--models"] and command[-2] == "--worker"
        models.work(models.cases(["minilm"], [1, 2], [8]), 2, path, "cpu")
        for case in Journal.read(path).cases.values():
            heard(case)
        return True

    def measure(*given):
        found = real(*given)
        if wrong:
            found["contestants"]["fcore"] = {"status": "wrong", "reason": "made up"}
        return found

    monkeypatch.setattr(models, "supervise", in_this_process)
    monkeypatch.setattr(models, "measure", measure)
    file = tmp_path / "models.json"
    asked = ["--models", "minilm", "--batches", "1", "2", "--lengths", "8", "--json", str(file)]
    assert models.main(asked) == 0
    record = json.loads(file.read_text())
    assert record["kind"] == "models" and record["complete"] and len(record["gpu_states"]) == 2
    assert record["environment"]["transformers"] and [case["batch"] for case in record["cases"]] == [1, 2]
    assert "2 of 2 cases measured, 0 of them without" in capsys.readouterr().out
    wrong.append(True)
    assert models.main(asked) == 1
    assert "made up" in capsys.readouterr().out
    assert models.main([*asked[:4], "--lengths", "8", "12"]) == 1  # not all of it was measured


def test_a_run_of_gradients(pretended, monkeypatch, tmp_path, capsys):
    real = gradients.measure
    monkeypatch.setattr(gradients, "PROBLEMS", [gradients.Problem("tiny", 1, 2, 2, 16)])
    monkeypatch.setattr(gradients, "measure", lambda *given: real(*given, "cpu"))
    file = tmp_path / "gradients.json"
    assert gradients.main(["--trials", "3", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["cases"][0]["contestants"]["sdpa"]["call"]["n"] == 3
    assert "1 cases, 0 of them without" in capsys.readouterr().out
    monkeypatch.setitem(gradients.CONTESTANTS, "flashcore", lambda q, k, v, *rest: q + k + v)
    assert gradients.main(["--trials", "3"]) == 1
    assert "1 cases, 1 of them without" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["models", "gradients"])
def test_without_a_gpu_they_say_so(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([name]) == 1
    assert f"{name}: " in capsys.readouterr().err


@pytest.mark.gpu
@needs_transformers
def test_models_on_a_gpu(tmp_path, monkeypatch):
    file = tmp_path / "models.json"
    asked = ["--models", "minilm", "--batches", "2", "--lengths", "32", "--trials", "5", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["models", *asked])
    assert models.main(asked) == 0
    record = json.loads(file.read_text())
    assert record["complete"] and models.MODES[1] in record["cases"][0]["contestants"]["fcore"]


@pytest.mark.gpu
def test_gradients_on_a_gpu(tmp_path):
    file = tmp_path / "gradients.json"
    assert gradients.main(["--trials", "5", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["cases"]) == len(gradients.PROBLEMS)
