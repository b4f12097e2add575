"""Holds the code to docs/design.md: its drawing of the rooms is read here, arrow by arrow."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flashcore"
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))

NEVER_TRITON = ("core/", "launch/binding.py", "launch/capability.py", "launch/select.py")
# What `import flashcore` and the choice of a kernel load: Triton may come only inside their functions.
LATE_TRITON = ("__init__.py", "__main__.py", "cli.py", "diagnostics.py", "core/", "fast/", "reference/", "tuning/",
               "launch/binding.py", "launch/capability.py", "launch/select.py", "launch/launcher.py", "launch/ops.py")
# Rooms that measure and report may use the `bench` extra, and integrations import what they integrate with.
BEYOND_BASE = ("benchmark/", "measure/", "security/", "testing/", "integrations/", "cli.py")
BASE = {*sys.stdlib_module_names, "flashcore", "torch", "triton"}


@dataclass(frozen=True)
class Import:
    module: str  # dotted, as far as it names a module
    line: int
    at_load: bool  # runs when the module is loaded: not in a function, not for the type checker alone


def read_drawing(text: str) -> dict[str, list[str]]:
    """Room -> the rooms it may import, from the first fenced block after "## The rooms"."""
    block = text.split("## The rooms", 1)[1].split("```", 2)[1]
    arrows: dict[str, list[str]] = {}
    folder = ""
    for line in block.splitlines():
        entry = re.match(r"( +)(\S+)", line)
        if not entry:
            continue
        inside = len(entry[1]) > 2
        name = entry[2].rstrip("/")
        if not inside:
            folder = name
        room = f"{folder}/{name}" if inside else name
        if "->" in line:
            targets = line.rsplit("->", 1)[1].strip()
            arrows[room] = [] if targets == "nothing of ours" else [t.strip() for t in targets.split(",")]
    return arrows


ARROWS = read_drawing((ROOT / "docs" / "design.md").read_text())


def room_of(file: str) -> str | None:
    """The innermost line of the drawing that speaks of this file; None when no line has an arrow for it."""
    parts = file.split("/")
    for n in range(len(parts), 0, -1):
        if (room := "/".join(parts[:n])) in ARROWS:
            return room
    return None


def file_of(module: str) -> str | None:
    """The file that a dotted name of ours stands for: a module, or a package's __init__."""
    if not re.fullmatch(r"flashcore(\.\w+)*", module):
        return None
    path = "/".join(module.split(".")[1:])
    for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
        if candidate in FILES:
            return candidate
    return None


def spellings(room: str, arrow: str) -> set[str]:
    """What an arrow of `room` may stand for: a neighbour in its folder or a room of the house, folder or file."""
    beside = room.split("/")[0] + "/" if "/" in room else ""
    return {arrow, f"{arrow}.py", f"{beside}{arrow}", f"{beside}{arrow}.py"}


def reachable(room: str, target: str) -> bool:
    """Whether the drawing lets `room` import the file `target`: by its own line, and by its folder's if it has one."""
    rooms = [r for r in (room, room.rsplit("/", 1)[0]) if r in ARROWS]
    names = {name for r in rooms for arrow in [r, *ARROWS[r]] for name in spellings(r, arrow)}
    return any(target == name or target.startswith(f"{name}/") for name in names)


def imports_of(source: str, file: str) -> list[Import]:
    """Every import in the source, those by a string that names a module of ours included."""
    package = ["flashcore", *file.split("/")[:-1]]

    def names(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if not module.startswith("flashcore"):
                yield module
                return
            for alias in node.names:
                deeper = f"{module}.{alias.name}"
                if file_of(deeper):
                    yield deeper
                elif deeper != "flashcore.__version__":  # one source, free to all
                    yield module
        elif isinstance(node, ast.Constant) and "." in str(node.value) and file_of(str(node.value)):
            yield node.value

    found: list[Import] = []

    def walk(node: ast.AST, at_load: bool) -> None:
        literal = isinstance(node, ast.Constant)
        found.extend(Import(name, getattr(node, "lineno", 0), at_load and not literal) for name in names(node))
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        inner = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            walk(child, inner and not (typing_only and child in node.body))

    walk(ast.parse(source), True)
    return found


def violations(file: str, source: str) -> list[str]:
    """What in this file the drawing forbids."""
    room = room_of(file)
    found = imports_of(source, file)
    wrong = []
    for i in found:
        top = i.module.split(".")[0]
        where = f"flashcore/{file}:{i.line} imports {i.module}"
        if top == "flashcore":
            target = file_of(i.module)
            if target is None:
                wrong.append(f"{where}, which does not exist")
            elif room is None:
                wrong.append(f"{where}, but has no line in docs/design.md")
            elif not reachable(room, target):
                wrong.append(f"{where}; docs/design.md: {room} -> {', '.join(ARROWS[room]) or 'nothing of ours'}")
            continue
        if top == "triton" and file.startswith(NEVER_TRITON):
            wrong.append(f"{where}: this room never does")
        if top == "triton" and i.at_load and file.startswith(LATE_TRITON):
            wrong.append(f"{where} when it is loaded: only inside a function")
        if top not in BASE and not file.startswith(BEYOND_BASE):
            wrong.append(f"{where}, which a plain installation lacks")
        if file.startswith("kernels/") and top != "__future__" and top != "triton":
            wrong.append(f"{where}: device code needs Triton alone")
    return list(dict.fromkeys(wrong))


@pytest.mark.parametrize("file", FILES)
def test_arrows(file: str) -> None:
    wrong = violations(file, (PACKAGE / file).read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/portable/planted.py", "from flashcore.core.config import Config"),
        ("kernels/portable/planted.py", "import os"),
        ("core/planted.py", "import triton"),
        ("core/planted.py", "def f():\n    from ..launch import binding"),
        ("launch/select.py", "def f():\n    import triton.language"),
        ("fast/planted.py", "import triton"),
        ("fast/planted.py", "from flashcore import diagnostics"),
        ("fast/planted.py", "import numpy"),
        ("launch/planted.py", "import flashcore.core.config"),
        ("measure/planted.py", "from importlib import import_module\nimport_module('flashcore.core.target')"),
        ("cli.py", "import flashcore.launch.binding"),
    ],
)
def test_a_planted_import_is_found(file: str, source: str) -> None:
    assert violations(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/planted.py", "from .errors import UnsupportedError"),
        ("launch/select.py", "from flashcore.core import config, problem"),
        ("fast/planted.py", "def f():\n    import triton"),
        ("diagnostics.py", "from flashcore import __version__"),
        ("fast/planted.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
    ],
)
def test_what_the_drawing_allows_passes(file: str, source: str) -> None:
    assert not violations(file, source)


def test_loading_never_reaches_triton() -> None:
    """The same through other modules: the closure of what is imported when a LATE_TRITON file is loaded."""
    loads = {f: [i.module for i in imports_of((PACKAGE / f).read_text(), f) if i.at_load] for f in FILES}
    todo = [(f, [f]) for f in FILES if f.startswith(LATE_TRITON)]
    seen: set[str] = set()
    while todo:
        file, path = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for module in loads[file]:
            assert module.split(".")[0] != "triton", f"{' -> '.join(path)} loads triton"
            if (target := file_of(module)) is not None:
                todo.append((target, [*path, target]))


def test_the_two_families_never_meet() -> None:
    for here, there in (("portable", "hopper"), ("hopper", "portable")):
        for file in FILES:
            if file.startswith(f"kernels/{here}/") or file == f"launch/{here}.py":
                modules = [i.module for i in imports_of((PACKAGE / file).read_text(), file)]
                assert not [m for m in modules if there in m.split(".")], file


def test_every_arrow_of_the_drawing_names_a_room() -> None:
    known = {*ARROWS, *(r.split("/")[0] for r in ARROWS)}
    for room, arrows in ARROWS.items():
        for arrow in arrows:
            assert known & spellings(room, arrow), f"{room} -> {arrow}"


def test_every_folder_is_a_package() -> None:
    for folder in {p.parent for p in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").exists(), folder


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]), ids=str)
def test_no_file_is_too_long(path: Path) -> None:
    text = path.read_text()
    if len(text.splitlines()) > 600:
        assert "600 lines" in (ast.get_docstring(ast.parse(text)) or ""), "its docstring must say why"


@pytest.mark.parametrize("file", FILES)
def test_all_names_what_exists(file: str) -> None:
    tree = ast.parse((PACKAGE / file).read_text())
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined.update((alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names = ast.literal_eval(node.value)
            assert len(names) == len(set(names))
            assert not set(names) - defined


def test_exports() -> None:
    import flashcore

    names = ["UnsupportedError", "__version__", "attention", "attention_varlen", "explain", "warmup"]
    assert flashcore.__all__ == names
    assert set(flashcore.__all__) <= set(dir(flashcore))
    for name in flashcore.__all__:
        assert getattr(flashcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        _ = flashcore.atention
    from flashcore.core.errors import UnsupportedError
    from flashcore.fast.attention_production import attention

    assert flashcore.attention is attention
    assert flashcore.UnsupportedError is UnsupportedError
