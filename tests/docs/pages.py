"""The Markdown that users read, taken apart: which pages there are, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# A fence, its language, and what a comment on the line above says of it: <!-- example: gpu -->.
_FENCE = re.compile(r"^(?:<!-- example: (\S+) -->\n)?```([\w-]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    text: str
    note: str  # "gpu": it runs on a GPU or not at all
    line: int  # of the page, where the text begins


def all_pages() -> list[str]:
    """Every page, as a path from the root of the repository."""
    outside = [*ROOT.glob("*.md"), ROOT / "results" / "README.md"]
    inside = (ROOT / "docs").rglob("*.md")
    return sorted(path.relative_to(ROOT).as_posix() for path in (*outside, *inside))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> Iterator[Block]:
    """The fenced blocks of these languages, in order; of every language without one."""
    for found in _FENCE.finditer(text):
        if not languages or found[2] in languages:
            yield Block(found[2], found[3], found[1] or "", text.count("\n", 0, found.start(3)) + 1)
