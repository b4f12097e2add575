"""What a release is made with: tag, version and changelog; the workflow; the container."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashcore
from flashcore import cli
from flashcore.benchmark import results

yaml = pytest.importorskip("yaml", reason="needs the dev extra, which `make test` installs")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def release() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".github" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(root: Path, version: str, changelog: str) -> Path:
    (root / "flashcore").mkdir()
    (root / "flashcore" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}")
    return root


GOOD = "## [Unreleased]\n\n## [1.2.0] - 2030-01-02\n\n- New.\n\n## [1.1.0] - 2030-01-01\n\n- Old.\n"


def test_a_release_prints_its_notes(tmp_path: Path) -> None:
    assert release().notes("v1.2.0", tree(tmp_path, "1.2.0", GOOD)) == "- New."


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "says"),
    [
        ("1.2.0", "1.2.0", GOOD, "expected v1.2.0"),
        ("v1.2.0", "1.2.1", GOOD, "expected v1.2.1"),
        ("v1.3.0", "1.3.0", GOOD, "expected one section"),
        ("v1.2.0", "1.2.0", GOOD.replace(" - 2030-01-02", ""), "expected one section"),
        ("v1.2.0", "1.2.0", GOOD.replace("- New.\n", ""), "that says something"),
        ("v1.2.0", "1.2.0", GOOD.replace("[Unreleased]\n", "[Unreleased]\n\n- Later.\n"), "Unreleased"),
        ("v1x2.0", "1x2.0", GOOD, "expected one section"),
    ],
)
def test_a_release_that_contradicts_itself(tmp_path: Path, tag: str, version: str, changelog: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        release().notes(tag, tree(tmp_path, version, changelog))


def test_this_tree_releases_nothing_by_accident() -> None:
    version = flashcore.__version__
    if "dev" in version:
        assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
        with pytest.raises(ValueError, match="expected one section"):
            release().notes(f"v{version}")
    else:
        assert release().notes(f"v{version}")


def steps(workflow: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
        yield from ((name, step) for step in job["steps"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    used = [step["uses"] for _, step in steps(workflow) if "uses" in step]
    lines = re.findall(r"uses: (\S+)(.*)", workflow.read_text())
    assert [name for name, _ in lines] == used
    for name, rest in lines:
        assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", name), name
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", rest), f"{name}: the release that the commit is, as a comment"


def test_only_what_publishes_may_write() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert jobs["permissions"] == {}
    rights = {name: job["permissions"] for name, job in jobs["jobs"].items()}
    assert rights == {"build": {"contents": "read"}, "pypi": {"id-token": "write"}, "github": {"contents": "write"}}
    assert jobs["jobs"]["pypi"]["environment"] == "pypi"
    assert not any("checkout" in step.get("uses", "") for name, step in steps(WORKFLOWS[0]) if name != "build")
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "secrets." not in text and "password" not in text.replace("no password exists", "")


def test_the_workflow_runs_what_exists() -> None:
    commands = "\n".join(step.get("run", "") for _, step in steps(ROOT / ".github" / "workflows" / "release.yml"))
    for file in (".github/release.py", ".ci/run"):
        assert file in commands and (ROOT / file).is_file()
    # Values of the event reach the shell as variables only, never pasted into its text.
    assert "${{" not in commands


def docker() -> list[list[str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_container_copies_what_exists() -> None:
    instructions = docker()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = {part for name, rest in instructions if name == "COPY" for part in rest.split()[:-1]}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", "\n".join(rest for _, rest in instructions)):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)
    for read in re.findall(r'(?:readme = |license-files = \[)"([^"]+)"', pyproject):
        assert read in sources  # the build reads them


def test_the_container_can_compile_and_starts_a_command() -> None:
    instructions = docker()
    (base,) = (rest for name, rest in instructions if name == "FROM")
    tag = base.partition(":")[2]
    assert re.match(r"\d+\.\d+-", tag), "a base by release, not whatever is latest"
    packages = next(rest for name, rest in instructions if name == "RUN" and "apt-get" in rest)
    assert {"gcc", "g++", "libc6-dev"} <= set(packages.split())
    (entry,) = (json.loads(rest) for name, rest in instructions if name == "ENTRYPOINT")
    (command,) = (json.loads(rest) for name, rest in instructions if name == "CMD")
    assert entry == ["flashcore"] and command[0] in cli.COMMANDS
    assert "USER" in [name for name, _ in instructions]


def test_the_container_has_what_was_measured() -> None:
    versions = dict(rest.split("=") for name, rest in docker() if name == "ARG")
    newest = max(
        results.newest(ROOT / "results", "validation").values(), key=lambda record: record["environment"]["recorded"]
    )["environment"]
    assert versions == {"TORCH": newest["torch"].partition("+")[0], "TRITON": newest["triton"]}
