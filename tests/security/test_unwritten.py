"""Registers that are read before anything wrote them, in code made by hand and in a kernel that ptxas got wrong."""

from __future__ import annotations

import pytest

from flashcore.security import unwritten
from tests.security.by_hand import code


def found(*lines: str) -> list[tuple[str, ...]]:
    return [read.registers for read in unwritten.reads(code(*lines))]


@pytest.mark.parametrize(
    ("lines", "registers"),
    [
        (["FADD R2, R3, 1"], [("R3",)]),
        (["UIADD3 UR30, UP0, UR30, 0x20, URZ"], [("UR30",)]),  # what ptxas 12.8 made of a copy and a sum
        (["MOV R3, RZ", "FADD R2, R3, 1"], []),
        (["@P0 MOV R3, RZ"], [("P0",)]),
        (["ISETP.EQ.AND P0, PT, RZ, RZ, PT", "@P0 MOV R3, RZ", "FADD R2, R3, 1"], []),  # written on some way
        ([".L_x_0:", "FADD R2, R3, 1", "MOV R3, RZ", "BRA `(.L_x_0)"], []),  # on the next turn, at the latest
        (["BRA `(.L_x_0)", "MOV R3, RZ", ".L_x_0:", "FADD R2, R3, 1"], [("R3",)]),
        (["PRMT R3, RZ, 0x7610, R3"], []),
        (["LDS R4, [R1]"], []),
        (["LDL R2, [R1+0x8]", "FADD R4, R2, 1"], []),
    ],
)
def test_reads(lines: list[str], registers: list[tuple[str, ...]]) -> None:
    assert found(*lines) == registers


def test_a_load_of_four_dimensions_reads_six_registers_and_a_store_five() -> None:
    ready = [f"UMOV UR{i}, URZ" for i in (4, 5, *range(8, 14))]
    assert not found(*ready, "UTMALDG.4D [UR8], [UR4]")
    assert found(*ready[:-1], "UTMALDG.4D [UR8], [UR4]") == [("UR13",)]
    assert not found(*ready[:-1], "UTMASTG.4D [UR8], [UR4]")
    assert found(*ready[:-2], "UTMASTG.4D [UR8], [UR4]") == [("UR12",)]


@pytest.mark.parametrize(
    "lines",
    [
        ["MOV R3, RZ", "MOV R4, RZ", "MOV R4, R3", "FADD R2, R3, R4"],
        ["IADD3 R1, R1, -0x8, RZ", "STL [R1], RZ", "MOV R0, RZ", "FADD R2, R0, 1"],
        ["S2R R0, SR_TID.X", "ISETP.GT.AND P0, PT, R0, 0x1f, PT", "@P0 EXIT", "MOV R0, RZ", "FADD R2, R0, R0"],
    ],
)
def test_a_write_that_is_taken_away_is_noticed(lines: list[str]) -> None:
    right = code(*lines)
    assert not unwritten.reads(right)
    faulty = unwritten.without_a_write(right)
    assert faulty is not None and unwritten.reads(faulty)


def test_there_may_be_no_write_to_take_away() -> None:
    assert unwritten.without_a_write(code("MOV R3, RZ")) is None
    behind = ("MOV R3, RZ", "BRA `(.L_x_0)", "NOP", ".L_x_0:", "FADD R2, R3, 1")
    assert unwritten.without_a_write(code(*behind)) is None
