"""Inputs that find faults, and the gates that say whether a result is right."""

from __future__ import annotations

from flashcore.testing.gates import Verdict, check, require
from flashcore.testing.inputs import FAMILIES, LAYOUTS, Guarded, Inputs, Shape, lay_out, make, poison_padding

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "Guarded",
    "Inputs",
    "Shape",
    "Verdict",
    "check",
    "lay_out",
    "make",
    "poison_padding",
    "require",
]
