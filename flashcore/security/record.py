"""What every audit leaves behind: a record for results/, with a row of plain words for each claim it speaks of."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashcore.measure import machine


@dataclass(frozen=True, slots=True)
class Row:
    """One claim, what was measured of it, and what the same run did to a planted fault."""

    claim: str
    figure: str
    control: str
    passed: bool  # the claim held and the control failed, as it has to


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that all of these commands have."""
    made = argparse.ArgumentParser(prog=f"flashcore audit {name}", description=description)
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is drawn (%(default)s)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    return made


def finish(
    name: str, rows: Sequence[Row], path: Path | None, *, arguments: Sequence[str] | None, seconds: float,
    gpu: bool = True, complete: bool = True, **figures: Any,
) -> int:
    """Print the rows, write the record, and return the exit status: 0 where every row passed.

    Args:
        path: where the record goes, None = nowhere.
        arguments: the command line, so that a reader can repeat it.
        gpu: whether a GPU took part; the record names none else.
        complete: False for a run smaller than the claim asks for, which no document is to state.
    """  # fmt: skip
    for row in rows:
        control = f"; control: {row.control}" if row.control else ""
        print(f"{'ok  ' if row.passed else 'FAIL'} {row.claim}: {row.figure}{control}")
    if path is not None:
        environment = machine.environment()
        if not gpu:
            environment.update(gpu=None)
        said = [a for a in arguments or () if a != "--json" and not a.endswith(".json")]
        write(path, {
            "schema": 1, "kind": f"audit-{name}", "environment": environment,
            "command": " ".join(("flashcore audit", name, *said)), "complete": complete, "seconds": round(seconds, 1),
            "rows": [asdict(row) for row in rows], **figures,
        })  # fmt: skip
    return int(not all(row.passed for row in rows))


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
