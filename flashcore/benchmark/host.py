"""What a call costs its caller: CPU time per call of attention on a problem the GPU finishes sooner.

    python -m flashcore.benchmark.host --json results/host.json

Every contestant takes its turn in blocks in one process, since these hosts drift by a factor of two within minutes:
figures hold as ratios to torch's SDPA of the same run. With --json come also what a graph replay of a captured call
adds to the kernel itself, and the seconds that first calls take with a cold and with a warm cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark import results
from flashcore.benchmark.peers import PEERS, NotServedError, Peer, Prepared
from flashcore.benchmark.shapes import SEED, Shape
from flashcore.benchmark.terminal import Terminal, kind_of, us
from flashcore.core.target import current
from flashcore.fast.attention_production import attention
from flashcore.launch import launcher, node, shim
from flashcore.launch.arguments import Options, problem_of
from flashcore.launch.binding import Scalar
from flashcore.launch.torch_private import raw_stream
from flashcore.measure import clocks, machine, statistics
from flashcore.testing import gates

SHAPE = Shape(1, 8, 128, 64)  # one sequence: the GPU works a few microseconds
REFERENCE = "sdpa"
FUNCTION = "flashcore-function"  # which a call without gradients has no use for
FIRST_CALL_LIMIT_S = 120


# -- contestants ------------------------------------------------------------------------------------------------


def _ours(*, compiled: bool, into: bool, function: bool = False) -> Callable[[Shape, Tensor, Tensor, Tensor], Prepared]:
    """One of our paths.

    The compiled path with gradients is what it is once the graph node in C++ was built, which is waited for here, or,
    with `function`, what it is until then.
    """

    def prepare(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        if compiled and not shim.load():
            raise NotServedError(shim.status())
        if compiled and q.requires_grad and not function:
            try:
                node.build()
            except RuntimeError as error:
                raise NotServedError(str(error)) from error
        context = shim.disabled if not compiled else node.disabled if function else nullcontext
        if into:
            out = torch.empty_like(q)
            return Prepared(lambda: attention(q, k, v, out=out), context=context)
        return Prepared(lambda: attention(q, k, v), context=context)

    return prepare


def _naive(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    """The portable kernel as a plain Triton program launches it: torch.empty_like, then kernel[grid](...)."""
    options = Options(backend="portable")
    problem = problem_of(q, k, v, None, options)
    config = launcher.plan_for(q.device.index, problem, options).config
    target = current(q.device.index)
    binding = launcher.bind(problem, config, options.scale_for(shape.head_dim), target)
    kernel = binding.fn[binding.grid]
    numbers = {name: a.value for name, a in binding.args.items() if isinstance(a, Scalar)}
    fixed = {**numbers, **binding.constexprs, **binding.options}

    def call() -> Tensor:
        out = torch.empty_like(q)
        kernel(q=q, k=k, v=v, o=out, **fixed)
        return out

    return Prepared(call)


CONTESTANTS: dict[str, Peer] = {
    p.name: p
    for p in (
        Peer("flashcore", "FlashCore, compiled path", _ours(compiled=True, into=False)),
        Peer(FUNCTION, "FlashCore, compiled, autograd.Function", _ours(compiled=True, into=False, function=True)),
        Peer("flashcore-python", "FlashCore, Python path", _ours(compiled=False, into=False)),
        Peer("flashcore-out", "FlashCore, compiled path, out=", _ours(compiled=True, into=True)),
        Peer("flashcore-python-out", "FlashCore, Python path, out=", _ours(compiled=False, into=True)),
        Peer("naive", "its kernel launched by plain Triton", _naive),
        *(PEERS[name] for name in (REFERENCE, "sdpa-flash", "sdpa-cudnn", "fa4", "fa3", "fa2")),
    )
}
# No gradient passes through a given output, nor through a kernel launched by hand.
WITH_GRADIENTS = [name for name in CONTESTANTS if not name.endswith("-out") and name != "naive"]


# -- measuring --------------------------------------------------------------------------------------------------


def measure(gradients: bool, blocks: int, calls: int, advance: Callable[[int], object]) -> dict[str, Any]:
    """One table: the host clock of every contestant that is here and right; inputs may require grad."""
    q, k, v = SHAPE.inputs()
    found: dict[str, dict[str, Any]] = {}
    timed: dict[str, clocks.Contestant] = {}
    for name in WITH_GRADIENTS if gradients else [name for name in CONTESTANTS if name != FUNCTION]:
        peer = CONTESTANTS[name]
        found[name] = {"title": peer.title, "version": machine.installed(peer.distribution)}
        try:
            inputs = tuple(t.detach().requires_grad_(gradients) for t in (q, k, v))
            prepared = peer.prepare(SHAPE, *inputs)
            context = _together(prepared.context, torch.enable_grad if gradients else torch.no_grad)
            with context():
                out = prepared.output(prepared.call())
            verdict = gates.check(out.detach(), q, k, v)
            found[name] |= {"status": "ok" if verdict.passed else "wrong", "reason": verdict.failures}
            if gradients and not out.requires_grad:
                found[name] |= {"status": "refused", "reason": "its output carries no gradient"}
        except ImportError:
            found[name] |= {"status": "missing", "reason": peer.install}
        except (NotServedError, NotImplementedError) as refusal:
            found[name] |= {"status": "refused", "reason": kind_of(refusal)}
        except Exception as error:
            found[name] |= {"status": "failed", "reason": kind_of(error)}
        if found[name]["status"] == "ok":
            timed[name] = clocks.Contestant([prepared.call], context)
    times = clocks.host_times(timed, blocks=blocks, calls=calls)
    for name, values in times.items():
        interval = statistics.median_interval(values)
        found[name]["host"] = results.latency(statistics.summarize(values), interval.low, interval.high)
        if REFERENCE in times:
            found[name]["over_sdpa"] = asdict(statistics.ratio_interval(values, times[REFERENCE]))
        advance(1)
    return {"shape": SHAPE.as_json(), "gradients": gradients, "contestants": found}


def replay() -> dict[str, Any]:
    """Device time of a captured call beside that of the bare kernel on the same tensors."""
    q, k, v = SHAPE.inputs()
    out = torch.empty_like(q)
    attention(q, k, v, out=out)
    device = q.device.index
    launch = launcher.plan_for(device, problem_of(q, k, v, out, Options()), Options()).launch
    tensors = {"q": q, "k": k, "v": v, "o": out}
    addresses = [tensors[name].data_ptr() for name in launch.tensors]

    def bare() -> None:
        launch.launch(launch.fill(raw_stream(device), *addresses))

    contestants = {
        "call": clocks.Contestant([lambda: attention(q, k, v, out=out)]),
        "allocating call": clocks.Contestant([lambda: attention(q, k, v)]),
        "kernel": clocks.Contestant([bare]),
    }
    with torch.no_grad():
        times, counts = clocks.gpu_times(contestants)
    return {
        name: results.timing(
            values, calls=counts[name], over_kernel=asdict(statistics.ratio_interval(values, times["kernel"]))
        )
        for name, values in times.items()
    }


def first_calls() -> dict[str, Any]:
    """Seconds of first calls in new processes: on an empty cache folder, then on the one that this left behind."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
            command = [sys.executable, "-m", "flashcore.benchmark.host", "--first-calls"]
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=FIRST_CALL_LIMIT_S, check=True
                )
                found[cache] = json.loads(done.stdout.splitlines()[-1])
            except (subprocess.SubprocessError, ValueError, IndexError) as error:
                found[cache] = {"failed": kind_of(error)}
    return found


def _first_calls() -> dict[str, float]:
    """In this process, which must be new: seconds of the very first call, of a new kernel's, and of a new length's."""
    shapes = {
        "process": Shape(8, 8, 128, 64),
        "kernel": Shape(8, 8, 128, 64, is_causal=True),
        "length": Shape(8, 8, 384, 64, is_causal=True),
        "same": Shape(8, 8, 384, 64, is_causal=True),
    }
    seconds = {}
    for name, shape in shapes.items():
        q, k, v = shape.inputs()
        torch.cuda.synchronize()
        started = time.perf_counter()
        attention(q, k, v, block_m=64, block_n=64, is_causal=shape.is_causal, backend="portable")
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - started
    return seconds


@contextmanager
def _entered(*contexts: Callable[[], AbstractContextManager[Any]]) -> Any:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


def _together(*contexts: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: _entered(*contexts)


# -- reporting --------------------------------------------------------------------------------------------------


def table(case: dict[str, Any]) -> list[str]:
    """One case as lines: a title, column names, a row for each contestant."""
    what = "inputs that require grad, the node in C++ built" if case["gradients"] else "no gradients"
    lines = [f"Host time of a call, {Shape(**case['shape']).label}, {what} (us)"]
    lines.append(f"{'':<38}{'min':>8}{'P50':>8}{'P99':>8}{'/ SDPA':>8}")
    for found in case["contestants"].values():
        if host := found.get("host"):
            ratio = f"{found['over_sdpa']['value']:>8.2f}" if "over_sdpa" in found else f"{'-':>8}"
            lines.append(f"{found['title']:<38}{us(host['min'])}{us(host['p50'])}{us(host['p99'])}{ratio}")
        else:
            lines.append(f"{found['title']:<38}  {found['status']}: {found['reason']}")
    return lines


def rest(record: dict[str, Any]) -> list[str]:
    """The other figures as lines."""
    kernel = record["replay"]["kernel"]["us"]
    lines = [f"Graph replay: kernel {kernel:.2f} us"]
    for name in ("call", "allocating call"):
        timing = record["replay"][name]
        lines[0] += f", captured {name} {timing['us']:.2f} ({timing['over_kernel']['value']:.3f}x)"
    for cache, found in record["first_calls"].items():
        figures = ", ".join(f"{n} {s:.3f} s" if isinstance(s, float) else f"{n}: {s}" for n, s in found.items())
        lines.append(f"First calls, {cache} cache: {figures}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit status: 0 = measured, 1 = there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcore.benchmark.host", description="What a call costs its caller, beside other libraries."
    )
    parser.add_argument("--blocks", type=int, default=100, metavar="N", help="blocks of each contestant (100)")
    parser.add_argument("--calls", type=int, default=200, metavar="N", help="calls in a block (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("host: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    if options.first_calls:
        print(json.dumps(_first_calls()))
        return 0
    record: dict[str, Any] = {
        "kind": "host",
        "environment": machine.environment(),
        "protocol": {"name": "host", "seed": SEED, "blocks": options.blocks, "calls": options.calls},
        "gpu_states": [machine.gpu_state()],
        "cases": [],
    }
    with Terminal(2 * len(CONTESTANTS), "measuring") as terminal:
        for gradients in (False, True):
            record["cases"].append(measure(gradients, options.blocks, options.calls, terminal.advance))
            for line in table(record["cases"][-1]):
                terminal.line(line)
            terminal.line()
    record |= {"shim": shim.status(), "node": node.status()}
    print(f"Compiled path: {record['shim']}; its node in C++: {record['node']}")
    if options.json:
        record |= {"replay": replay(), "first_calls": first_calls()}
        record["gpu_states"].append(machine.gpu_state())
        for line in rest(record):
            print(line)
        results.write(options.json, record)
        print(f"Measurements written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
