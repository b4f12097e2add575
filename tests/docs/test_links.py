"""Every link from a page to a file of the repository leads somewhere, also on the pages that the site does not have."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, all_pages, text_of

_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)")


def broken(page: str, text: str) -> list[str]:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return [link for link in _LINK.findall(text) if not ((ROOT / page).parent / link).exists()]


@pytest.mark.parametrize("page", all_pages())
def test_links_lead_somewhere(page: str) -> None:
    assert broken(page, text_of(page)) == []


def test_a_broken_link_is_found() -> None:
    assert broken("docs/page.md", "[a](design.md) [b](../README.md#x) [c](nowhere.md) [d](https://x)") == ["nowhere.md"]
