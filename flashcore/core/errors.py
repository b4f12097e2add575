"""The errors FlashCore raises on purpose.

TypeError            an argument is not a tensor, or not of the type its parameter wants
ValueError           shapes, strides, devices, dtypes or options that contradict each other
└── none of ours: the built-in classes are what callers already catch
NotImplementedError
└── UnsupportedError  a well-formed problem that no kernel serves; carries every kernel's reasons
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class UnsupportedError(NotImplementedError):
    """A well-formed attention problem that none of the candidate kernels serves.

    Attributes:
        reasons: kernel name -> the reasons why that kernel refused.
    """

    def __init__(self, what: str, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        self.reasons: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in (reasons or {}).items()}
        lines = [f"{name}: {'; '.join(why)}" for name, why in self.reasons.items() if why]
        super().__init__("\n  ".join([what, *lines]))
