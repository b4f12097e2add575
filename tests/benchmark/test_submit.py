"""Submissions: what they hold, what keeps one from being written, and that no path of a machine gets into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashcore.benchmark import results, submit
from flashcore.measure import machine
from tests.benchmark import records

OTHER = records.environment(gpu="another GPU")
CHANGED = records.environment() | {"source": "1" * 16}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of the made-up GPU, which this machine then has."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(machine, "environment", lambda: records.environment())
    monkeypatch.chdir(tmp_path)
    results.write(tmp_path / "results" / "v.json", records.validation())
    results.write(tmp_path / "results" / "p.json", records.peers())
    results.write(tmp_path / "results" / "other.json", records.peers(environment=OTHER))
    return tmp_path


def test_the_newest_of_this_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main([]) == 0
    said = capsys.readouterr().out
    assert "9 of 9 configurations correct, validation passed" in said and "attach it to an issue" in said
    path = folder / "submission-h100-2001-01-01.json"
    submission = results.read(path)
    assert submission["validation"]["kind"] == "validation" and len(submission["peers"]) == 1
    assert submission["info"]["flashcore"] and not set(submit.PATHS) & set(submission["info"])
    assert str(Path.home()) not in path.read_text()
    assert submit.main(["--check", str(path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("sound")
    read = results.newest(folder, "validation")
    assert read[records.GPU]["file"] == path.name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"validation": None}, "no validation: run flashcore validate --json"),
        ({"peers": []}, "no comparison with peers: run flashcore bench"),
        ({"peers": [records.peers("b1", [], environment=OTHER)]}, "the records differ in gpu"),
        ({"peers": [records.peers("b1", [], environment=CHANGED)]}, "differ in source"),
        ({"peers": [records.peers("b1", [], complete=False)]}, "not complete: run its command again"),
        ({"validation": {**records.validation(), "cases": []}}, "the validation lacks S128 B8, S128 B16"),
        ({"kind": "peers"}, "expected a submission, got a record of kind peers"),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, changes: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    submission = submit.merge([records.validation(), records.peers("b1", [])])
    assert submit.problems(submission) == []
    results.write(folder / "s.json", submission | changes)
    assert submit.main(["--check", str(folder / "s.json")]) == 1
    assert why in capsys.readouterr().err


def test_nothing_is_written_of_what_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(folder / "results" / name) for name in ("v.json", "other.json")]
    assert submit.main([*names, "--out", str(folder / "s.json")]) == 1
    assert "differ in gpu (Made-up H100 of the tests, another GPU)" in capsys.readouterr().err
    assert not (folder / "s.json").exists()


def test_misuse(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results.write(folder / "host.json", {"kind": "host", "environment": records.environment()})
    (folder / "no.json").write_text(json.dumps([]))
    both = [str(folder / "results" / "v.json")] * 2
    for arguments, why in (
        ([str(folder / "host.json")], "got host"),
        (both, "one validation, got 2"),
        ([str(folder / "no.json")], "schema"),
        (["--check", str(folder / "none.json")], "No such file"),
    ):
        assert submit.main(arguments) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setattr(machine, "environment", lambda: records.environment(gpu="GPU without results"))
    assert submit.main([]) == 2
    assert "no records of this GPU" in capsys.readouterr().err
