"""`flashcore submit-results`: what was measured on one GPU as one checked file, for an issue of the project.

    flashcore validate --json
    flashcore bench --suite nine --cold --json results/peers.json
    flashcore submit-results                                         the newest of both, for this machine's GPU
    flashcore submit-results results/validation.json results/peers.json --out mine.json
    flashcore submit-results --check mine.json                       whether such a file is sound

The file holds the records as they were written and what `flashcore info` says, without the paths of your machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcore import diagnostics
from flashcore.benchmark import peers_text, results, validation_text
from flashcore.benchmark.shapes import NINE, SUITES, Shape
from flashcore.measure import machine

Record = dict[str, Any]

KINDS = ("validation", "peers")
SAME = ("gpu", "driver", "torch", "triton", "cuda", "source")  # of the environment: one machine, one state of the code
PATHS = ("cache", "compiler")  # of `flashcore info`: these may hold a user's name


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file or check one. Returns 1 when something is missing or doesn't fit together, 2 when misused."""
    options = _options(argv)
    try:
        if options.check:
            return _say(options.check, problems(results.read(options.check)))
        files = options.files or _newest(results.FOLDER, machine.environment()["gpu"])
        submission = merge([results.read(path) for path in files])
    except (OSError, ValueError) as misuse:
        print(f"flashcore submit-results: {misuse}", file=sys.stderr)
        return 2
    if found := problems(submission):
        return _say(None, found)
    path = options.out or Path(results.default_path("submission", submission["environment"]).name)
    results.write(path, submission)
    for line in text(submission):
        print(line)
    print(f"Written to {path}: attach it to an issue of the project.")
    return 0


def _say(path: Path | None, found: Sequence[str]) -> int:
    for problem in found:
        print(f"flashcore submit-results: {problem}", file=sys.stderr)
    if path and not found:
        for line in text(results.read(path)):
            print(line)
        print(f"{path}: sound")
    return int(bool(found))


def _newest(folder: Path, gpu: str | None) -> list[Path]:
    """The files of this GPU's newest complete validation and of every suite's newest run."""
    validation = results.newest(folder, "validation")
    peers = [peers_text.newest(folder, suite) for suite in SUITES]
    files = [found[gpu]["file"] for found in (validation, *peers) if gpu in found]
    return [folder / name for name in dict.fromkeys(files)]


def merge(records: Sequence[Record]) -> Record:
    """One record of several, each as it is; `problems` says whether they belong together.

    Raises:
        ValueError: a record of another kind, more than one validation, or none at all.
    """
    if odd := sorted({record["kind"] for record in records} - set(KINDS)):
        raise ValueError(f"expected records of kind {' and '.join(KINDS)}, got {', '.join(odd)}")
    validations = [record for record in records if record["kind"] == "validation"]
    if len(validations) > 1:
        raise ValueError(f"expected one validation, got {len(validations)}")
    if not records:
        raise ValueError("no records of this GPU in results/: run flashcore validate --json and flashcore bench first")
    info = {name: value for name, value in diagnostics.collect().items() if name not in PATHS}
    return {
        "kind": "submission",
        "environment": records[0]["environment"],
        "info": info,
        "validation": validations[0] if validations else None,
        "peers": [record for record in records if record["kind"] == "peers"],
    }


def problems(submission: Record) -> list[str]:
    """What keeps a submission from being used, each with what to do about it."""
    if submission.get("kind") != "submission":
        return [f"expected a submission, got a record of kind {submission.get('kind')}"]
    found = []
    parts = results.members(submission)
    if submission["validation"] is None:
        found.append("no validation: run flashcore validate --json")
    if not submission["peers"]:
        found.append("no comparison with peers: run flashcore bench --suite nine --cold --json FILE")
    for name in SAME:
        values = {str(part["environment"].get(name)) for part in parts}
        if len(values) > 1:
            found.append(f"the records differ in {name} ({', '.join(sorted(values))}): measure all of them again")
    if any(part["environment"]["gpu"] is None for part in parts):
        found.append("a record was made without a GPU")
    if any(not part.get("complete", True) for part in parts):
        found.append("a comparison with peers is not complete: run its command again, it goes on where it stopped")
    validated = {Shape(**case["shape"]) for case in (submission["validation"] or {"cases": ()})["cases"]}
    if submission["validation"] is not None and (missing := [s.label for s in NINE if s not in validated]):
        found.append(f"the validation lacks {', '.join(missing)}: run flashcore validate --json without --configs")
    return found


def text(submission: Record) -> list[str]:
    """What a submission says, in a few lines."""
    validation = submission["validation"]
    lines = [
        f"{submission['environment']['gpu']}: {sum(case['correct'] for case in validation['cases'])} of "
        f"{len(validation['cases'])} configurations correct, validation "
        + ("passed" if validation_text.passed(validation) else "not passed")
    ]
    for record in submission["peers"]:
        lines.append(f"peers, {record['suite']}:")
        lines += [f"  {line}" for line in peers_text.rest(record) if line]
    return lines


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashcore submit-results", description="What was measured on one GPU as one file for an issue."
    )
    parser.add_argument(
        "files", type=Path, nargs="*", metavar="RESULTS.json", help="records of validate and bench (the newest here)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(submission-<gpu>-<date>.json)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="say whether this submission is sound")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
