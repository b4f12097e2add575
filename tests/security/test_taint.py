"""What the analysis calls tainted, on instructions made by hand: every sink, and every false alarm it once raised."""

from __future__ import annotations

import pytest

from flashcore.security import sass, taint
from flashcore.security.taint import Finding
from tests.security.by_hand import code

DATA = "LDS R0, [R20]"  # R0 is data from here on


def analyse(*lines: str) -> taint.Taint:
    return taint.analyse(code(*lines))


def found(*lines: str) -> list[Finding]:
    return list(analyse(*lines).findings)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("branch", ["FSETP.GT.AND P0, PT, R0, 8, PT", "@P0 BRA `(.L_x_0)", "FMUL R1, R1, R2", ".L_x_0:"]),
        ("branch", ["FSETP.GT.AND P0, PT, R0, 8, PT", "@!P0 EXIT"]),
        ("branch", ["FSETP.GT.AND P0, PT, R0, 8, PT", "VOTE.ANY P1, P0", "@P1 BRA `(.L_x_0)", ".L_x_0:"]),
        ("branch", [".L_x_0:", "BRX R0 -0x10"]),
        ("branch", ["WARPSYNC R0"]),
        ("address", ["LDS R1, [R0+0x10]"]),
        ("address", ["IMAD.WIDE R2, R0, 0x2, R4", "LDG.E.128 R8, desc[UR4][R2.64]"]),
        ("address", ["IMAD.WIDE R2, R0, 0x2, R4", "STG.E [R2.64], R8"]),
        ("address", ["LDC R2, c[0x0][R0+0x210]"]),
        ("address", ["ATOMS.ADD R1, [R0], R2"]),
        ("predicate", ["ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 LDS R1, [R20]"]),
        ("predicate", ["ISETP.NE.AND P0, PT, R0, RZ, PT", "@!P0 STS [R20], R1"]),
        ("predicate", ["ISETP.NE.AND P0, PT, R0, RZ, PT", "LDGSTS.E.BYPASS.128 [R20], [R22.64], P0"]),
        ("predicate", ["ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 HMMA.16816.F32 R4, R8, R12, R4"]),
        ("barrier", ["BAR.SYNC.DEFER_BLOCKING R0"]),
        ("barrier", ["SYNCS.ARRIVE.TRANS64 RZ, [UR4+0x18000], R0"]),
        ("barrier", ["ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 SYNCS.ARRIVE.TRANS64 RZ, [UR4], R3"]),
        ("uniform", ["ULDC.64 UR4, c[0x0][0x118]", "R2UR UR5, R0", "LDG.E R8, [R20.64]"]),
        ("address", ["R2UR UR4, R0", "LDS R1, [UR4]"]),
        ("branch", ["FSETP.GT.AND P0, PT, R0, 8, PT", "VOTEU.ANY UP0, P0", "@UP0 BRA.U `(.L_x_0)", ".L_x_0:"]),
        ("address", ["STL [R1+0x8], R0", "LDL.LU R4, [R1+0x8]", "LDS R2, [R4]"]),
        ("predicate", ["STL [R1], R0", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 LDL R4, [R1]"]),
    ],
)
def test_sinks(kind: str, lines: list[str]) -> None:
    first = found(DATA, *lines)[0]
    assert first.kind == kind
    assert first.text in lines
    assert first.path[0].endswith(DATA) and first.path[-1].endswith(first.text)
    assert not found("MOV R0, c[0x0][0x160]", *lines), "the same with a kernel parameter"


@pytest.mark.parametrize(
    ("source", "register"),
    [
        ("LDG.E.128 R0, [R20.64]", "R3"), ("LDSM.16.M88.4 R0, [R20]", "R3"),
        ("HMMA.16816.F32 R0, R8, R12, R0", "R3"), ("HGMMA.64x64x16.F32 R24, gdesc[UR8], RZ, !UPT", "R55"),
    ],
)  # fmt: skip
def test_sources_taint_every_register_they_write(source: str, register: str) -> None:
    assert [f.kind for f in found(source, f"LDS R60, [{register}]")] == ["address"]
    beyond = f"R{int(register[1:]) + 1}"
    assert not found(source, f"LDS R60, [{beyond}]")


def test_data_flows_through_guards_carries_packed_predicates_and_lanes() -> None:
    compare = "FSETP.GT.AND P0, PT, R0, 8, PT"
    use = "LDS R9, [R5]"
    assert found(DATA, compare, "@P0 MOV R5, 0x10", use)
    assert found(DATA, "IADD3 R4, P1, R0, R6, RZ", "IADD3.X R5, RZ, R7, RZ, P1, !PT", use)
    assert found(DATA, compare, "P2R R5, PR, RZ, 0x1", use)
    flag = "UISETP.NE.AND UP1, UPT, UR5, URZ, UPT"
    assert found(DATA, "R2UR UR5, R0", flag, "UP2UR UR6, UPR, URZ, 0x2", "LDS R9, [UR6]")
    assert not found(DATA, "R2UR UR5, R0", flag, "UP2UR UR6, UPR, URZ, 0x1", "LDS R9, [UR6]")
    assert found(DATA, "R2P PR, R0, 0x9", "SEL R5, R6, R7, P3", use)
    assert found(DATA, "SHFL.BFLY PT, R5, R0, 0x1, 0x1f", use)
    assert found(DATA, "LOP3.LUT P2, R5, R0, 0x7, RZ, 0xc0, !PT", use)


def test_a_matrix_in_registers_has_no_descriptor() -> None:
    """What compilers leave in the place of its descriptor is whatever was there."""
    both, second = "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", "HGMMA.64x64x16.F32 R88, R24, gdesc[UR4].tnspB, R88"
    for register, expected in (("UR4", [both]), ("UR5", [both]), ("UR6", [both, second]), ("UR7", [both, second])):
        for product in (both, second):
            seen = [f.kind for f in found(DATA, f"R2UR {register}, R0", product)]
            assert seen == (["address"] if product in expected else [])


def test_one_register_pair_of_the_descriptor_without_data_is_enough() -> None:
    data = [DATA, "ULDC.64 UR4, c[0x0][0x118]", "R2UR UR5, R0"]
    assert not found(*data, "ULDC.64 UR8, c[0x0][0x118]", "LDG.E R8, [R20.64]")
    assert not found(*data, "LDG.E R8, desc[UR6][R20.64]"), "named"
    assert not found(*data, "LDS R8, [R20]"), "of shared memory"


def test_words_of_the_stack_are_registers() -> None:
    assert not found(DATA, "STL [R1+0x8], R0", "STL [R1+0x4], R30", "LDL R4, [R1+0x4]", "LDS R2, [R4]")
    assert found(DATA, "STL.64 [R1+0x8], R0", "LDL R4, [R1+0x8]", "LDS R2, [R4]")
    assert found("LDG.E.64 R0, [R20.64]", "STL.64 [R1+0x8], R0", "LDL R4, [R1+0xc]", "LDS R2, [R4]")
    assert not found(DATA, "STL [R1+0x8], R0", "STL [R1+0x8], R30", "LDL R4, [R1+0x8]", "LDS R2, [R4]")
    assert found(DATA, "STL [R1+0x8], R0", "@P0 STL [R1+0x8], R30", "LDL R4, [R1+0x8]", "LDS R2, [R4]")


@pytest.mark.parametrize("line", ["LDL R0, [R2]", "STL.U8 [R1+0x1], R0", "STL [R1+0x800], R0", "LDL R0, [R1+R2]"])
def test_a_stack_whose_words_are_not_stated_is_refused(line: str) -> None:
    with pytest.raises(sass.UnknownInstructionError):
        analyse(line)


def test_a_stack_that_moves_is_refused() -> None:
    assert not found("IADD3 R1, R1, -0x10, RZ", "STL [R1], R30", "LDL R4, [R1]")
    for late in (["STL [R1], R30", "IADD3 R1, R1, -0x10, RZ"], [".L_x_0:", "LDG.E.64 R0, [R20.64]", "STL [R1], R30"]):
        with pytest.raises(ValueError, match="the stack moves"):
            analyse(*late)


SET, BOUND = "@P0 LOP3.LUT R17, R17, 0x20, RZ, 0xfc, !PT", "@P1 LOP3.LUT R17, R17, 0x40, RZ, 0xfc, !PT"
COMPARE = "FSETP.GT.AND P0, PT, R0, 8, PT"


@pytest.mark.parametrize(
    ("tested", "clean"),
    [
        (["LOP3.LUT P2, RZ, R17, 0x40, RZ, 0xc0, !PT"], True),
        (["LOP3.LUT P2, RZ, R17.reuse, 0x20, RZ, 0xc0, !PT"], False),
        (["LOP3.LUT P2, RZ, R17, 0x60, RZ, 0xc0, !PT"], False),
        (["LOP3.LUT R17, R17, 0xffffffdf, RZ, 0xc0, !PT", "LOP3.LUT P2, RZ, R17, 0x20, RZ, 0xc0, !PT"], True),
        (["LOP3.LUT R17, R17, 0xffffffbf, RZ, 0xc0, !PT", "LOP3.LUT P2, RZ, R17, 0x20, RZ, 0xc0, !PT"], False),
        (["@P1 LOP3.LUT R17, R17, 0xffffffdf, RZ, 0xc0, !PT", "LOP3.LUT P2, RZ, R17, 0x20, RZ, 0xc0, !PT"], False),
        (["LOP3.LUT R17, R17, R18, RZ, 0xc0, !PT", "LOP3.LUT P2, RZ, R17, 0x40, RZ, 0xc0, !PT"], False),
        (["IADD3 R17, R17, 0x1, RZ", "LOP3.LUT P2, RZ, R17, 0x40, RZ, 0xc0, !PT"], False),
        (["MOV R5, R17", "LOP3.LUT P2, RZ, R5, 0x40, RZ, 0xc0, !PT"], False),
        (["MOV R17, R30", "LOP3.LUT P2, RZ, R17, 0x20, RZ, 0xc0, !PT"], True),
        (["LOP3.LUT P2, RZ, R17, 0x40, RZ, 0x3c, !PT"], False),
    ],
)
def test_packed_predicates_do_not_taint_each_other(tested: list[str], clean: bool) -> None:
    findings = found("MOV R17, RZ", DATA, COMPARE, SET, BOUND, *tested, "@P2 EXIT")
    assert (not findings) == clean


def test_a_register_that_two_predicates_share_is_tainted_as_a_whole_elsewhere() -> None:
    assert found(DATA, "MOV R17, R0", SET, "LOP3.LUT P2, RZ, R17, 0x40, RZ, 0xc0, !PT", "@P2 EXIT")
    assert found("MOV R17, RZ", DATA, COMPARE, SET, "LDS R2, [R17]")


def test_data_flows_around_a_loop() -> None:
    assert found("MOV R5, RZ", ".L_x_0:", "LDS R9, [R5]", "MOV R5, R9", "@P0 BRA `(.L_x_0)")


def test_state_of_a_barrier_and_thread_indices_are_public() -> None:
    assert not found(
        ".L_x_0:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x18000], R92", "@!P0 BRA `(.L_x_0)",
        "S2R R2, SR_TID.X", "LDS R4, [R2]",
    )  # fmt: skip


def test_a_copys_predicate_is_read_not_written() -> None:
    """nvdisasm's own register columns list it as written, which spoils the predicate for what follows."""
    each = sass.decode("LDGSTS.E.BYPASS.128 [R0+0x1000], [R8.64], P0")
    assert each.defs == 0
    assert sass.names(each.uses) == ["R0", "R8", "R9", "P0"]


def test_unmasked_predicates_do_not_flow() -> None:
    assert not found(DATA, "FSETP.GT.AND P0, PT, R0, 8, PT", "P2R R5, PR, RZ, 0x4", "LDS R9, [R5]")


def test_a_register_written_and_read_under_one_guard() -> None:
    assert not found(DATA, "@P0 MOV R0, 0x10", "@P0 LDS R9, [R0]")
    assert found(DATA, "@P0 MOV R0, 0x10", "@!P0 LDS R9, [R0]")
    assert found(DATA, "@P0 MOV R0, 0x10", "LDS R9, [R0]")
    assert found(DATA, "@P0 MOV R0, 0x10", "ISETP.NE.AND P0, PT, R6, RZ, PT", "@P0 LDS R9, [R0]"), "another P0"


@pytest.mark.parametrize(("table", "clean"), [("0x40", True), ("0x80", False)])
def test_a_branch_on_the_negation_of_a_guard(table: str, clean: bool) -> None:
    """Written where UP0 holds; the branch is taken where P1, its negation, does not: never with the old value."""
    findings = found(
        DATA, "PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0", "@P1 MOV R0, 0x10",
        f"PLOP3.LUT P1, PT, PT, PT, UP0, {table}, 0x0", "@!P1 BRA `(.L_x_0)", "MOV R0, 0x20", ".L_x_0:", "LDS R9, [R0]",
    )  # fmt: skip
    assert (not findings) == clean


def test_threads_that_met_go_on_where_their_own_bssy_says() -> None:
    """B0 serves twice: the second meeting does not lead behind the first, where R2 is still an address."""
    lines = [
        "BSSY B0, `(.L_x_0)", "BSYNC B0", ".L_x_0:", "LDS R9, [R2]",
        "MOV R2, R9", "BSSY B0, `(.L_x_1)", "BSYNC B0", ".L_x_1:", "MOV R2, RZ",
    ]  # fmt: skip
    assert not found(*lines)
    assert found(*lines[:-1], "LDS R9, [R2]")


def test_arithmetic_under_a_tainted_guard_is_counted() -> None:
    seen = analyse(DATA, "FSETP.GEU.AND P0, PT, R0, -126, PT", "@!P0 FMUL R0, R0, 0.5", "MUFU.EX2 R0, R0")
    assert (seen.guarded, seen.findings) == (1, ())


@pytest.mark.parametrize(
    "line",
    [
        "FROBNICATE R0, R1", "HMMA.16816.F16 R0, R8, R12, R0", "HGMMA.64x64x16.F16 R24, gdesc[UR8], RZ, !UPT",
        "F2F.F64.F32 R0, R2", "LDG.E R0, P0, [R2.64]", "MOV P0, R2",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(sass.UnknownInstructionError):
        analyse(line)


def test_what_is_no_single_kernel_is_refused() -> None:
    for text in ("", ".text.a:\n.text.b:\n        /*0000*/ EXIT ;\n"):
        with pytest.raises(ValueError):
            sass.parse(text)
    with pytest.raises(ValueError, match="no such label"):
        analyse("BRA `(.L_x_7)")
