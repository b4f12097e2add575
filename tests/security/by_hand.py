"""Machine code written by hand, as nvdisasm would print it."""

from __future__ import annotations

from flashcore.security import sass


def code(*lines: str) -> sass.Code:
    """A kernel of these instructions; a line that ends in a colon is a label."""
    text, offset = ".text.kernel:\n", 0
    for line in (*lines, "EXIT"):
        if line.endswith(":"):
            text += line + "\n"
        else:
            text += f"        /*{offset:04x}*/                   {line} ;\n"
            offset += 16
    return sass.parse(text)
