"""A worker process that may hang, crash or lose the GPU without costing more than the item it was at.

The worker appends what it does to a journal, one JSON object a line: {"at": [case, who]} before everything that may go
wrong, {"case": ..., ...} for each case that is finished, and what else it found out. Its parent watches the journal.
When the worker ends early or writes nothing for `patience_s`, the parent ends it, adds {"fault": [case, who, why]}
and starts another, which reads the journal first and leaves out what is done and what is to blame.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAULTS_TO_LEAVE = 2  # after this many faults somebody is left out of every further case
_POLL_S = 0.2


@dataclass
class Journal:
    """What a journal says."""

    header: Any = None
    at: tuple[str, str] | None = None  # None: nothing is under way
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)  # (case, who) -> why
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Everything up to the last whole line; a line cut off by a crash is as if never written."""
        journal = cls()
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            if line.endswith("\n"):
                journal.add(json.loads(line))
        return journal

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one line."""
        if "header" in entry:
            self.header = entry["header"]
        elif "at" in entry:
            self.at = entry["at"] and (entry["at"][0], entry["at"][1])
        elif "fault" in entry:
            case, who, why = entry["fault"]
            self.faults[case, who] = why
        elif "case" in entry:
            self.cases[entry["case"]] = entry
            self.at = None
        else:
            self.facts.update(entry)
            self.at = None

    def blamed(self, case: str, who: str) -> str | None:
        """Why `who` is left out of `case`; None when it isn't."""
        if (case, who) in self.faults:
            return self.faults[case, who]
        own = [why for (_, other), why in self.faults.items() if other == who]
        return f"left out after {len(own)} faults: {own[-1]}" if len(own) >= FAULTS_TO_LEAVE else None


class Writer:
    """The worker's end of a journal."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, **entry: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def at(self, case: str, who: str) -> None:
        self(at=[case, who])


def supervise(
    command: Sequence[str],
    path: Path,
    *,
    patience_s: float,
    budget_s: float = float("inf"),
    heard: Callable[[dict[str, Any]], object] = lambda entry: None,
    most_restarts: int = 20,
) -> bool:
    """Run `command`, which writes the journal at `path`, until it ends by itself with status 0.

    Its output goes to a log beside the journal. `heard` gets each finished case and each fault as it comes.

    Returns:
        True when the worker finished, False when the budget ran out or it could not get past a fault.
    """
    deadline = time.monotonic() + budget_s
    log = path.with_suffix(".log")
    for _ in range(most_restarts):
        end = _once(command, path, log, patience_s, deadline, heard)
        if end in ("finished", "budget"):
            return end == "finished"
        at = Journal.read(path).at
        if at is None:
            heard({"fault": ["", "worker", f"{end}: {_tail(log)}"]})
            return False
        fault = [*at, f"{end}: {_tail(log)}" if end != "hung" else f"no progress for {patience_s:.0f} s"]
        text = path.read_text()
        verdict = json.dumps({"fault": fault}) + "\n" + json.dumps({"at": None}) + "\n"
        path.write_text(text[: text.rfind("\n") + 1] + verdict)  # what a crash cut off goes
        heard({"fault": fault})
    return False


def _once(
    command: Sequence[str],
    path: Path,
    log: Path,
    patience_s: float,
    deadline: float,
    heard: Callable[[dict[str, Any]], object],
) -> str:
    path.touch()
    read_to = path.stat().st_size
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as worker:
        last_word = time.monotonic()
        while True:
            status = worker.poll()
            with path.open() as file:
                file.seek(read_to)
                news = file.read()
            whole = news[: news.rfind("\n") + 1]
            read_to += len(whole.encode())
            if whole:
                last_word = time.monotonic()
            for line in whole.splitlines():
                entry = json.loads(line)
                if "case" in entry:
                    heard(entry)
            if status is not None:
                return "finished" if status == 0 else f"ended with status {status}"
            now = time.monotonic()
            if now > deadline or now - last_word > patience_s:
                worker.kill()
                return "budget" if now > deadline else "hung"
            time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
