"""`flashcore audit bitwise`: the same problem gives the same bits, however busy the GPU is.

Random problems, each repeated under load on changing streams; the same problems in several processes; sequences alone,
in a batch, and in other places of it, with one tile; a CUDA graph replayed. All comparisons are of bits, made on the
GPU after every single call. The controls: a sum by atomics under the same load, and one bit changed in an input.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.core.errors import UnsupportedError
from flashcore.fast.attention_production import attention
from flashcore.fast.varlen import attention_varlen
from flashcore.security import fuzz, record
from flashcore.testing import Shape, make, problems
from flashcore.testing.inputs import place

STREAMS = 8
SHARED = 4  # problems that every process computes
REPLAYS = 10_000
LIMIT_S = 60.0  # beyond its own time, after which a process is ended
BATCH_SHAPES = (Shape(5, 4, 130, 64), Shape(4, 2, 197, 128, seqlen_k=260), Shape(7, 3, 64, 32, heads_kv=1))


@dataclass
class Repeated:
    """A problem on the GPU, and the bits that its first call gave."""

    call: Callable[[], Any]
    tensors: dict[str, Tensor]
    want: list[Tensor]

    @staticmethod
    def of(seed: int, device: str, longest: int) -> Repeated:
        """Raises UnsupportedError where no kernel serves the problem."""
        drawn = fuzz.draw(seed, longest)
        tensors = {name: place(t, device) for name, t in drawn.tensors.items()}
        options = {name: value for name, value in drawn.options.items() if name != "out"}
        compute: Any = attention_varlen if drawn.packed else attention
        of_none = problems.rows_of_none(drawn).to(device) if drawn.packed else None

        def call() -> Any:
            result = compute(**tensors, **options)
            return result if of_none is None else _without(result, of_none)

        return Repeated(call, tensors, bits(call()))

    def differs(self) -> Tensor:
        """Whether a further call gives other bits, without waiting for it: 0 or 1 on the device."""
        return differ(bits(self.call()), self.want)

    def digest(self) -> str:
        """Of the bits of all that the call returns."""
        return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in self.want)).hexdigest()[:16]


def _without(result: Any, rows: Tensor) -> Any:
    """An output [total, H, D], or with it lse [H, total], with zeros in these rows: they hold what they held before."""
    if isinstance(result, tuple):
        out, lse = result
        return _without(out, rows), lse.masked_fill(rows, 0.0)
    return result.masked_fill(rows[:, None, None], 0.0)


def bits(result: Any) -> list[Tensor]:
    """What a call returned as integers, which compare NaN as what it is."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]) for t in tensors]


def differ(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """1 where any of them differ, else 0, as int64 on their device."""
    parts = [(x != y).any() for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).any().long()


@contextlib.contextmanager
def load(device: str) -> Iterator[None]:
    """Matrix products on a stream of their own, from a thread of their own, all the while."""
    if device == "cpu":
        yield
        return
    stop = threading.Event()

    def work() -> None:
        a = torch.randn(1024, 1024, device=device, dtype=torch.float16)
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                for _ in range(8):
                    a @ a
                torch.cuda.current_stream().synchronize()
                time.sleep(0)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def streams(device: str, count: int) -> list[Any]:
    """So many streams; one context that does nothing where there are none."""
    return [torch.cuda.Stream() for _ in range(count)] if device != "cpu" else [None]


def on(stream: Any) -> Any:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# -- the parts ----------------------------------------------------------------------------------------------------


def repeats(
    seeds: Iterator[int], count: int, times: int, seconds: float, device: str, longest: int
) -> tuple[Counter[str], list[int]]:
    """Repeat `count` problems `times` times each under load. Returns counts, and the problems whose bits differed."""
    deadline = time.monotonic() + seconds
    budget = fuzz._Budget(device)
    found: Counter[str] = Counter()
    wrong: list[int] = []
    kind = -1
    lanes = streams(device, STREAMS)
    with load(device):
        for seed in seeds:
            if found["problems"] >= count or time.monotonic() > deadline:
                break
            if kind != (kind := fuzz.kind_of(seed)):
                budget.renew()
            try:
                if not budget.serves(fuzz.draw(seed, longest), None):
                    continue
                problem = Repeated.of(seed, device, longest)
            except UnsupportedError:
                continue
            synchronize(device)
            totals = []
            for lane in lanes:
                with on(lane):
                    totals.append(torch.zeros((), dtype=torch.int64, device=device))
            for i in range(times):
                with on(lanes[i % len(lanes)]):
                    totals[i % len(lanes)] += problem.differs()
            synchronize(device)
            differing = sum(int(total) for total in totals)
            found.update(problems=1, repeats=times, differing=differing)
            if differing:
                wrong.append(seed)
    return found, wrong


def batch_positions(device: str) -> Counter[str]:
    """Each sequence alone, in a batch, and in the batch turned around, by each kernel with one tile."""
    found: Counter[str] = Counter()
    backends: tuple[str | None, ...] = ("portable", "hopper") if device != "cpu" else (None,)
    for shape in BATCH_SHAPES:
        q, k, v = (place(t, device) for t in make("outliers", shape, seed=shape.seqlen_q))
        for backend in backends:
            for is_causal in (False, True):
                options: Any = {"backend": backend, "is_causal": is_causal, "return_lse": True}
                if backend:
                    options |= {"block_m": 64, "block_n": 64}
                try:
                    together = attention(q, k, v, **options)
                except (UnsupportedError, ValueError):  # no such kernel here, or not this tile
                    continue
                turned = attention(q.flip(0), k.flip(0), v.flip(0), **options)
                found["differing"] += int(differ(bits(tuple(t.flip(0) for t in turned)), bits(together)))
                for b in range(shape.batch):
                    alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options)
                    found["differing"] += int(differ(bits(alone), bits(tuple(t[b : b + 1] for t in together))))
                    found["sequences"] += 1
    return found


def replays(times: int, device: str) -> Counter[str]:
    """A captured call replayed, its bits compared after every replay."""
    shape = Shape(8, 8, 197, 64)
    q, k, v = (place(t, device) for t in make("outliers", shape, seed=1))
    want = bits(attention(q, k, v))
    if device == "cpu":
        return Counter(replays=0, differing=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
    total = torch.zeros((), dtype=torch.int64, device=device)
    with load(device):
        for _ in range(times):
            graph.replay()
            total += differ(bits(out), want)
        synchronize(device)
    return Counter(replays=times, differing=int(total))


def control(device: str, times: int = 200) -> Counter[str]:
    """What the comparison says of a sum by atomics, and of one bit changed in q."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(1 << 20, generator=generator, device=device)
    index = torch.randint(64, (1 << 20,), generator=generator, device=device)

    def summed() -> Tensor:
        return torch.zeros(64, device=device).index_add_(0, index, values)

    want, differing = bits(summed()), 0
    with load(device):
        for _ in range(times):
            differing += int(differ(bits(summed()), want))
    q, k, v = (place(t, device) for t in make("independent", Shape(1, 1, 64, 64), seed=2))
    first = bits(attention(q, k, v))
    q.view(torch.int16)[0, 0, 5, 7] ^= 1 << 9  # a bit of the mantissa
    return Counter(atomics=differing, one_bit=int(differ(bits(attention(q, k, v)), first)))


# -- the processes ------------------------------------------------------------------------------------------------


def seeds_of(seed: int, shard: int) -> Iterator[int]:
    """Problems of a process: kinds of the fuzzer, a dozen of each."""
    for kind in fuzz.kinds(seed, shard):
        for detail in range(12):
            yield fuzz.number(kind, detail)


def work(path: Path, options: Any) -> int:
    """One process's part, written to `path`."""
    torch.set_num_threads(1)
    device, longest = options.device, options.longest
    found, wrong = repeats(
        seeds_of(options.seed, options.shard), options.problems, options.repeats, options.seconds, device, longest
    )  # fmt: skip
    digests: dict[str, str] = {}
    for seed in seeds_of(options.seed, 999):
        if len(digests) >= SHARED:
            break
        try:
            digests[str(seed)] = Repeated.of(seed, device, longest).digest()
        except UnsupportedError:
            continue
    said: dict[str, Any] = {"repeats": found, "wrong": wrong, "digests": digests}
    if options.shard == 0:
        said |= {"batch": batch_positions(device), "graph": replays(options.replays, device)}
        said |= {"control": control(device)}
    record.write(path, said)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when bits differed or a control's did not."""
    on_gpu = torch.cuda.is_available()
    parser = record.parser("bitwise", "The same problem gives the same bits. Without a GPU this tries itself out.")
    parser.add_argument("--problems", type=int, default=200, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1_000, metavar="N", help="of each (%(default)s)")
    parser.add_argument("--replays", type=int, default=REPLAYS, metavar="N", help="of a graph (%(default)s)")
    parser.add_argument("--processes", type=int, default=8 if on_gpu else 2, metavar="K", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="T", help="at most, of repeats (%(default)s)")
    parser.add_argument("--longest", type=int, default=300 if on_gpu else 24, help="rows of a sequence (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--work", type=Path, help="be one of the processes, which writes here")
    parser.add_argument("--shard", type=int, default=0, help="with --work: which one")
    options = parser.parse_args(argv)
    if options.work is not None:
        return work(options.work, options)
    began = time.monotonic()
    share = -(-options.problems // options.processes)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{shard}.json" for shard in range(options.processes)]
        running = []
        for shard, path in enumerate(paths):
            command = [
                sys.executable, "-m", "flashcore.security.bitwise", "--work", str(path), "--shard", str(shard),
                "--seed", str(options.seed), "--problems", str(share), "--repeats", str(options.repeats),
                "--replays", str(options.replays), "--seconds", str(options.seconds), "--device", options.device,
                "--longest", str(options.longest),
            ]  # fmt: skip
            running.append(subprocess.Popen(command))
        deadline = began + options.seconds + LIMIT_S
        for process in running:
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        said = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    ended = [process.returncode for process in running]
    rows = _rows(said, ended, options.device)
    found = sum((Counter(each.get("repeats", {})) for each in said), Counter[str]())
    return record.finish(
        "bitwise", rows, options.json, arguments=argv, seconds=time.monotonic() - began, gpu=options.device != "cpu",
        complete=found["problems"] >= options.problems, seed=options.seed, processes=said, statuses=ended,
    )  # fmt: skip


def _rows(said: Sequence[dict[str, Any]], ended: Sequence[int], device: str) -> list[record.Row]:
    found = sum((Counter(each.get("repeats", {})) for each in said), Counter[str]())
    first = said[0] if said else {}
    batch, graph, caught = (Counter(first.get(name, {})) for name in ("batch", "graph", "control"))
    digests = [each.get("digests", {}) for each in said]
    same = all(d and d == digests[0] for d in digests)
    fine = not any(ended)
    atomics = f"a sum by atomics differed in {caught['atomics']} of 200 repeats"
    seen = caught["atomics"] > 0 or device == "cpu"  # a CPU sums in one order
    bit = f"one bit of q changed: {'noticed' if caught['one_bit'] else 'not noticed'}"
    return [
        record.Row(
            f"The same bits on every repeat, under load, on {STREAMS} streams",
            f"{found['problems']:,} problems, {found['repeats']:,} repeats: {found['differing']} differed", atomics,
            fine and found["problems"] > 0 and not found["differing"] and seen,
        ),
        record.Row(
            "The same bits in every process",
            f"{SHARED} problems in {len(said)} processes: {'the same' if same else 'they differ'}",
            bit, fine and same and bool(caught["one_bit"]),
        ),
        record.Row(
            "A sequence's bits don't depend on its neighbours or its place in the batch",
            f"{batch['sequences']} sequences alone and in two orders: {batch['differing']} differed", bit,
            fine and batch["sequences"] > 0 and not batch["differing"] and bool(caught["one_bit"]),
        ),
        record.Row(
            "A CUDA graph gives the same bits on every replay",
            f"{graph['replays']:,} replays: {graph['differing']} differed", atomics,
            fine and (graph["replays"] > 0 or device == "cpu") and not graph["differing"] and seen,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
