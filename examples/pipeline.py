"""Serve two models on one GPU under random load, with dynamic batching, CUDA graphs and a stream for each model.

    python examples/pipeline.py --device cuda

Two sentence encoders of different size answer requests that come one by one at random times. Each model has a thread,
which takes what has arrived, pads it to the next captured size, replays that graph on its own stream and answers. The
load runs in turns with FlashCore and with torch's SDPA; latencies are from a request's arrival to its answer, queueing
included. Weights and requests are random.
"""

from __future__ import annotations

import argparse
import queue
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from flashcore.integrations.transformers import register
from flashcore.measure.statistics import percentile

NAMES = ("fcore", "sdpa")


@dataclass
class Request:
    """A text to embed; its arrival and its answer, in seconds of the same clock."""

    ids: Tensor
    arrived: float = 0.0
    latency: float = 0.0
    embedding: Tensor | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Slot:
    """A captured forward pass of one batch size and length, and the memory it reads and writes."""

    def __init__(self, model: BertModel, batch: int, length: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.host = torch.zeros(2, batch, length, dtype=torch.long, pin_memory=pinned)  # ids and mask
        self.given = self.host.to(device)
        self.given[1, :, 0] = 1
        self.model, self.replay = model, self._forward
        self._forward()  # compiles
        if pinned:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._forward()
            self.replay = self.graph.replay
        self.answer = torch.empty(self.out.shape, dtype=self.out.dtype, pin_memory=pinned)

    def _forward(self) -> None:
        ids, mask = self.given
        states = self.model(ids, attention_mask=mask)[0]
        weights = mask.unsqueeze(-1).to(states.dtype)
        self.out = (states * weights).sum(1) / weights.sum(1)  # the mean over each text

    def run(self, requests: Sequence[Request]) -> Tensor:
        """[len(requests), C], once the GPU is done; on the current stream."""
        self.host.zero_()
        self.host[1, :, 0] = 1
        for row, request in enumerate(requests):
            self.host[0, row, : len(request.ids)] = request.ids
            self.host[1, row, : len(request.ids)] = 1
        self.given.copy_(self.host, non_blocking=True)
        self.replay()
        self.answer.copy_(self.out, non_blocking=True)
        if self.given.is_cuda:
            finished = torch.cuda.Event()
            finished.record()
            finished.synchronize()
        return self.answer[: len(requests)].clone()


class Server:
    """One model, its captured sizes, and the thread that serves it."""

    def __init__(self, model: BertModel, batches: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        with torch.inference_mode():
            self.slots = {(b, s): Slot(model, b, s, device) for b, s in product(batches, lengths)}
        self.batches, self.lengths = batches, lengths
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.sizes: list[int] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            while (request := self.waiting.get()) is not None:
                batch = [request]
                while len(batch) < self.batches[-1] and not self.waiting.empty():  # whoever waits comes along
                    another = self.waiting.get()
                    if another is None:
                        self.waiting.put(None)
                        break
                    batch.append(another)
                size = next(b for b in self.batches if b >= len(batch))
                length = next(s for s in self.lengths if s >= max(len(r.ids) for r in batch))
                embeddings = self.slots[size, length].run(batch)
                now = time.perf_counter()
                self.sizes.append(len(batch))
                for request, embedding in zip(batch, embeddings, strict=True):
                    request.latency, request.embedding = now - request.arrived, embedding
                    request.done.set()

    def stop(self) -> None:
        self.waiting.put(None)
        self.thread.join()


def load(servers: Sequence[Server], count: int, rate: float, seed: int) -> list[Request]:
    """Send requests at random times, on average `rate` a second, each to a server drawn at random; wait for all."""
    draw = random.Random(seed)
    longest = servers[0].lengths[-1]
    generator = torch.Generator().manual_seed(seed)
    requests = [Request(torch.randint(5, 1000, (draw.randint(4, longest),), generator=generator)) for _ in range(count)]
    due = time.perf_counter()
    for request in requests:
        due += draw.expovariate(rate)
        while (left := due - time.perf_counter()) > 0:
            time.sleep(left if left > 1e-3 else 0)
        request.arrived = time.perf_counter()
        draw.choice(servers).waiting.put(request)
    for request in requests:
        if not request.done.wait(60):
            raise TimeoutError("a request was not answered within 60 s")
    return requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=2000, help="in each turn")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 12])
    parser.add_argument("--widths", type=int, nargs=2, default=[384, 768], help="multiples of 32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    device = torch.device(options.device)
    register()

    running: dict[str, list[Server]] = {}
    for name in NAMES:
        torch.manual_seed(0)
        running[name] = []
        for layers, width in zip(options.layers, options.widths, strict=True):
            config = BertConfig(
                num_hidden_layers=layers, hidden_size=width, num_attention_heads=max(1, width // 64),
                intermediate_size=4 * width, vocab_size=1000,
            )  # fmt: skip
            model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
            model = model.to(device, torch.float16 if options.device == "cuda" else torch.float32)
            model.set_attn_implementation(name)
            running[name].append(Server(model, options.batches, options.lengths, device))
    answers: dict[str, list[Request]] = {name: [] for name in NAMES}
    try:
        for turn in range(options.turns):
            for name in NAMES if turn % 2 == 0 else NAMES[::-1]:
                answers[name] += load(running[name], options.requests, options.rate, seed=turn)
    finally:
        for server in (*running["fcore"], *running["sdpa"]):
            server.stop()

    agreement = 1.0
    for ours, theirs in zip(*answers.values(), strict=True):  # the same requests in the same order
        assert ours.embedding is not None and theirs.embedding is not None
        cosine = torch.cosine_similarity(ours.embedding.float(), theirs.embedding.float(), 0)
        agreement = min(agreement, float(cosine))
    for name in NAMES:
        times = [1e3 * request.latency for request in answers[name]]
        sizes = [size for server in running[name] for size in server.sizes]
        p50, p99 = percentile(times, 50), percentile(times, 99)
        mean = len(times) / len(sizes)
        print(f"{name:>6}: P50 {p50:.2f} ms, P99 {p99:.2f} ms, {len(times)} requests, {mean:.1f} a batch on average")
    print(f"least cosine of an embedding with SDPA's: {agreement:.6f}")
    return 0 if agreement > 0.999 else 1


if __name__ == "__main__":
    sys.exit(main())
