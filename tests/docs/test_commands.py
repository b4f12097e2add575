"""Every command that a page names exists, with the options it is given: targets of make, commands, extras, files."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import pytest

from flashcore.cli import COMMANDS
from tests.docs.pages import ROOT, all_pages, blocks, text_of

pytest.importorskip("typer", reason="needs the bench extra, which `make test` installs")

SHELLS = ("console", "bash", "sh", "shell")
# A command in running text: between backticks, and one that ours begins.
_INLINE = re.compile(r"`((?:make|flashcore|python -m flashcore[\w.]*)(?: [^`\n]*)?)`")


def commands(text: str) -> Iterator[str]:
    """Every line of a shell's block, and every command of ours in running text."""
    for block in blocks(text, *SHELLS):
        yield from (line.removeprefix("$ ") for line in block.text.replace("\\\n", " ").splitlines() if line.strip())
    yield from (found[1] for found in _INLINE.finditer(text) if found[1] != "flashcore")


@cache
def help_of(module: str, subcommand: str = "") -> str:
    """What a command prints when it is asked for its options."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        import_module(module).main([*subcommand.split(), "--help"])
    return printed.getvalue()


def wrong(command: str) -> str:
    """Why this command can't be what a reader should type; "" when it can."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case []:
            return ""
        case ["make", *targets]:
            known = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            missing = [t for t in targets if t not in known and not re.fullmatch(r"[A-Z]+=\S+", t)]
            return f"no target {missing}" if missing else ""
        case ["flashcore"]:
            return ""
        case ["flashcore", name, *rest]:
            if name.startswith("-"):
                return "" if name in ("--help",) else f"no option {name}"
            return _unknown_options(COMMANDS[name][0], rest) if name in COMMANDS else f"no command {name}"
        case ["python" | "python3", "-m", module, *rest]:
            if find_spec(module) is None:
                return f"no module {module}"
            if module.startswith("flashcore."):
                return _unknown_options(module, rest)
            at = [word for word in rest if word.startswith("flashcore.")]
            return wrong(f"python -m {shlex.join(rest[rest.index(at[0]) :])}") if at else _missing_files(rest)
        case ["python" | "python3" | "pytest", *rest]:
            return _missing_files(rest)
        case ["pip", "install", *rest]:
            after = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1]
            extras = set(re.findall(r"^(\w+) = \[", after.split("\n[")[0], re.MULTILINE))
            asked = {e for word in rest for found in re.findall(r"\[(.*)\]", word) for e in found.split(",")}
            ours = any(word.startswith((".", "flashcore-attn")) for word in rest)
            return f"no extra {asked - extras}" if ours and asked - extras else ""
        case [first, *_] if (ROOT / first).is_file():
            return ""
        case ["git" | "docker" | "cd" | "export", *_]:
            return ""
    return "nothing here knows how to check it"


def _unknown_options(module: str, rest: list[str]) -> str:
    """Options that the help of a module's command does not name; its first plain word may be a command of its own."""
    first = rest[0] if rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]) else ""
    text = help_of(module, first) if first else ""
    text += help_of(module)
    if first and not re.search(rf"\b{first}\b", text):
        return f"{module} knows no {first}"
    asked = [word.split("=")[0] for word in rest if word.startswith("--")]
    missing = [option for option in asked if option != "--help" and not re.search(rf"{option}\b", text)]
    return f"{module} has no option {', '.join(missing)}" if missing else ""


def _missing_files(words: list[str]) -> str:
    missing = [word for word in words if "/" in word and not (ROOT / word.split("::")[0]).exists()]
    return f"no file {', '.join(missing)}" if missing else ""


@pytest.mark.parametrize("page", all_pages())
def test_commands_exist(page: str) -> None:
    found = [f"{command}: {why}" for command in commands(text_of(page)) if (why := wrong(command))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "command",
    ["make vaildate", "flashcore banch", "flashcore bench --siute nine", "flashcore audit sas",
     "pip install '.[bnech]'", "python -m flashcore.benchmark.reprot",
     "python -m flashcore.benchmark.report --chekc", "pytest tests/nowhere", "python examples/nowhere.py",
     "frobnicate"],
)  # fmt: skip
def test_a_planted_mistake_is_found(command: str) -> None:
    assert wrong(command)
    assert list(commands(f"```console\n{command}  # why\n```\n")) == [f"{command}  # why"]


def test_commands_in_running_text_are_seen() -> None:
    assert list(commands("Type `make nothing` or `flashcore bench --suite nine`, not `made up`.")) == [
        "make nothing", "flashcore bench --suite nine",
    ]  # fmt: skip
