"""Runs mutants of the Hopper kernel, or compiles them, in a process of its own: test_hopper_mutants.py starts it.

    python tests/kernels/hopper_mutants.py [--compile] [--trials] [--in TRIAL] NAME ...

prints a JSON object a line: {"at": name} before a mutant, {"name", "verdict"} after it; the verdict is what the gates
say, "" where they pass. --trials: the names are of trials, which the shipped kernel runs. --in: another trial than the
mutant's own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.target import H100
from flashcore.launch import compiled, hopper, packet
from flashcore.launch.arguments import Options, packed_problem_of, problem_of
from flashcore.launch.binding import Binding
from flashcore.testing import Guarded, Shape, check, lay_out, make
from flashcore.testing.mutants import Mutant, plant
from flashcore.testing.mutants_hopper import KERNEL, MUTANTS, SOFTMAX, SPECIALIZED, WORK, HopperMutant

FLAT = Config("hopper", 64, 64, 4, 1, "", 168)
STAYS = replace(FLAT, schedule="persistent")
THREE = Config("hopper", 192, 128, 12, 2, "specialized", 160)
TWO = Config("hopper", 128, 128, 8, 2, "specialized", 240)
FOUR = Config("hopper", 256, 128, 16, 5, "specialized", 128)
USERS = {SOFTMAX: (KERNEL, "softmax"), WORK: (SPECIALIZED, "work")}
BOUNDS = {  # of packed sequences
    "packed": (0, 40, 40, 150),
    "short": (0, 5, 6, 10, 16, 22, 30, 38, 238),
}


@dataclass(frozen=True)
class Trial:
    """One problem and one configuration; together they touch every line that a fault is planted in."""

    shape: Shape = Shape(2, 4, 230, 64, heads_kv=2, seqlen_k=300)
    family: str = "independent"
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    out: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)
    extra: str = ""  # a mask, lengths
    lse: bool = True
    config: Config = FLAT


TRIALS = {
    "plain": Trial(),
    "large logits": Trial(family="large_logits"),
    "many keys": Trial(Shape(1, 2, 64, 64, seqlen_k=2048)),
    "wide": Trial(options={"scale": 0.5}),
    "negative scale": Trial(options={"scale": -0.3}),
    "causal": Trial(options={"is_causal": True}),
    "causal, heads in one block": Trial(Shape(2, 4, 200, 64, heads_kv=2, seqlen_k=300), options={"is_causal": True}),
    "heads in one block": Trial(Shape(2, 4, 200, 64, heads_kv=2, seqlen_k=300)),
    "causal lengths": Trial(options={"is_causal": True}, extra="lengths"),
    "blind": Trial(Shape(1, 2, 200, 64, seqlen_k=70), options={"is_causal": True}),
    "window": Trial(options={"window": (70, 10)}),
    "soft cap": Trial(options={"softcap": 5.0}),
    "bias": Trial(extra="bias"),
    "fp32 bias": Trial(extra="fp32 bias"),
    "hidden NaN": Trial(extra="hidden NaN", lse=False),
    "bias, persistent": Trial(Shape(8, 16, 320, 64, heads_kv=4, seqlen_k=192), extra="bias", config=STAYS),
    "mask": Trial(extra="mask"),
    "lengths": Trial(extra="lengths"),
    "few lengths": Trial(Shape(2, 4, 230, 64, heads_kv=2, seqlen_k=256), extra="lengths"),
    "sorted": Trial(Shape(40, 8, 128, 64, heads_kv=4, seqlen_k=192), extra="lengths"),
    "sorted, persistent": Trial(Shape(40, 8, 128, 64, heads_kv=4, seqlen_k=192), extra="lengths", config=STAYS),
    "packed": Trial(Shape(1, 4, 150, 64, heads_kv=2, seqlen_k=150), extra="packed"),
    "packed, short": Trial(Shape(1, 4, 238, 64, heads_kv=2, seqlen_k=238), extra="short"),
    "persistent": Trial(Shape(40, 16, 128, 64, heads_kv=4, seqlen_k=192), config=STAYS),
    "narrow tile": Trial(Shape(2, 4, 230, 64, heads_kv=2, seqlen_k=265)),
    "narrow tile, persistent": Trial(Shape(40, 16, 128, 64, heads_kv=4, seqlen_k=210), config=STAYS),
    "columns": Trial(Shape(2, 4, 230, 88, heads_kv=2, seqlen_k=300)),
    "shared": Trial(Shape(2, 4, 400, 128, heads_kv=2, seqlen_k=512), config=THREE),
    "shared by four": Trial(Shape(10, 16, 400, 64, heads_kv=4, seqlen_k=600), config=FOUR),
    "shared by four, causal": Trial(
        Shape(12, 16, 700, 64, heads_kv=4, seqlen_k=700), options={"is_causal": True}, config=FOUR
    ),
    "shared, ones": Trial(Shape(10, 16, 400, 64, heads_kv=4, seqlen_k=600), lse=False, config=FOUR),
    "shared, columns": Trial(Shape(2, 4, 400, 88, heads_kv=2, seqlen_k=500), config=THREE),
    "shared, many": Trial(Shape(10, 16, 400, 128, heads_kv=4, seqlen_k=256), config=THREE),  # by 4 blocks each turn
    "shared, negative": Trial(Shape(1, 2, 200, 128, seqlen_k=300), options={"scale": -0.1}, config=TWO),
    "shared, causal": Trial(Shape(2, 4, 500, 128, heads_kv=2, seqlen_k=700), options={"is_causal": True}, config=TWO),
    "shared, causal, many": Trial(
        Shape(12, 16, 400, 128, heads_kv=4, seqlen_k=500), options={"is_causal": True}, config=THREE
    ),  # 96 of 192 heads come together, to and fro
    "strides": Trial(layouts=("contiguous", "bshd", "contiguous"), out="bshd"),
}


class Prepared:
    """A trial's tensors, its problem, and what it is judged by."""

    def __init__(self, trial: Trial, device: str) -> None:
        made = make(trial.family, trial.shape, seed=3, device=device)
        self.inputs = [lay_out(t, layout) for t, layout in zip(made, trial.layouts, strict=True)]
        q, k, v = self.inputs
        self.trial, s = trial, trial.shape
        self.guarded = Guarded(s.q, q.dtype, device, trial.out)
        self.lse = torch.full(s.q[:3], float("nan"), device=device) if trial.lse else None
        options = Options(return_lse=trial.lse, **trial.options)
        generator = torch.Generator(device).manual_seed(5)
        keys = s.k[2]
        wide = torch.randn(s.batch, s.heads_q, s.seqlen_q, -(-keys // 8) * 8, generator=generator, device=device)
        mask = {
            "bias": wide.half(), "fp32 bias": wide, "hidden NaN": wide.half(),
            "mask": wide.repeat_interleave(2, -1)[..., : wide.shape[-1] // 8 * 16] > -0.5,
        }  # fmt: skip
        if trial.extra == "hidden NaN":
            mask[trial.extra][..., 7::50] = -float("inf")
            k[..., 7::50, :] = float("nan")
        self.extra: dict[str, Any] = {}
        if trial.extra in mask:
            self.extra["attn_mask"] = mask[trial.extra][..., :keys]
        elif trial.extra == "lengths":
            used = [130, keys - 1, *torch.randint(keys + 1, (s.batch,), generator=torch.Generator().manual_seed(5))]
            self.extra["seqused_k"] = torch.tensor(used[: s.batch], dtype=torch.int32, device=device)
        self.scale = options.scale_for(s.head_dim)
        self.tensors = dict(zip("qkv", self.inputs, strict=True)) | {"o": self.guarded.out}
        if self.lse is not None:
            self.tensors["lse"] = self.lse
        if trial.extra in BOUNDS:
            ends = BOUNDS[trial.extra]
            bounds = torch.tensor(ends, dtype=torch.int32, device=device)
            flat = [t[0].transpose(0, 1) for t in (q, k, v, self.guarded.out)]
            longest = max(b - a for a, b in zip(ends, ends[1:], strict=False))
            self.problem = packed_problem_of(*flat, len(ends) - 1, longest, longest, options)
            self.tensors |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        else:
            self.problem = problem_of(q, k, v, self.guarded.out, options, **self.extra)
        names = {"attn_mask": "mask", "seqused_k": "seqused_k"}
        self.tensors |= {names[name]: tensor for name, tensor in self.extra.items()}
        self.config = trial.config

    def verdict(self) -> str:
        given = {**self.trial.options, **self.extra}
        ends = BOUNDS.get(self.trial.extra)
        if ends is None:
            found = check(self.guarded.out, *self.inputs, lse=self.lse, **given).failures
        else:
            parts = []
            for a, b in zip(ends, ends[1:], strict=False):
                out, *inputs, lse = (t[:, :, a:b] for t in (self.guarded.out, *self.inputs, self.lse))
                parts.append(check(out, *inputs, lse=lse, **given).failures)
            found = "; ".join(part for part in parts if part)
        return found + ("" if self.guarded.intact() else "; written beside the output")


def bound(mutant: HopperMutant | None, trial: Prepared, target: targets.Target) -> Binding:
    arguments = (trial.problem, trial.config, trial.scale, target)
    if mutant is None:
        return hopper.bind(*arguments)
    module = plant(mutant)
    if mutant.file in USERS:  # and a copy of the kernel that takes it from there
        kernel, name = USERS[mutant.file]
        user = f"{mutant.name}, used"
        module = plant(Mutant(user, kernel, f"from .{name} import", f"from {module.__name__} import"))
    if mutant.file in (KERNEL, SOFTMAX):
        return replace(hopper.bind(*arguments), fn=module.attention_forward)
    if mutant.file in (SPECIALIZED, WORK):
        return replace(hopper.bind(*arguments), fn=module.attention_forward_specialized)
    return module.bind(*arguments)


def run(mutant: HopperMutant | None, name: str) -> str:
    """What the gates say of a trial on the current GPU."""
    device = torch.cuda.current_device()
    target = targets.current(device)
    trial = Prepared(TRIALS[name], "cuda")
    launch = packet.load(bound(mutant, trial, target), device, target.arch)
    addresses = [trial.tensors[n].data_ptr() for n in launch.tensors]
    launch.launch(launch.fill(torch.cuda.current_stream().cuda_stream, *addresses))
    torch.cuda.synchronize()
    return trial.verdict()


def compiles(mutant: HopperMutant | None, name: str) -> str:
    """Why a mutant does not compile for sm_90, or that its trial does not reach the fault; "" where all is well."""
    try:
        launched = made(mutant, name)
    except RuntimeError as error:
        return str(error)[-500:] or "no message"
    if mutant is not None and launched == made(None, name):
        return f"the same launch of the same code as the shipped kernel's in trial {name!r}"
    return ""


@cache
def made(mutant: HopperMutant | None, name: str) -> tuple[Binding, list[str]]:
    """What is launched in a trial, and its instructions, without what says where in a source file they come from."""
    binding = bound(mutant, Prepared(TRIALS[name], "cpu"), H100)
    ptx = compiled.compile_for(binding, 90).ptx
    code = (line.split("//")[0].strip() for line in ptx.partition(".section")[0].splitlines())
    kept = [line for line in code if line and not line.startswith((".loc", ".file", "$L__"))]
    return replace(binding, fn=None), kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--trials", action="store_true")
    parser.add_argument("--in", dest="trial")
    parser.add_argument("names", nargs="+")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.names:
        print(json.dumps({"at": name}), flush=True)
        mutant = None if asked.trials else MUTANTS[name]
        trial = asked.trial or (name if mutant is None else mutant.trial)
        print(json.dumps({"name": name, "verdict": (compiles if asked.compile else run)(mutant, trial)}), flush=True)
