"""What a user installs: the distributions built from this tree, and the wheel alone in an environment of its own.

The environment downloads nothing: it links the installed torch, triton and what those declare, and nothing else that
the machine has. What the wheel's metadata forgets to ask for is therefore missing there, as it would be for a user.
"""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

import flashcore

pytest.importorskip("hatchling", reason="needs the dev extra, which `make test` installs")
packaging_requirements = pytest.importorskip("packaging.requirements", reason="needs the dev extra")

ROOT = Path(__file__).resolve().parent.parent
EPOCH = "1700000000"  # any fixed second

CHECKS = """
import sys
import torch
import flashcore
from flashcore.core.target import A100, H100
from flashcore.launch import compile_check, select

assert flashcore.__file__.startswith(sys.prefix), flashcore.__file__
q, k, v = (torch.randn(2, 4, 77, 64) for _ in range(3))
out = flashcore.attention(q, k, v, is_causal=True)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
for target in (H100, A100):
    problem, config = next(select.shipped(target))
    found = compile_check.check(problem, config, target)
    assert found.ok, found.error
    print(found.arch, found.kernel, found.registers)
"""


def run(command: Sequence[str | Path], folder: Path, **variables: str) -> str:
    """What a command prints that runs in `folder` and knows nothing of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON", "FLASHCORE"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=kept | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, into: Path) -> dict[str, bytes]:
    """File name -> bytes of the source distribution built from `source`, and of the wheel built from that."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", into, source]
    run(command, into.parent, SOURCE_DATE_EPOCH=EPOCH)
    return {path.name: path.read_bytes() for path in into.iterdir()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "dist"
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(dist: Path) -> Path:
    """The source distribution, unpacked as of now: other times and another folder than the checkout's."""
    (built,) = dist.glob("*.tar.gz")
    into = dist.parent / "unpacked"
    with tarfile.open(built) as archive:
        archive.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = into.iterdir()
    for path in folder.rglob("*"):
        os.utime(path)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as z:
        (name,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(z.read(name).decode())


def required(requirements: Sequence[str]) -> dict[str, Distribution]:
    """The installed distributions that these requirements and theirs ask for, without extras."""
    found: dict[str, Distribution] = {}
    todo = list(requirements)
    while todo:
        requirement = packaging_requirements.Requirement(todo.pop())
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:  # the import that needs it says so
            continue
        todo += found[requirement.name].requires or []
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, metadata: email.message.Message, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of the wheel and of links to what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    for installed in required(metadata.get_all("Requires-Dist") or []).values():
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(installed.locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, "--disable-pip-version-check", wheel], folder)
    return folder


def test_metadata(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "flashcore-attn"
    assert metadata["Version"] == flashcore.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    requires = metadata.get_all("Requires-Dist") or []
    always = [r for r in requires if "extra ==" not in r]
    assert [r.replace('"', "'") for r in always] == ["torch>=2.9", "triton>=3.6; sys_platform == 'linux'"]
    assert {"bench", "dev", "docs"} <= set(metadata.get_all("Provides-Extra") or [])
    bench = {r.split(">")[0] for r in requires if r.replace('"', "'").endswith("extra == 'bench'")}
    assert bench == {"matplotlib", "nvidia-ml-py", "rich", "scipy", "typer"}


def test_contents(wheel: Path, unpacked: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "flashcore = flashcore.cli:main" in z.read(entry_points).decode()
    # Of the source distribution, not of the checkout: that one may change while this runs.
    files = {p.relative_to(unpacked).as_posix() for p in (unpacked / "flashcore").rglob("*") if p.is_file()}
    sources = {"flashcore/launch/_shim.c", "flashcore/launch/_node.cpp"}
    assert {"flashcore/py.typed", "flashcore/tuning/tables/sm90.json"} | sources <= files
    assert files <= names
    outside = {n for n in names if not n.startswith(("flashcore/", "flashcore_attn-"))}
    assert not outside
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_source_distribution_has_what_the_tests_read(unpacked: Path) -> None:
    names = (
        ".github/release.py", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "SECURITY.md", "docs/conf.py",
        "docs/design.md", "examples/shard_two_gpus.py", "results/README.md", "tests/conftest.py",
    )  # fmt: skip
    for name in names:
        assert (unpacked / name).is_file(), name
    assert {p.suffix for p in (unpacked / "results").rglob("*") if p.is_file()} == {".json", ".md", ".txt"}


def test_twine_accepts_both(dist: Path) -> None:
    pytest.importorskip("twine", reason="needs the dev extra, which `make test` installs")
    run([sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()], dist)


def test_a_second_build_gives_the_same_bytes(dist: Path, unpacked: Path) -> None:
    first = {path.name: path.read_bytes() for path in dist.iterdir()}
    assert len(first) == 2
    again = build(unpacked, dist.parent / "again")
    assert {name: again[name] == content for name, content in first.items()} == dict.fromkeys(first, True)


def test_the_wheel_alone_computes_and_compiles(environment: Path, tmp_path: Path) -> None:
    done = run([environment / "bin" / "python", "-c", CHECKS], tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert [line.split()[0] for line in done.splitlines()] == ["90", "80"]


def test_the_wheel_alone_tells_of_itself(environment: Path, tmp_path: Path) -> None:
    report = json.loads(run([environment / "bin" / "flashcore", "info", "--json"], tmp_path))
    assert report["flashcore"] == flashcore.__version__
    assert report["kernels"]["reference"] == []


def test_without_the_bench_extra_commands_say_what_to_install(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "bin" / "flashcore"), "validate"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'flashcore-attn[bench]'" in done.stderr


def test_bill_of_materials(environment: Path, tmp_path: Path) -> None:
    """The command of the release workflow, on an installation with the same packages as a user's."""
    tool = shutil.which("cyclonedx-py", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs the dev extra, which `make test` installs")
    python = environment / "bin" / "python"
    command = [tool, "environment", "--output-reproducible", python]
    text = run(command, tmp_path, SOURCE_DATE_EPOCH=EPOCH)
    bom = json.loads(text)
    assert bom["bomFormat"] == "CycloneDX" and bom["metadata"]["timestamp"].startswith("2023-11-14")
    components = {component["name"]: component for component in bom["components"]}
    ours = components["flashcore-attn"]
    assert ours["version"] == flashcore.__version__
    assert [entry["license"]["id"] for entry in ours["licenses"] if "id" in entry["license"]] == ["Apache-2.0"]
    (edges,) = (entry["dependsOn"] for entry in bom["dependencies"] if entry["ref"] == ours["bom-ref"])
    wanted = {components[name]["bom-ref"] for name in ("torch", "triton") if name in components}
    assert wanted == set(edges) and components["torch"]["bom-ref"] in edges
