"""Which loads count as public, on instructions made by hand and on the headers of real kernels."""

from __future__ import annotations

import re

import pytest

from flashcore.launch import compiled
from flashcore.launch.packet import Template
from flashcore.security import audit, provenance, sass, taint
from flashcore.security.provenance import Parameters
from flashcore.security.variants import Variant, variants
from tests.security.by_hand import code

# seqused_k at 0x188, a number at 0x190; q at 0x160 is in no range, as everything that is not known
WHERE = Parameters((range(0x188, 0x190),), (range(0x190, 0x194), range(0x00, 0x18), range(0x208, 0x210)))
LENGTHS = ["MOV R2, c[0x0][0x188]", "MOV R3, c[0x0][0x18c]"]
LOAD = "LDG.E R0, [R2.64]"


def public(*lines: str) -> list[str]:
    kernel = code(*lines)
    return [kernel.instructions[i].text for i in sorted(provenance.public_loads(kernel, WHERE))]


@pytest.mark.parametrize(
    "lines",
    [
        [*LENGTHS, LOAD],
        ["LDC.64 R2, c[0x0][0x188]", "LDG.E R0, desc[UR6][R2.64+0x4]"],
        ["ULDC.64 UR6, c[0x0][0x208]", "LDC.64 R2, c[0x0][0x188]", "LDG.E R0, desc[UR6][R2.64]"],
        ["ULDC.64 UR4, c[0x0][0x188]", "IMAD.U32 R2, RZ, RZ, UR4", "IMAD.U32 R3, RZ, RZ, UR5", LOAD],
        ["S2R R7, SR_CTAID.Z", "IMAD.WIDE.U32 R2, R7, 0x4, c[0x0][0x188]", LOAD],
        ["S2R R7, SR_CTAID.Z", "IMAD R7, R7, c[0x0][0x190], RZ", "IMAD.WIDE R2, R7, 0x4, c[0x0][0x188]", LOAD],
        [*LENGTHS, "MOV R9, c[0x0][0xc]", "LEA R2, P0, R9, R2, 0x2", "LEA.HI.X R3, R9, R3, RZ, 0x2, P0", LOAD],
        ["MOV R2, c[0x0][0x160]", "MOV R3, c[0x0][0x164]", *LENGTHS, LOAD],
        ["@P0 MOV R2, c[0x0][0x160]", "@!P0 MOV R2, c[0x0][0x188]", "MOV R3, c[0x0][0x18c]", "@!P0 LDG.E R0, [R2.64]"],
        [*LENGTHS, "STL.64 [R1], R2", "LDL.64 R4, [R1]", "LDG.E R0, [R4.64]"],
    ],
)
def test_a_load_of_lengths_is_public(lines: list[str]) -> None:
    assert public(*lines) == lines[-1:]


@pytest.mark.parametrize(
    "lines",
    [
        ["MOV R2, c[0x0][0x160]", "MOV R3, c[0x0][0x164]", LOAD],  # q
        ["MOV R2, c[0x0][0x190]", "MOV R3, RZ", LOAD],  # a number is no pointer
        ["MOV R2, c[0x0][0x1000]", LOAD],
        [*LENGTHS, "IADD3 R2, R2, c[0x0][0x160], RZ", LOAD],  # both pointers
        [*LENGTHS, "@P0 MOV R2, c[0x0][0x160]", LOAD],
        [*LENGTHS, "@P0 BRA `(.L_x_0)", "MOV R2, c[0x0][0x160]", ".L_x_0:", LOAD],
        ["MOV R3, c[0x0][0x18c]", "MOV R2, c[0x0][0x188]", ".L_x_0:", LOAD, "MOV R2, c[0x0][0x160]", "BRA `(.L_x_0)"],
        [*LENGTHS, LOAD.replace("R0", "R8"), "IADD3 R2, R2, R8, RZ", "STG.E [R2.64], R9"],  # written
        [*LENGTHS, "LDS R8, [R9]", "IADD3 R2, R2, R8, RZ", LOAD],  # an index that is data
        [*LENGTHS, "HMMA.16816.F32 R8, R12, R16, R8", "IADD3 R2, R2, R8, RZ", LOAD],
        [*LENGTHS, "LDS R0, [R2]"], [*LENGTHS, "LD.E R0, [R2.64]"],  # not of global memory, or not surely
        ["LDC.64 R2, c[0x0][R9+0x188]", LOAD], ["LDC.64 R2, c[0x3][0x188]", LOAD],  # of unknown meaning
        ["ULDC.64 UR4, cx[UR8][0x188]", "IMAD.U32 R2, RZ, RZ, UR4", LOAD],
        ["LDC.128 R0, c[0x0][0x180]", LOAD],  # reaches into what is no pointer to lengths
        [*LENGTHS, "STS.64 [R9], R2", LOAD],  # the pointer itself goes where it is not followed
        [*LENGTHS, "ATOMG.E.ADD R0, [R2.64], R9", LOAD], [*LENGTHS, "RED.E.ADD [R2.64], R9", LOAD],
    ],
)  # fmt: skip
def test_anything_else_is_not(lines: list[str]) -> None:
    assert public(*lines) == []


SEARCH = [*LENGTHS, ".L_x_0:", LOAD, "IMAD.WIDE R2, R0, 0x4, c[0x0][0x188]", "BRA `(.L_x_0)"]


def test_a_search_among_lengths_is_public_and_its_controls_are_not() -> None:
    assert public(*SEARCH) == [LOAD]
    assert public(*SEARCH[:-1], "LDS R8, [R9]", "IADD3 R2, R2, R8, RZ", SEARCH[-1]) == []
    assert public(*SEARCH[:-1], "@P0 MOV R2, c[0x0][0x160]", SEARCH[-1]) == []


def test_where_a_length_leads_to_elsewhere_is_secret() -> None:
    for elsewhere in ("IMAD.WIDE R4, R0, 0x4, c[0x0][0x160]", "IMAD.WIDE R4, R0, 0x4, RZ"):
        assert public(*LENGTHS, LOAD, elsewhere, "LDG.E R6, [R4.64]") == [LOAD]


def test_without_lengths_nothing_is_public() -> None:
    assert provenance.public_loads(code(*LENGTHS, LOAD), Parameters((), WHERE.numbers)) == frozenset()


def test_a_public_load_taints_nothing_and_its_guard_does() -> None:
    kernel = code(*LENGTHS, LOAD, "ISETP.GT.AND P0, PT, R0, RZ, PT", "@P0 EXIT")
    assert taint.analyse(kernel).count("branch") == 1
    assert taint.analyse(kernel, provenance.public_loads(kernel, WHERE)).findings == ()
    guarded = code(*LENGTHS, "LDS R9, [R8]", "ISETP.GT.AND P1, PT, R9, RZ, PT", f"@P1 {LOAD}",
                   "ISETP.GT.AND P0, PT, R0, RZ, PT", "@P0 EXIT")  # fmt: skip
    seen = taint.analyse(guarded, provenance.public_loads(guarded, WHERE))
    assert (seen.count("predicate"), seen.count("branch")) == (1, 1)


# Warps beside the first four read a byte each at the end of shared memory, and branch to what it says.
DUTIES = Parameters((), WHERE.numbers, duties=0x3019C)
DUTY = "LDS.U8 R0, [R0+UR4+0x3019c]"
BRANCH = 'BRX R2 -0x1b0 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)'
DISPATCH = ["S2R R0, SR_TID.X", "SHF.R.U32.HI R0, RZ, 0x5, R0", DUTY, "LDC R2, c[0x2][R0]", BRANCH]
PARTS = [".L_x_0:", "LDS R8, [R9]", "EXIT", ".L_x_1:", "EXIT"]


def duty(*lines: str) -> tuple[list[str], int]:
    """What counts as public, and how many branches depend on data."""
    kernel = code(*lines)
    found = provenance.public_loads(kernel, DUTIES)
    return [kernel.instructions[i].text for i in sorted(found)], taint.analyse(kernel, found).count("branch")


def test_what_a_warp_is_to_do_is_public() -> None:
    assert duty(*DISPATCH, *PARTS) == ([DUTY], 0)
    assert duty("MOV R3, 0x1", "STS.64 [UR7+0x301a0], R2", *DISPATCH, *PARTS) == ([DUTY], 0)


@pytest.mark.parametrize(
    "lines",
    [
        ["LDG.E R3, [R4.64]", "STS [UR7+0x301a0], R3", *DISPATCH, *PARTS],  # written from data
        ["HMMA.16816.F32 R4, R12, R16, R8", "STS [UR7+0x301a0], R4", *DISPATCH, *PARTS],
        ["LDS R0, [R9]", *DISPATCH[2:], *PARTS],  # read at a place that is data
        [line.replace("0x3019c", "0x3018c") for line in DISPATCH] + PARTS,  # elsewhere
        [line.replace("LDS.U8", "LDS.U16") for line in DISPATCH] + PARTS,
    ],
    ids=["stored", "product", "address", "elsewhere", "wider"],
)
def test_what_else_is_in_shared_memory_is_secret(lines: list[str]) -> None:
    assert duty(*lines) == ([], 1)
    kernel = code(*DISPATCH, *PARTS)
    assert provenance.public_loads(kernel, WHERE) == frozenset(), "a kernel without further warps"


def _most() -> list[Variant]:
    return [v for v in variants([80, 90], quick=True) if v.problem.ragged and not v.control]


@pytest.mark.parametrize("variant", _most(), ids=lambda v: v.name)
def test_the_parameters_of_real_kernels(variant: Variant) -> None:
    """The header's places, held against what the machine code reads: lengths by 64 bits, q nowhere among them."""
    binding = audit.bound(variant)
    machine_code = compiled.compile_for(binding, variant.target.arch)
    where = provenance.parameters(binding, machine_code)
    text = sass.disassemble(machine_code.cubin)
    read = {int(offset, 16) for offset in re.findall(r"\bc\[0x0\]\[0x([0-9a-f]+)\]", text)}
    assert len(where.lengths) == (2 if variant.problem.packed else 1)
    for place in where.lengths:
        assert len(place) == 8 and place.start in read
    covered = {n for r in (*where.lengths, *where.numbers) for n in r}
    first = provenance.header(machine_code.cubin)[0]
    assert not covered & {*first}, "q, or its descriptor"
    assert variant.config.kernel == "hopper" or first.start in read


def test_a_launch_that_passes_other_parameters_is_refused() -> None:
    variant = _most()[0]
    binding = audit.bound(variant)
    machine_code = compiled.compile_for(binding, variant.target.arch)
    template = Template(binding, machine_code)
    with pytest.raises(ValueError, match="its launch passes"):
        provenance._parameters(binding, template, variant.target.arch, provenance.header(machine_code.cubin)[1:])
