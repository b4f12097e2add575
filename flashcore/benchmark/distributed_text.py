"""What docs/distributed.md states of one sequence on several GPUs, from the records in results/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.markdown import link, table, times

Record = dict[str, Any]


def context_parallel(folder: Path) -> Iterator[str]:
    """A row a problem of each GPU's newest record: one GPU's time, and how many times as fast the ways to share are."""
    for gpu, record in sorted(results.newest(folder, "context-parallel").items()):
        environment, cases = record["environment"], record["cases"]
        yield (
            f"{record['protocol']['ranks']} x {gpu}, {environment['recorded'][:10]}, commit "
            f"`{environment['commit'][:12]}`, PyTorch {environment['torch']}, {cases[0]['shape']['seqlen']:,} rows, "
            f"fp16, ms; {link(record)}."
        )
        yield ""
        yield from table(
            ("Problem", "one GPU", "ring", "all-to-all", "one / ring", "one / all-to-all", "hidden"),
            [_row(case) for case in cases],
        )


def _row(case: Record) -> tuple[str, ...]:
    shape, found = case["shape"], case.get("contestants", {})
    label = f"H={shape['heads']} D={shape['head_dim']} {'causal' if shape['is_causal'] else 'full'}"
    ms = [f"{found[n]['us'] / 1e3:.2f}" if n in found else "-" for n in ("one", "ring", "all_to_all")]
    faster = [case.get(f"speedup_{way}") for way in ("ring", "all_to_all")]
    hidden = f"{case['hidden']:.0%}" if "hidden" in case else "wrong"
    return label, *ms, *(times(each["value"] if each else None) for each in faster), hidden
