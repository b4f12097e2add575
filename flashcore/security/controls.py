"""The controls of the audit: the shipped kernels with a branch on data planted in them.

A rescale is skipped where no row's maximum moved by more than 8 in units of log2, as FlashAttention-4 does. Here the
result would be wrong, since the factor is dropped with the multiplication; what counts is the branch. The audit must
find it wherever it is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

from flashcore.launch.binding import Binding
from flashcore.testing.mutants import Mutant, plant


@dataclass(frozen=True, slots=True)
class _Beside(Mutant):
    """A fault in a module that imports its neighbours, which the copy does not have."""

    def source(self) -> str:
        package = self.file.rsplit("/", 1)[0].replace("/", ".")
        return Mutant.source(self).replace("from .", f"from flashcore.{package}.")


CONTROLS: dict[str, Mutant] = {
    "portable": Mutant(
        "conditional rescale, portable",
        "kernels/portable/attention.py",
        "acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED)",
        """if tl.min(rescale, 0) < 0.00390625:
            acc = acc * rescale[:, None]
        acc = multiply(weights, v_tile, acc, EMULATED)""",
    ),
    "hopper": _Beside(
        "conditional rescale, hopper",
        "kernels/hopper/attention.py",
        "acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, out_layout), assert_trivial=True)[:, None]",
        """if gl.max(base - m, 0) > 8.0:
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, out_layout), assert_trivial=True)[:, None]""",
    ),
}


def planted(binding: Binding, kernel: str) -> Binding:
    """`binding` with the control of its kernel, by name, in place of the kernel."""
    return replace(binding, fn=_module(kernel).attention_forward)


@cache
def _module(kernel: str) -> ModuleType:
    return plant(CONTROLS[kernel])
