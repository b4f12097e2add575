"""Figures in prose come from results/: each is in the output of a trial that its own paragraph links to.

Tables that `make report` writes are held to results/ by tests/benchmark/test_report.py. This is about the other figures
of the pages that speak of speed; the logs of docs/design/ are notes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest

from flashcore.benchmark.report import MARKED
from tests.docs.pages import ROOT, text_of

PAGES = (
    "README.md", "docs/index.md", "docs/GETTING_STARTED.md", "docs/PERFORMANCE_GUIDE.md", "docs/TECHNICAL_DEEP_DIVE.md"
)  # fmt: skip
_TRIAL = re.compile(r"\(\S*?(results/trials/[\w.-]+)\)")
_LINK = re.compile(r"\]\([^)]*\)")
_NUMBER = re.compile(r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?)(?![\w.,]*\d)")
# A measurement by its unit: 43.6 µs, 351 cycles, 1.17x, 518 TFLOP/s, 2.5 TB/s. Not: 16 bytes, 128 rows.
_MEASURED = re.compile(_NUMBER.pattern + r"(?: (?:µs|ms|cycles|TFLOP/s|TB/s|GHz)\b|x\b|%)")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs, list items and rows of tables, without generated blocks and code."""
    text = re.sub(r"^```.*?^```$", "", MARKED.sub("", text), flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        yield from re.split(r"\n(?=\||- |\d+\. )", block)


@cache
def numbers_of(trial: str) -> list[float]:
    text = (ROOT / trial).read_text(encoding="utf-8")
    return [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]


def unfounded(text: str) -> Iterator[str]:
    """The figures of a page that no trial in reach of them holds, rounded as they are."""
    for paragraph in paragraphs(text):
        trials = _TRIAL.findall(paragraph)
        plain = _LINK.sub("]", re.sub(r"\[trial \d+\]|`[^`]*`", "", paragraph))
        decimals = [n for n in _NUMBER.findall(plain) if "." in n] if trials else []
        for figure in dict.fromkeys((*_MEASURED.findall(plain), *decimals)):
            value, digits = float(figure.replace(",", "")), len(figure.partition(".")[2])
            if not any(round(n, digits) == value for trial in trials for n in numbers_of(trial)):
                yield f"{figure} in: {' '.join(paragraph.split())[:100]}"


@pytest.mark.parametrize("page", PAGES)
def test_figures_come_from_results(page: str) -> None:
    assert list(unfounded(text_of(page))) == []


@pytest.mark.parametrize(
    "text",
    [
        "It takes 43.6 µs.",
        "| D=64 | 9 µs |",
        "- It is 1.17x as fast.",
        "It takes 77.77 µs ([trial 08](../results/trials/08-shipped-kernel-candidates.txt)).",
        "| S=512 ([trial 08](../results/trials/08-shipped-kernel-candidates.txt)) | 77.77 |",
    ],
)
def test_a_planted_figure_is_found(text: str) -> None:
    assert list(unfounded(text))


def test_a_trials_own_figure_passes() -> None:
    assert not list(unfounded("4.2 µs ([trial 08](../results/trials/08-shipped-kernel-candidates.txt)), 16 bytes."))
