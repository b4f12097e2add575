"""The ranks of the tests in this folder: run every case of this file and write what came of it.

    worker.py FOLDER RANKS...

For each number of ranks as many processes are forked, which spares them the imports. All run the same cases in the
same order, over gloo, and write FOLDER/<ranks>-<rank>.json: case -> "" or the traceback.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flashcore import attention
from flashcore.benchmark import context_parallel
from flashcore.integrations.distributed import (
    context_parallel_attention,
    register_sharding,
    ring,
    shard,
    sharded_attention,
    unshard,
)
from flashcore.testing import require
from tests.docs.pages import blocks, text_of

CASES: dict[str, Callable[[], None]] = {}
RANK, RANKS = 0, 0  # of this process, once it is one of them
LIMIT_S = 40  # of all cases on one number of ranks
FOLDER = Path(sys.argv[1])
ROOT = Path(__file__).resolve().parents[3]
SEED = 7
METHODS = ("ring", "all_to_all")
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def inputs(
    heads: int, heads_kv: int, seqlen: int, dim: int = 8, dtype: torch.dtype = torch.float64, layout: str = "bhsd"
) -> list[Tensor]:
    """q, k, v and a gradient of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = [
        torch.randn(2, h, seqlen, dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, heads_kv, heads_kv, heads)
    ]
    return [t.transpose(1, 2).contiguous() for t in tensors] if layout == "bshd" else tensors


def one_process(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_lse: Tensor | None, **options: Any) -> list[Tensor]:
    """out, lse and the gradients of q, k and v, by attention() of the whole problem."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, **options)
    results, grads = [out], [grad]
    if grad_lse is not None:
        results, grads = [out, lse], [grad, grad_lse]
    return [out.detach(), lse.detach(), *torch.autograd.grad(results, leaves, grads)]


def several_processes(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_lse: Tensor | None, seqlen: int | None = None, *,
    group: Any = None, **options: Any,
) -> list[Tensor]:
    """The same with the sequence sharded, put together again."""
    dim = 1 if options.get("layout") == "bshd" else 2
    leaves = [shard(t, group, dim=dim).requires_grad_() for t in (q, k, v)]
    out, lse = context_parallel_attention(*leaves, group, seqlen=seqlen, return_lse=True, **options)
    results, grads = [out], [shard(grad, group, dim=dim)]
    if grad_lse is not None:
        results, grads = [out, lse], [*grads, shard(grad_lse, group)]
    found = torch.autograd.grad(results, leaves, grads)
    assert out.is_contiguous()
    return [
        unshard(out.detach(), group, dim=dim), unshard(lse.detach(), group),
        *(unshard(g, group, dim=dim) for g in found),
    ]  # fmt: skip


def agree(
    heads: int, heads_kv: int, seqlen: int, *, dtype: torch.dtype = torch.float64, with_lse: bool = False,
    told: bool = False, options: dict[str, Any] | None = None, **several: Any,
) -> None:
    """Both ways give the same output, lse and gradients."""
    options = options or {}
    tensors = inputs(heads, heads_kv, seqlen, dtype=dtype, layout=options.get("layout", "bhsd"))
    generator = torch.Generator().manual_seed(1)
    grad_lse = torch.randn(2, heads, seqlen, generator=generator, dtype=torch.float64) if with_lse else None
    want = one_process(*(t.double() for t in tensors), grad_lse, **options)
    grad_lse = None if grad_lse is None else grad_lse.to(dtype)
    found = several_processes(*tensors, grad_lse, seqlen if told else None, **options, **several)
    for name, got, expected in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), found, want, strict=True):
        assert got.dtype == (torch.float32 if name == "lse" and dtype != torch.float64 else dtype), name
        error = (got.double() - expected).abs().max().item()
        assert error <= CLOSE[dtype] * max(1.0, expected.abs().max().item()), f"{name}: {error:.3g}"


@contextmanager
def raises(kind: type[BaseException], words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"expected {kind.__name__}: {words}")


# -- context parallel -------------------------------------------------------------------------------------------


@case
def full() -> None:
    for method in METHODS:
        agree(RANKS, RANKS, 8 * RANKS, method=method)


@case
def causal() -> None:
    for method in METHODS:
        agree(RANKS, RANKS, 8 * RANKS, options={"is_causal": True, "scale": 0.7}, method=method)


@case
def grouped_heads() -> None:
    for is_causal in (False, True):
        for method in METHODS:
            agree(4 * RANKS, RANKS, 6 * RANKS, options={"is_causal": is_causal}, method=method)
        agree(6, 1, 6 * RANKS, options={"is_causal": is_causal}, method="ring")


@case
def lengths_that_do_not_divide() -> None:
    for extra in range(1, 2 * RANKS):
        for method in METHODS:
            agree(RANKS, RANKS, 2 * RANKS + extra, options={"is_causal": extra % 2 == 0}, method=method)
    agree(RANKS, RANKS, 4 * RANKS + 1, told=True, options={"is_causal": True}, method="ring")


@case
def gradients_of_lse() -> None:
    for method in METHODS:
        agree(RANKS, RANKS, 4 * RANKS + 1, with_lse=True, options={"is_causal": True}, method=method)
        agree(RANKS, RANKS, 4 * RANKS, dtype=torch.float32, with_lse=True, method=method)


@case
def heads_behind_rows() -> None:
    for method in METHODS:
        agree(2 * RANKS, RANKS, 5 * RANKS, options={"is_causal": True, "layout": "bshd"}, method=method)


@case
def single_precision() -> None:
    for method in METHODS:
        agree(RANKS, RANKS, 16 * RANKS, dtype=torch.float32, options={"is_causal": True}, method=method)


@case
def half_precision() -> None:
    """The output passes the gates; gradients err at most twice as much as one process' in the same precision."""
    for dtype in (torch.float16, torch.bfloat16):
        for is_causal in (False, True):
            q, k, v, grad = inputs(2 * RANKS, RANKS, 24 * RANKS, 32, dtype)
            exact = one_process(*(t.double() for t in (q, k, v, grad)), None, is_causal=is_causal)
            alone = one_process(q, k, v, grad, None, is_causal=is_causal)
            for method in METHODS:
                found = several_processes(q, k, v, grad, None, is_causal=is_causal, method=method)
                require(found[0], q, k, v, lse=found[1], is_causal=is_causal)
                for name, got, one, want in zip("qkv", found[2:], alone[2:], exact[2:], strict=True):
                    error, limit = (got.double() - want).norm(), 2.0 * (one.double() - want).norm()
                    assert error <= limit, f"grad_{name} {dtype} {method}: {error:.3g} exceeds {limit:.3g}"


@case
def large_logits() -> None:
    q, k, v, _ = inputs(RANKS, RANKS, 8 * RANKS, dtype=torch.float32)
    q = q * 1e4
    for method in METHODS:
        out = unshard(context_parallel_attention(*(shard(t) for t in (q, k, v)), is_causal=True, method=method))
        want = attention(q.double(), k.double(), v.double(), is_causal=True)
        assert (out - want).abs().max() < 1e-3


@case
def nan_stays_in_the_rows_that_read_it() -> None:
    q, k, v, _ = inputs(RANKS, RANKS, 8 * RANKS)
    at = 5 * RANKS + 1
    k[:, :, at] = torch.nan
    for method in METHODS:
        out = unshard(context_parallel_attention(*(shard(t) for t in (q, k, v)), is_causal=True, method=method))
        assert out[:, :, :at].isfinite().all() and out[:, :, at:].isnan().all()


@case
def strided_inputs_and_expanded_gradients() -> None:
    q, k, v, _ = inputs(RANKS, RANKS, 4 * RANKS)
    want = one_process(q, k, v, torch.ones_like(q), None)[2:]
    leaves = [shard(t).requires_grad_() for t in (q, k, v)]
    for method in METHODS:
        strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in leaves)
        out = context_parallel_attention(*strided, method=method)
        grads = torch.autograd.grad(out.sum(), leaves)
        for got, expected in zip(grads, want, strict=True):
            assert (unshard(got) - expected).abs().max() < 1e-12


@case
def some_inputs_without_gradient() -> None:
    q, k, v, grad = inputs(RANKS, RANKS, 4 * RANKS)
    want = one_process(q, k, v, grad, None)
    part = shard(k).requires_grad_()
    for method in METHODS:
        out = context_parallel_attention(shard(q), part, shard(v), method=method)
        (got,) = torch.autograd.grad(out, part, shard(grad))
        assert (unshard(got) - want[3]).abs().max() < 1e-12


@case
def autocast() -> None:
    q, k, v, _ = inputs(RANKS, RANKS, 4 * RANKS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for method in METHODS:
            out = unshard(context_parallel_attention(shard(q), shard(k), shard(v), method=method))
            assert out.dtype == torch.bfloat16
            require(out, q.bfloat16(), k.bfloat16(), v.bfloat16())


@case
def every_rank_has_the_same_work() -> None:
    """Scores that a causal mask leaves, per rank: from the calls that a rank makes."""
    scores = 0
    original = ring.attention

    def counting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        nonlocal scores
        m, n = q.shape[2], k.shape[2]
        scores += m * n - (m * (m - 1) // 2 if options["is_causal"] else 0)
        return original(q, k, v, **options)

    q, k, v, _ = inputs(1, 1, 16 * RANKS)
    ring.attention = counting  # type: ignore[assignment]
    try:
        context_parallel_attention(shard(q), shard(k), shard(v), is_causal=True)
    finally:
        ring.attention = original
    total = 16 * RANKS * (16 * RANKS + 1) // 2
    assert scores * RANKS == total, (scores, total)


@case
def transfers_start_before_the_computation_they_hide_behind() -> None:
    log: list[str] = []
    attend, pass_on = ring.attention, ring.Ring.pass_on

    def logged_attend(*args: Any, **options: Any) -> Any:
        log.append("attend")
        return attend(*args, **options)

    def logged_pass_on(*args: Any) -> Any:
        log.append("pass on")
        return pass_on(*args)

    q, k, v, _ = inputs(1, 1, 4 * RANKS)
    ring.attention, ring.Ring.pass_on = logged_attend, logged_pass_on  # type: ignore[assignment, method-assign]
    try:
        context_parallel_attention(shard(q), shard(k), shard(v))
    finally:
        ring.attention, ring.Ring.pass_on = attend, pass_on  # type: ignore[method-assign]
    # the first one between the two chunks of a rank's own rows
    assert log == ["attend"] + ["pass on", "attend"] * (RANKS - 1) + ["attend"], log


@case
def part_of_the_processes() -> None:
    """A mesh of data parallel x context parallel, and a group of one."""
    if RANKS == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
        for method in METHODS:
            agree(2, 2, 9, options={"is_causal": True}, method=method, group=mesh["sequence"])
    groups = [dist.new_group([r]) for r in range(RANKS)]
    agree(2, 1, 5, options={"is_causal": True}, method="ring", group=groups[RANK])
    with raises(ValueError, "member"):
        shard(torch.zeros(1, 1, 8, 1), groups[(RANK + 1) % RANKS])


@case
def shard_and_unshard() -> None:
    for seqlen in range(2 * RANKS, 4 * RANKS + 1):
        whole = torch.arange(3 * seqlen).view(3, seqlen)
        part = shard(whole, dim=1)
        assert torch.equal(unshard(part, dim=1), whole)
        every = [torch.empty(1, dtype=torch.int64) for _ in range(RANKS)]
        dist.all_gather(every, torch.tensor([part.shape[1]]))
        assert sum(map(int, every)) == seqlen and max(every) - min(every) <= 1
    whole = torch.randn(1, 1, 4 * RANKS, 1, requires_grad=True)
    shard(whole).sum().backward()
    assert whole.grad is not None and whole.grad.sum() == 4
    with raises(RuntimeError, "detach"):
        unshard(shard(whole))


@case
def refusals() -> None:
    q, k, v, _ = inputs(RANKS, RANKS, 4 * RANKS)
    parts = [shard(t) for t in (q, k, v)]
    with raises(ValueError, "method: expected 'ring' or 'all_to_all'"):
        context_parallel_attention(*parts, method="star")
    with raises(ValueError, "layout"):
        context_parallel_attention(*parts, layout="sbhd")
    with raises(ValueError, "q: expected"):
        context_parallel_attention(*parts, seqlen=8 * RANKS)
    with raises(ValueError, "seqlen: expected at least"):
        context_parallel_attention(*(t[:, :, :1] for t in parts))
    with raises(ValueError, "rows on the ranks"):  # what shard() does not give: all on the last rank but a few
        short = 4 if RANK == 0 else 2
        context_parallel_attention(*(torch.cat([t, t], 2)[:, :, :short] for t in parts))
    with raises(ValueError, "k: expected q's batch and rows"):
        context_parallel_attention(parts[0], parts[1][:, :, 1:], parts[2])
    with raises(ValueError, "k: expected torch.float64"):
        context_parallel_attention(parts[0], parts[1].float(), parts[2])
    with raises(ValueError, "head dimension"):
        context_parallel_attention(parts[0], parts[1][..., :4], parts[2])
    with raises(ValueError, "as many heads"):
        context_parallel_attention(parts[0], parts[1], torch.cat([parts[2]] * 2, 1))
    with raises(ValueError, "share evenly"):
        context_parallel_attention(parts[0], parts[1][:, :1], parts[2][:, :1], method="all_to_all")
    with raises(TypeError, "q: expected a torch.Tensor"):
        context_parallel_attention(None, None, None)  # type: ignore[arg-type]
    with raises(ValueError, "4 dimensions"):
        context_parallel_attention(*(t[0] for t in parts))
    with raises(ValueError, "at least"):
        shard(q[:, :, : 2 * RANKS - 1])


# -- DTensors ---------------------------------------------------------------------------------------------------


def placed(tensors: list[Tensor], mesh: Any, *placements: Any) -> list[DTensor]:
    return [distribute_tensor(t, mesh, list(placements)) for t in tensors]


def check_dtensors(
    heads: int, heads_kv: int, mesh: Any, placements: list[Any], expected: list[Any], layout: str, *, batch: int = 2
) -> None:
    """Both ways to call it, without communication where `expected` is what was given."""
    q, k, v, grad = (t.repeat(batch // 2, 1, 1, 1) for t in inputs(heads, heads_kv, 6, layout=layout))
    options = {"is_causal": True, "layout": layout}
    want = one_process(q, k, v, grad, None, **options)
    lse_placements = [Shard(1) if p == Shard(2 if layout == "bshd" else 1) else p for p in expected]
    for return_lse in (False, True, False):  # nothing remembered from the call before may leak into the next
        dq, dk, dv = placed([q, k, v], mesh, *placements)
        for call in (attention, sharded_attention):
            found = call(dq, dk, dv, return_lse=return_lse, **options)
            out, *lse = found if return_lse else (found,)
            assert isinstance(out, DTensor) and list(out.placements) == expected, out.placements
            assert out.shape == q.shape and (out.full_tensor() - want[0]).abs().max() < 1e-12
            for one in lse:
                assert list(one.placements) == lse_placements, one.placements
                assert one.shape == want[1].shape and (one.full_tensor() - want[1]).abs().max() < 1e-12
    leaves = [t.requires_grad_() for t in placed([q, k, v], mesh, *placements)]
    sharded_attention(*leaves, **options).backward(distribute_tensor(grad, mesh, placements))
    for leaf, expected_grad in zip(leaves, want[2:], strict=True):
        assert leaf.grad is not None and list(leaf.grad.placements) == placements
        assert (leaf.grad.full_tensor() - expected_grad).abs().max() < 1e-12


@case
def dtensors() -> None:
    register_sharding()
    register_sharding()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layout, heads in (("bhsd", 1), ("bshd", 2)):
        rows = 3 - heads
        check_dtensors(2 * RANKS, RANKS, mesh, [Shard(heads)], [Shard(heads)], layout)
        check_dtensors(2, 1, mesh, [Shard(0)], [Shard(0)], layout, batch=2 * RANKS)
        check_dtensors(2, 1, mesh, [Shard(0)], [Shard(0)], layout, batch=2 * RANKS + 2)  # not all have as many
        check_dtensors(2 * RANKS, 1, mesh, [Shard(heads)], [Replicate()], layout)  # one key head can't be split
        check_dtensors(2, 2, mesh, [Shard(rows)], [Replicate()], layout)
        check_dtensors(2, 2, mesh, [Replicate()], [Replicate()], layout)
    if RANKS == 4:
        both = init_device_mesh("cpu", (2, 2))
        check_dtensors(4, 2, both, [Shard(0), Shard(1)], [Shard(0), Shard(1)], "bhsd")
        check_dtensors(8, 4, both, [Shard(1), Shard(1)], [Shard(1), Shard(1)], "bhsd")
        check_dtensors(4, 2, both, [Shard(1), Shard(1)], [Shard(1), Replicate()], "bhsd")


@case
def dtensors_without_communication() -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    register_sharding()
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = placed(inputs(RANKS, RANKS, 6)[:3], mesh, Shard(1))
    for call in (attention, sharded_attention):
        with CommDebugMode() as communication:
            call(*tensors)
        assert communication.get_total_counts() == 0


@case
def dtensors_with_masks_and_lengths() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    q, k, v, grad = (t.repeat(RANKS, 1, 1, 1) for t in inputs(2 * RANKS, RANKS, 6))
    batch = q.shape[0]
    lengths = torch.arange(batch, dtype=torch.int32) % 6 + 1
    generator = torch.Generator().manual_seed(3)
    for shape in ((6, 6), (2 * RANKS, 1, 6), (batch, 1, 1, 6), (batch, 2 * RANKS, 6, 6)):
        mask = torch.randn(shape, generator=generator, dtype=torch.float64)
        want = attention(q, k, v, attn_mask=mask, seqused_k=lengths)
        for placement in (Shard(0), Shard(1), Replicate()):
            tensors = placed([q, k, v], mesh, placement)
            extras = {name: distribute_tensor(t, mesh, [Replicate()]) for name, t in
                      (("attn_mask", mask), ("seqused_k", lengths))}
            out = sharded_attention(*tensors, **extras)
            assert (out.full_tensor() - want).abs().max() < 1e-12, (shape, placement)


@case
def dtensor_refusals() -> None:
    register_sharding()
    mesh = init_device_mesh("cpu", (RANKS,))
    q, k, v, _ = inputs(RANKS, RANKS, 6)
    dq, dk, dv = placed([q, k, v], mesh, Shard(1))
    for call in (attention, sharded_attention):
        with raises(TypeError, "k: expected a DTensor"):
            call(dq, k, dv)
    with raises(TypeError, "attn_mask: expected a DTensor"):
        sharded_attention(dq, dk, dv, attn_mask=torch.ones(6, 6, dtype=torch.bool))
    with raises(ValueError, "out"):
        sharded_attention(dq, dk, dv, out=torch.empty_like(dq))


# -- what users are shown ---------------------------------------------------------------------------------------


@contextmanager
def as_a_program(*arguments: str) -> Iterator[io.StringIO]:
    """What torch.distributed.run would give a script, in the group that there is; yields what it prints."""
    given = {"LOCAL_RANK": str(RANK), "RANK": str(RANK), "WORLD_SIZE": str(RANKS)}
    with (
        mock.patch.dict(os.environ, given), mock.patch.object(sys, "argv", ["program", *arguments]),
        mock.patch.object(torch.cuda, "device_count", lambda: 0), mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"), redirect_stdout(io.StringIO()) as printed,
    ):  # fmt: skip
        yield printed


@case
def the_example() -> None:
    with as_a_program("--seqlen", "33", "--heads", str(RANKS)) as printed, raises(SystemExit, "0"):
        runpy.run_path(str(ROOT / "examples" / "shard_two_gpus.py"), run_name="__main__")
    assert printed.getvalue().count("relative error") == (2 if RANK == 0 else 0), printed.getvalue()


@case
def the_benchmark() -> None:
    file = FOLDER / f"benchmark-{RANKS}.json"
    sizes = ["--seqlen", str(32 * RANKS), "--heads", "2", "--dims", "16", "--trials", "2"]
    with as_a_program() as printed:
        assert context_parallel.main([*sizes, "--device", "cpu", "--json", str(file)]) == 0
    if RANK > 0:
        return
    record = json.loads(file.read_text())
    assert record["protocol"]["ranks"] == RANKS and record["met"]
    assert [c["shape"]["is_causal"] for c in record["cases"]] == [False, True]
    for found in record["cases"]:
        expected = set(context_parallel.CONTESTANTS) - ({"all_to_all"} if 2 % RANKS else set())
        assert set(found["contestants"]) == expected and 0 <= found["hidden"] <= 1
        assert found["speedup_ring"]["value"] > 0
    assert printed.getvalue().count("H=2") == 2


@case
def the_benchmark_times_nothing_that_is_wrong() -> None:
    def skewed(*tensors: Any, **options: Any) -> Any:
        out, lse = attention(*tensors, **options)
        return out * 1.01, lse

    with mock.patch.object(ring, "attention", skewed), as_a_program() as printed:
        status = context_parallel.main(["--seqlen", str(32 * RANKS), "--heads", "1", "--dims", "16", "--device", "cpu"])
    assert status == (1 if RANK == 0 else 0)
    assert RANK > 0 or "WRONG\n  ring: rank 0" in printed.getvalue(), printed.getvalue()


@case
def the_documentation() -> None:
    examples = [block.text for block in blocks(text_of("docs/distributed.md"), "python")]
    assert len(examples) == 2
    for example in examples:
        q, k, v, _ = inputs(RANKS, RANKS, 4 * RANKS)
        names: dict[str, Any] = {
            "torch": torch, "q": q, "k": k, "v": v, "seqlen": 4 * RANKS, "group": None,
            "mesh": init_device_mesh("cpu", (RANKS,)),
        }  # fmt: skip
        exec(example, names)
        found = names["whole"] if "whole" in names else names["out"].full_tensor()
        assert (found - attention(q, k, v, is_causal=True)).abs().max() < 1e-12


def be(rank: int, ranks: int) -> None:
    """Run all cases as one of the ranks."""
    global RANK, RANKS
    RANK, RANKS = rank, ranks
    dist.init_process_group(
        "gloo", init_method=f"file://{FOLDER / str(ranks)}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=LIMIT_S / 2),
    )  # fmt: skip
    found: dict[str, str] = {}
    for name, run in CASES.items():
        try:
            run()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (FOLDER / f"{ranks}-{rank}.json").write_text(json.dumps(found))
        if found[name]:
            sys.exit(1)  # the ranks may no longer be at the same place
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for ranks in map(int, sys.argv[2:]):
        processes = [context.Process(target=be, args=(rank, ranks)) for rank in range(ranks)]
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT_S
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()


if __name__ == "__main__":
    main()
