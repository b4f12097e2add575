"""The `flashcore` command: what it prints, its exit statuses, and `info` where almost nothing is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashcore
from flashcore import cli, diagnostics

ROOT = Path(__file__).resolve().parent.parent
# A module that Python finds first and that behaves as if it were not installed.
MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "flashcore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def without(folder: Path, *modules: str) -> str:
    for name in modules:
        (folder / f"{name}.py").write_text(MISSING)
    return os.pathsep.join([str(folder), str(ROOT)])


def test_every_command_has_a_main() -> None:
    for name, (module, summary) in cli.COMMANDS.items():
        assert find_spec(module), f"{name}: {module}"
        assert summary.endswith((".", "?"))


def test_module_alone_prints_the_report() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("info").stdout
    for said in (flashcore.__version__, "torch", "triton", "compiler", "cache", "portable"):
        assert said in done.stdout


def test_info_as_json() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["flashcore"] == flashcore.__version__
    assert report["kernels"]["reference"] == []
    assert report.keys() == diagnostics.collect().keys()


def test_info_where_nothing_is_there(tmp_path: Path) -> None:
    path = without(tmp_path, "typer", "rich", "pynvml", "triton")
    done = run("info", "--json", PYTHONPATH=path, PATH=str(tmp_path), CC="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["compiler"] is None
    assert report["gpus"] == []
    assert report["kernels"]["portable"]
    assert "C compiler" in run("info", PYTHONPATH=path, PATH=str(tmp_path), CC="").stdout


def test_other_commands_say_what_they_miss(tmp_path: Path) -> None:
    done = run("validate", PYTHONPATH=without(tmp_path, "typer"))
    assert done.returncode == 2
    assert "pip install 'flashcore-attn[bench]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_overview_and_misspelling() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)
    wrong = run("valdate")
    assert wrong.returncode == 2
    assert "validate" in wrong.stderr


def test_options_and_status_pass_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "echoed.py").write_text("def main(argv):\n    print(argv)\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "echo", ("echoed", "Says what it was given."))
    with pytest.raises(SystemExit) as ended:
        cli.main(["echo", "--trials", "5", "--json", "--help", "-x"])
    assert ended.value.code == 7
