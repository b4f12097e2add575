"""What a user installs: the wheel and its metadata, built once from this tree."""

from __future__ import annotations

import email.message
import email.parser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashcore

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="needs the dev extra, which `make test` installs")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as z:
        (name,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(z.read(name).decode())


def test_metadata(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "flashcore-attn"
    assert metadata["Version"] == flashcore.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    requires = metadata.get_all("Requires-Dist") or []
    always = [r for r in requires if "extra ==" not in r]
    assert [r.replace('"', "'") for r in always] == ["torch>=2.9", "triton>=3.6; sys_platform == 'linux'"]
    assert metadata.get_all("Provides-Extra") == ["bench", "dev"]
    bench = {r.split(">")[0] for r in requires if r.replace('"', "'").endswith("extra == 'bench'")}
    assert bench == {"matplotlib", "nvidia-ml-py", "rich", "scipy", "typer"}


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "flashcore = flashcore.cli:main" in z.read(entry_points).decode()
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "flashcore").rglob("*.*") if p.suffix != ".pyc"}
    assert "flashcore/py.typed" in files
    assert files <= names  # tuning tables and the C source included
    outside = {n for n in names if not n.startswith(("flashcore/", "flashcore_attn-"))}
    assert not outside
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_twine_accepts_it(wheel: Path) -> None:
    pytest.importorskip("twine", reason="needs the dev extra, which `make test` installs")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_changelog_names_the_version() -> None:
    version = flashcore.__version__
    heading = "## [Unreleased]" if "dev" in version else f"## [{version}]"
    assert heading in (ROOT / "CHANGELOG.md").read_text()
