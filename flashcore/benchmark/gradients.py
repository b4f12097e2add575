"""Attention forward and backward, FlashCore beside torch's SDPA: what training with it costs.

    flashcore bench gradients --json results/gradients-<gpu>-<date>.json

Every contestant computes the output and the gradients of q, k and v. They pass a gate first, against fp64: each
gradient's error in norm is at most twice that of torch's own in 16 bits. Times are those of the call clock, what a
caller sees, and of the gpu clock, one graph of many such calls; contestants take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.benchmark import results
from flashcore.benchmark.terminal import kind_of
from flashcore.fast.attention_production import attention
from flashcore.fast.planning import warmup
from flashcore.measure import clocks, machine, statistics

SEED = 0
FLOOR = 1e-3  # relative error of a gradient that passes whatever torch's is


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem, in fp16, with D = 64."""

    name: str
    batch: int
    heads: int
    heads_kv: int
    seqlen: int
    is_causal: bool = False
    padded: bool = False  # a bool mask of keys, [B, 1, 1, S]

    def tensors(self, device: str) -> tuple[list[Tensor], Tensor | None]:
        """q, k, v and the output's gradient; the mask."""
        generator = torch.Generator().manual_seed(SEED)
        heads = (self.heads, self.heads_kv, self.heads_kv, self.heads)
        tensors = [torch.randn(self.batch, h, self.seqlen, 64, generator=generator).half().to(device) for h in heads]
        if not self.padded:
            return tensors, None
        lengths = torch.randint(self.seqlen // 2, self.seqlen + 1, (self.batch, 1, 1, 1), generator=generator)
        return tensors, (torch.arange(self.seqlen) < lengths).to(device)


PROBLEMS = (
    Problem("encoder", 16, 12, 12, 128),
    Problem("encoder, padded", 16, 12, 12, 128, padded=True),
    Problem("encoder, long", 8, 12, 12, 512),
    Problem("decoder", 8, 12, 12, 512, is_causal=True),
    Problem("decoder, grouped", 8, 12, 4, 512, is_causal=True),
)
Attend = Callable[[Tensor, Tensor, Tensor, Problem, Tensor | None], Any]


def _ours(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mask: Tensor | None) -> Any:
    return attention(q, k, v, is_causal=problem.is_causal, attn_mask=mask)


def _torchs(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mask: Tensor | None) -> Tensor:
    grouped = problem.heads != problem.heads_kv
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=problem.is_causal, enable_gqa=grouped)


def _flash(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mask: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _torchs(q, k, v, problem, mask)


CONTESTANTS: dict[str, Attend] = {"flashcore": _ours, "sdpa": _torchs, "sdpa-flash": _flash}


def measure(problem: Problem, trials: int, device: clocks.Device, on: str = "cuda") -> dict[str, Any]:
    """One problem: gates, then both clocks."""
    (q, k, v, grad), mask = problem.tensors(on)

    def call_of(attend: Attend, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        upstream = grad.to(dtype)
        return lambda: torch.autograd.grad(attend(leaves[0], leaves[1], leaves[2], problem, mask), leaves, upstream)

    with sdpa_kernel(SDPBackend.MATH):
        exact = call_of(_torchs, torch.float64)()

    def error(grads: Sequence[Tensor]) -> float:
        return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, exact, strict=True))

    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, attend in CONTESTANTS.items():
        found[name] = {"status": "ok"}
        try:
            call = call_of(attend, torch.float16)
            found[name]["error"] = error(call())
            calls[name] = call
        except Exception as failure:
            status = "refused" if isinstance(failure, RuntimeError) and name != "flashcore" else "failed"
            found[name] |= {"status": status, "reason": kind_of(failure)}
    limit = max(2 * found["sdpa"].get("error", 0.0), FLOOR)
    for name in list(calls):
        if not found[name]["error"] <= limit:
            reason = f"relative error {found[name]['error']:.3g}, limit {limit:.3g}"
            found[name] |= {"status": "wrong", "reason": reason}
            del calls[name]
    timed = {name: clocks.Contestant([call]) for name, call in calls.items()}
    by_call = clocks.call_times(timed, trials=trials, warmup=max(trials // 10, 2), device=device)
    by_gpu, counts = clocks.gpu_times(timed, device=device)
    for name in calls:
        interval = statistics.median_interval(by_call[name])
        found[name]["call"] = results.latency(statistics.summarize(by_call[name]), interval.low, interval.high)
        found[name]["gpu_warm"] = results.timing(by_gpu[name], calls=counts[name])
        if "flashcore" in calls:
            for clock, times in (("call", by_call), ("gpu_warm", by_gpu)):
                ratio = statistics.ratio_interval(times[name], times["flashcore"])
                found[name][clock]["over_flashcore"] = asdict(ratio)
    return {"case": problem.name, "shape": asdict(problem), "contestants": found}


_COLUMNS = "".join(f"{n + ' call':>16}{'gpu':>9}" for n in CONTESTANTS)
HEADER = f"{'microseconds':<24}{_COLUMNS}{'sdpa/ours':>11}{'gpu':>7}"


def line(case: Mapping[str, Any]) -> str:
    """A case as one line of the table under `HEADER`."""
    text, found = f"{case['case']:<24}", case["contestants"]
    for each in found.values():
        text += f"{each['call']['p50']:>16.1f}{each['gpu_warm']['us']:>9.1f}" if "call" in each else (
            f"{each['status']:>16}{'-':>9}"
        )
    for clock, width in (("call", 10), ("gpu_warm", 6)):
        ratio = found["sdpa"].get(clock, {}).get("over_flashcore")
        text += f"{ratio['value']:>{width}.2f}x" if ratio else f"{'-':>{width + 1}}"
    return "\n".join([text, *(f"  {n}: {each['reason']}" for n, each in found.items() if "reason" in each)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 when FlashCore was wrong or failed somewhere."""
    parser = argparse.ArgumentParser(prog="flashcore bench gradients", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, metavar="N", help="calls of each contestant (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gradients: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    with contextlib.suppress(RuntimeError):  # where the graph node in C++ can be built, it is what users get
        warmup((), gradients=True)
    print(HEADER)
    found, states = [], [machine.gpu_state()]
    for problem in PROBLEMS:
        found.append(measure(problem, options.trials, clocks.Cuda()))
        states.append(machine.gpu_state())
        print(line(found[-1]), flush=True)
    bad = [case["case"] for case in found if case["contestants"]["flashcore"]["status"] != "ok"]
    print(f"{len(found)} cases, {len(bad)} of them without FlashCore")
    if options.json:
        protocol = {"name": "call + gpu warm", "seed": SEED, "trials": options.trials, "dtype": "float16"}
        record = {
            "kind": "gradients", "environment": machine.environment(), "protocol": protocol, "gpu_states": states,
            "cases": found,
        }  # fmt: skip
        results.write(options.json, record)
        print(f"Measurements written to {options.json}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
