"""Lines and a progress bar for people; lines alone where the output is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_BETWEEN_DRAWS_S = 0.2


class Terminal:
    """Prints lines above a progress bar of `total` steps, as a context manager.

    The bar is drawn inside `advance` and by nothing else: a drawing thread would wake up within somebody's timing.
    """

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._bar: Any = None
        self._task: Any = None
        self._waiting, self._drawn = 0, 0.0

    def __enter__(self) -> Terminal:
        if sys.stdout.isatty():
            try:
                from rich.progress import Progress
            except ModuleNotFoundError:
                return self
            self._bar = Progress(auto_refresh=False, transient=True)
            self._task = self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        self._waiting += steps
        if self._bar and time.monotonic() - self._drawn > _BETWEEN_DRAWS_S:
            self._bar.update(self._task, advance=self._waiting, refresh=True)
            self._waiting, self._drawn = 0, time.monotonic()

    def line(self, text: str = "") -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)


def us(value: float | None, width: int = 8) -> str:
    """Microseconds for a table column; a dash where nothing was measured."""
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width}.{2 if value < 100 else 1}f}"


def kind_of(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"
