"""Every block of Python in a page runs, in the page's order and in one namespace, as a reader would type it.

On a machine without a GPU "cuda" reads "cpu". What needs a GPU says so above its block: <!-- example: gpu -->.
A block of text right below one of Python is what that prints; "..." stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT, Block, all_pages, blocks, text_of

# Pages that are run where their surroundings are: with ranks, with models.
ELSEWHERE = {"docs/distributed.md": "tests/integrations/distributed/worker.py"}
# What a page's first block takes for granted.
GIVEN = {
    "docs/design.md": """
import torch
q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.float16) for _ in range(3))
"""
}


def run(page: str, text: str, device: str, given: str = "") -> None:
    """Execute a page's blocks; the page and the line are in the traceback of one that fails."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(_on(device, given), names)
    printed, below = None, 0
    for block in blocks(text, "python", "text"):
        if block.language == "python":
            printed = _execute(page, block, device, names)
            below = block.line + block.text.count("\n") + 3  # past the fence, an empty line and the next fence
        elif printed is not None and block.line == below:
            same = doctest.OutputChecker().check_output(block.text, printed, doctest.ELLIPSIS)
            assert same, f"{page}:{block.line}: expected\n{block.text}\ngot\n{printed}"


def _execute(page: str, block: Block, device: str, names: dict[str, Any]) -> str | None:
    """What it printed; None where it waits for a GPU."""
    code = compile("\n" * (block.line - 1) + _on(device, block.text), page, "exec")
    if block.note == "gpu" and device != "cuda":
        return None
    assert block.note in ("", "gpu"), f"{page}:{block.line}: an example is for `gpu` or for any, not {block.note}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(code, names)
        except ModuleNotFoundError as missing:
            if (missing.name or "").split(".")[0] not in optional():
                raise
            pytest.skip(f"{page}:{block.line} needs {missing.name}, which an extra installs")
    return printed.getvalue()


def optional() -> set[str]:
    """The distributions that an extra installs and a plain installation does not need, as modules are named."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', section)} - {"flashcore_attn"}


def _on(device: str, source: str) -> str:
    return source.replace('"cuda"', f'"{device}"')


PAGES = [page for page in all_pages() if any(blocks(text_of(page), "python"))]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_examples_run(page: str, device: str) -> None:
    torch.manual_seed(0)
    run(page, text_of(page), device, GIVEN.get(page, ""))


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_that_run_elsewhere_do(page: str) -> None:
    assert page in PAGES
    assert page.rsplit("/", 1)[1] in text_of(ELSEWHERE[page])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nfrom flashcore import atention\n```\n", ImportError),
        ("<!-- example: gpu -->\n```python\nx = = 1\n```\n", SyntaxError),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
        ("<!-- example: tpu -->\n```python\nx = 1\n```\n", AssertionError),
    ],
)
def test_a_planted_error_is_found(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run("page.md", text, "cpu")
