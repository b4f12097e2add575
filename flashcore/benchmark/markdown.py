"""What all generated documents write alike: tables and ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table with its first column to the left and the others to the right, and an empty line."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(header))) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.strip() for cell in row) + " |"
    yield ""


def link(record: dict[str, Any]) -> str:
    """To a record, from a document in docs/."""
    return f"[results/{record['file']}](../results/{record['file']})"


def times(value: float | None) -> str:
    """A ratio: 1.25x; - where there is none."""
    return "-" if value is None else f"{value:.2f}x"
