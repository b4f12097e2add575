"""What docs/integrations.md states of transformers' own tests, from their records in results/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.markdown import link, table

Record = dict[str, Any]

KIND = "transformers-own-tests"
TITLES = {"bert": "BERT", "llama": "Llama", "vit": "ViT", "whisper": "Whisper"}
HEADER = ("Model", 'Pass with "sdpa"', 'Pass with "fcore"', "of them by FlashCore", "Excepted", "Regressions")


def own_tests(folder: Path) -> Iterator[str]:
    """A table for the CPU and each GPU that has a record, and why tests are excepted."""
    for device, record in sorted(_newest(folder).items()):
        yield from _table(device, record)


def _newest(folder: Path) -> dict[str, Record]:
    """Device -> its newest complete record."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob(f"{KIND}-*.json")):
        record = results.read(path)
        device = record["environment"]["gpu"] or "CPU"
        before = found.get(device, record)["environment"]["recorded"]
        if record["complete"] and before <= record["environment"]["recorded"]:
            found[device] = {**record, "file": path.name}
    return found


def _table(device: str, record: Record) -> Iterator[str]:
    source = record["transformers"]
    changed = f" (files changed: {len(source['tests_changed'])})" if source["tests_changed"] else ""
    yield (
        f"{device}, {record['environment']['recorded'][:10]}, transformers {source['version']}, its tests of commit "
        f"`{source['tests_commit'][:12]}`{changed}; {link(record)}."
    )
    yield ""
    rows, reasons = [], dict[str, set[str]]()
    for name, model in record["models"].items():
        plain, fcore = model["runs"]["sdpa"], model["runs"]["fcore"]
        counts = (plain["passed"], fcore["passed"], fcore["passed_calling"], len(model["excepted"]),
                  len(model["regressions"]))  # fmt: skip
        rows.append((TITLES.get(name, name), *map(str, counts)))
        for test, why in model["excepted"].items():
            reasons.setdefault(why["reason"], set()).add(test.split("::")[-1])
    yield from table(HEADER, rows)
    for reason, tests in sorted(reasons.items()):
        yield f"- {', '.join(f'`{test}`' for test in sorted(tests))}: {reason}."
    if reasons:
        yield ""
