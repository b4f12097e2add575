"""Is this tag the release that the tree says it is?

    python .github/release.py v1.2.3

prints the changelog's section of that version, for the release's notes. The exit status is 1 where tag, version and
changelog disagree. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, root: Path = ROOT) -> str:
    """The changelog's section of the version that `tag` names.

    Raises:
        ValueError: the tag is not "v" and the package's version, or the changelog has no dated section of it, or has
            changes that it lists as unreleased.
    """
    found = re.search(r'^__version__ = "([^"]+)"$', (root / "flashcore" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError("flashcore/__init__.py states no __version__")
    version = found[1]
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, the version {version}: expected v{version}")
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    texts = {heading: text.strip() for heading, _, text in (section.partition("\n") for section in sections)}
    dated = [h for h in texts if re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}", h)]
    if len(dated) != 1 or not texts[dated[0]]:
        raise ValueError(f"CHANGELOG.md: expected one section '## [{version}] - <date>' that says something")
    if texts.get("[Unreleased]"):
        raise ValueError(f"CHANGELOG.md: what is in [Unreleased] belongs to {version} or out of this release")
    return texts[dated[0]]


def main() -> int:
    """The command line."""
    try:
        print(notes(sys.argv[1]))
    except (IndexError, ValueError) as error:
        print(f"release: {error if isinstance(error, ValueError) else 'expected a tag'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
