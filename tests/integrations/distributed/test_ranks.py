"""What worker.py finds on 2, 3 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks(ranks: int, case: str, outcome: Callable[[], dict[int, list[dict[str, str]]]]) -> None:
    reasons = {f"rank {rank}": found[case] for rank, found in enumerate(outcome()[ranks]) if found[case]}
    assert not reasons, "\n".join(f"{rank}: {why}" for rank, why in reasons.items())
