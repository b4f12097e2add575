"""The site, which `make docs` builds: this folder's Markdown as it reads on its own, and the docstrings.

Links that leave this folder: a file becomes a download, a page of PAGES that page, and a folder its name.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import flashcore  # noqa: E402  # the checkout's, wherever the command runs

project = "FlashCore"
author = "The FlashCore authors"
copyright = author  # the name that Sphinx wants
version = release = flashcore.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
nitpicky = True  # an error that a docstring names must exist

html_theme = "furo"
html_title = f"FlashCore {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "none"  # the signature has them, and Args says what a type can't
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
default_role = "code"

# Files outside of this folder that are pages of the site -> the page that stands for it here.
PAGES = {
    "ATTRIBUTIONS.md": "project/attributions.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/reporting.md",
    "results/README.md": "project/results.md",
}
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")


def bring_inside(app: Sphinx, name: str, source: list[str]) -> None:
    """The text of a page that stands for a file of PAGES, and every page's links to such files and to folders."""
    page = DOCS / f"{name}.md"
    original = next((ROOT / file for file, stand_in in PAGES.items() if DOCS / stand_in == page), page)
    if original != page:
        source[0] = original.read_text(encoding="utf-8")
        app.env.note_dependency(os.fspath(original))

    def rewritten(match: re.Match[str]) -> str:
        text, anchor, target = match[1], match[3] or "", (original.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        if target.is_dir():
            return text
        stand_in = PAGES.get(target.relative_to(ROOT).as_posix())
        return f"[{text}]({os.path.relpath(DOCS / stand_in if stand_in else target, page.parent)}{anchor})"

    source[0] = LINK.sub(rewritten, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", bring_inside)
