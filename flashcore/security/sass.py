"""Machine code as instructions: what each reads and writes, and what may run after it.

The text comes from the nvdisasm that Triton ships; registers are decoded here from that text. nvdisasm can print
registers itself (`-plr`), but refuses where it is of another CUDA release than the ptxas that wrote the file ("flow
analysis is disabled"): Triton 3.7.1 and 3.9.0 pair nvdisasm 13.1 with ptxas 12.8 and 12.9 on sm_80.

Trusted: nvdisasm's text, and the operand shapes below. An instruction that is not listed raises, so that a new
compiler's code is never waved through. Listed shapes are those of sm_80, sm_89 and sm_90. Not in the text: on sm_80
and sm_89 the descriptor of global memory, a pair of uniform registers (see taint.py on those).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from pathlib import Path

# A set of registers is an integer, one bit a register: R0.., P0.., UR0.., UP0.., B0.. (convergence barriers), and
# where a compiler keeps what it has no register for: L0.., words of the thread's own stack, and K0.., the single bits
# of registers in which predicates are packed, 32 for each such register.
_COUNTS = {"R": 256, "P": 16, "UR": 128, "UP": 16, "B": 16, "L": 512, "K": 256}
_FIRST = {"R": 0, "P": 256, "UR": 272, "UP": 400, "B": 416, "L": 432, "K": 944}
BITS = 1200
_STACK_POINTER = 1 << 1
_REGISTER = re.compile(r"\b(UR|UP|R|P|B)(\d+)\b")
PREDICATES = (0xFFFF << _FIRST["P"]) | (0xFFFF << _FIRST["UP"])
BARRIER_REGISTERS = 0xFFFF << _FIRST["B"]
STACK_WORDS = ((1 << _COUNTS["L"]) - 1) << _FIRST["L"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every known mnemonic up to its first dot. What moves no data through memory and steers nothing:
ARITHMETIC = _words("""
    BMOV BMSK BREV CS2R ELECT F2F F2FP F2I FADD FCHK FFMA FLO FMNMX FMUL FSEL FSET FSETP HADD2 HFMA2 HMNMX2 HMUL2 HSET2
    HSETP2 I2F I2FP I2I I2IP IABS IADD3 IDP IMAD IMNMX ISETP LEA LOP3 MOV MUFU NOP P2R PLOP3 POPC PRMT PSETP
    R2P R2UR REDUX S2R S2UR SEL SGXT SHF SHFL UFLO UIADD3 UIMAD UISETP ULEA ULOP3 UMOV UP2UR UPLOP3 UPOPC UPRMT
    UPSETP USEL USGXT USHF VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE VOTEU
    """)
LOADS = _words("ATOM ATOMG ATOMS LD LDG LDS LDSM")  # results are data
STACK = _words("LDL STL")  # of words whose place the text states, or else refused: as registers
CONSTANTS = _words("LDC ULDC")  # kernel parameters
STORES = _words("LDGSTS RED ST STG STS STSM UTMALDG UTMASTG")
GLOBAL = _words("ATOM ATOMG LD LDG LDGSTS RED ST STG")  # by the descriptor of global memory
PRODUCTS = _words("HGMMA HMMA")
BARRIERS = _words("""
    ACQBULK BAR CCTL DEPBAR ERRBAR FENCE LDGDEPBAR MEMBAR NANOSLEEP PREEXIT SYNCS USETMAXREG UTMACMDFLUSH WARPGROUP
    """)
BRANCHES = _words("BRA BREAK BRX BSSY BSYNC CALL EXIT JMP JMX KILL RET WARPSYNC YIELD")
INDIRECT = _words("BRX JMX RET")
_LEAVING = INDIRECT | _words("BRA EXIT JMP KILL")
_KNOWN = ARITHMETIC | LOADS | STACK | CONSTANTS | STORES | PRODUCTS | BARRIERS | BRANCHES

_PLAIN_PREDICATE = re.compile(r"U?P[T\d]\d*$")
_SET_PREDICATES = _words("FSETP HSETP2 ISETP PLOP3 PSETP UISETP UPLOP3 UPSETP")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
# A bit set, bits cleared (or all but some kept), and bits tested, of one register.
_SET = re.compile(r"LOP3\.LUT (R\d+), \1(?:\.reuse)?, 0x([0-9a-f]+), RZ, 0xfc, !PT$")
_KEEP = re.compile(r"LOP3\.LUT (R\d+), \1(?:\.reuse)?, 0x([0-9a-f]+), RZ, 0xc0, !PT$")
_TEST = re.compile(r"LOP3\.LUT P\d+, RZ, (R\d+)(?:\.reuse)?, 0x([0-9a-f]+), RZ, 0xc0, !PT$")
_SLOT = re.compile(r"\[R1(?:\+0x([0-9a-f]+))?\]$")
_LABEL = re.compile(r"^(\.L_\w+):")
_TABLE = re.compile(r"\(\*\"BRANCH_TARGETS ([^\"]*)\"\*\)")  # of an indirect branch, as nvdisasm found it
_TEXT = re.compile(r"^\s+(?:@(!?U?P[T\d]\d*)\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*)$")


class UnknownInstructionError(ValueError):
    """The code has an instruction whose registers are not known here: nothing can be said about it."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; registers as bits, see `names`."""

    offset: int  # bytes from the kernel's start
    text: str
    opcode: str  # up to the first dot
    defs: int  # registers written
    kills: int  # those written whatever the guard says
    uses: int  # registers read, the guard included
    addresses: int  # of these, what addresses memory
    guard: int  # of these, the predicate in front
    negated: bool  # it runs where the guard is false
    ends: bool  # nothing behind it runs unless something branches there
    label: str  # where it may branch to, "" for nowhere
    table: tuple[str, ...] = ()  # where an indirect branch leads, () where that is not known


@dataclass(frozen=True, slots=True)
class Code:
    """A kernel's instructions and, for each, the indices of those that may run next."""

    instructions: tuple[Instruction, ...]
    successors: tuple[tuple[int, ...], ...]


def forward(code: Code, start: int, after: Callable[[int, int, int], int]) -> list[int | None]:
    """What may hold in front of each instruction, as bits, `start` in front of the first; None where nothing leads.

    Args:
        after: (what holds in front of instruction i, i, the one that runs next) -> what holds there.
    """
    before: list[int | None] = [None] * len(code.instructions)
    before[0] = start
    todo, waiting = [0], {0}
    while todo:
        i = heappop(todo)
        waiting.discard(i)
        for following in code.successors[i]:
            there = after(before[i] or 0, i, following)
            known = before[following]
            if known is None or there & ~known:
                before[following] = (known or 0) | there
                if following not in waiting:
                    waiting.add(following)
                    heappush(todo, following)
    return before


def names(registers: int) -> list[str]:
    """The registers in a set, by name."""
    return [f"{kind}{i}" for kind, n in _COUNTS.items() for i in range(n) if registers >> (_FIRST[kind] + i) & 1]


def tool(name: str) -> Path:
    """A program of CUDA's that Triton ships: nvdisasm, ptxas."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: bytes) -> str:
    """The text of a cubin, as `nvdisasm -c` prints it.

    Raises:
        subprocess.CalledProcessError: nvdisasm cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([tool("nvdisasm"), "-c", file], check=True, capture_output=True, text=True).stdout


def parse(text: str) -> Code:
    """Instructions and control flow of one kernel's text.

    Raises:
        UnknownInstructionError: an instruction or an operand that is not known here.
        ValueError: no kernel, more than one, a branch to a label that is not there, or a stack that moves.
    """
    if len(re.findall(r"^\.text\.\S+:", text, re.MULTILINE)) > 1:
        raise ValueError("more than one function in the machine code")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(decode(found[2], int(found[1], 16)))
    if not instructions:
        raise ValueError("no instructions in the disassembly")
    if stack := [i for i, each in enumerate(instructions) if each.opcode in STACK]:
        entered = min([stack[0], *labels.values()])  # what is in front runs once, before the stack is used
        for each in instructions[entered:]:
            if each.defs & _STACK_POINTER:
                raise ValueError(f"{each.offset:#06x}: {each.text}: the stack moves while it is in use")
    successors = tuple(tuple(sorted(s)) for s in _successors(instructions, labels))
    return Code(tuple(_bitwise(instructions)), successors)


def decode(text: str, offset: int = 0) -> Instruction:
    """One instruction from its text, such as "@!P0 IADD3.X R4, P1, R5.reuse, R6, RZ, P2, !PT".

    Raises:
        UnknownInstructionError: it is not known here.
    """
    match = _TEXT.match(" " + text.strip())
    if match is None or match[2] not in _KNOWN:
        raise UnknownInstructionError(f"{offset:#06x}: {text}")
    opcode, modifiers = match[2], match[3].split(".")[1:]
    table = _TABLE.search(match[4])
    plain = _TABLE.sub("", re.sub(r"`\(.*?\)", "", match[4]))
    operands = [part.strip() for part in plain.split(",") if part.strip()]
    target = re.search(r"`\((\.L_\w+)\)", match[4])
    guard = _registers(match[1] or "")
    written = _written(opcode, operands)
    defs = uses = addresses = 0
    for i, operand in enumerate(operands):
        width = _width(opcode, modifiers, operands, i)
        registers = _registers(operand, width)
        if operand.startswith("gdesc[") and i == 2:  # the first matrix is in registers, and its descriptor in none
            registers &= ~_registers(operand, 2)
        if operand in ("PR", "UPR"):  # those of the mask at the end
            registers = (int(operands[-1], 16) & 0x7F) << _FIRST["UP" if operand == "UPR" else "P"]
        if i < written:
            defs |= registers
        else:
            uses |= registers
        if "[" in operand:
            addresses |= registers
    if opcode in STACK:
        words = _stack_words(offset, text, modifiers, operands[opcode == "LDL"])
        defs, uses = (defs, uses | words) if opcode == "LDL" else (words, uses)
    conditional = match[1] or any(_PLAIN_PREDICATE.match(o.lstrip("!")) for o in operands)
    return Instruction(
        offset, text.strip(), opcode, defs, 0 if match[1] else defs, uses | guard, addresses, guard,
        negated=(match[1] or "").startswith("!"), ends=opcode in _LEAVING and not conditional,
        label=target[1] if target else "", table=tuple(table[1].split(",")) if table else (),
    )  # fmt: skip


def _bitwise(instructions: list[Instruction]) -> list[Instruction]:
    """The same with the registers that hold packed predicates taken apart into bits.

    Where there are more predicates than registers for them, one of data shares a register with one of a bound.
    """
    packed = dict.fromkeys(found[1] for each in instructions if each.guard and (found := _SET.search(each.text)))
    first = {name: _FIRST["K"] + 32 * n for n, name in enumerate([*packed][: _COUNTS["K"] // 32])}
    return [_in_bits(each, first) for each in instructions] if first else instructions


def _in_bits(each: Instruction, first: dict[str, int]) -> Instruction:
    """`each` with a register's 32 bits, which begin at `first`, for the register, or fewer where it says which."""

    def bits(registers: int) -> int:
        for name, place in first.items():
            if registers & (whole := _registers(name)):
                registers = registers & ~whole | 0xFFFFFFFF << place
        return registers

    for form in (_SET, _KEEP, _TEST):
        found = form.search(each.text)
        if found and found[1] in first:
            named = int(found[2], 16)
            chosen = (~named & 0xFFFFFFFF if form is _KEEP else named) << first[found[1]]
            if form is _TEST:
                return replace(each, uses=each.uses & ~_registers(found[1]) | chosen)
            kills = 0 if each.guard else chosen
            return replace(each, defs=chosen, kills=kills, uses=each.guard)
    return replace(
        each, defs=bits(each.defs), kills=bits(each.kills), uses=bits(each.uses), addresses=bits(each.addresses)
    )  # fmt: skip


def _stack_words(offset: int, text: str, modifiers: list[str], operand: str) -> int:
    """The words that `operand` of LDL or STL stands for."""
    place = _SLOT.match(operand)
    size = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    first, rest = divmod(int(place[1] or "0", 16), 4) if place else (0, 1)
    if rest or {*modifiers} - {"64", "128", "LU"} or first + size > _COUNTS["L"]:
        raise UnknownInstructionError(f"{offset:#06x}: {text}")
    return ((1 << size) - 1) << (_FIRST["L"] + first)


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> list[set[int]]:
    """For each instruction those that may run next, as far as the first one leads.

    BSSY names the place where the threads that meet at BSYNC go on; registers are few, so which BSSY a BSYNC belongs
    to is itself a question of what runs before it.
    """
    for each in instructions:
        if not {each.label, *each.table} - {""} <= labels.keys():
            raise ValueError(f"{each.text}: no such label")
    behind_calls = {i + 1 for i, each in enumerate(instructions) if each.opcode == "CALL"}
    anywhere = {*labels.values(), *behind_calls} - {len(instructions)}
    opened = [i for i, each in enumerate(instructions) if each.opcode == "BSSY"]
    following: list[set[int]] = [set() for _ in instructions]
    open_before: list[set[int]] = [set() for _ in instructions]  # BSSYs whose place may be in their register
    todo, seen = [0], {0}
    while todo:
        i = todo.pop()
        each, still_open = instructions[i], open_before[i]
        go_on = set() if each.ends or i + 1 == len(instructions) else {i + 1}
        if each.opcode == "BSSY":
            still_open = {j for j in still_open if instructions[j].defs != each.defs} | {i}
        elif each.opcode == "BMOV":  # a saved place comes back
            still_open = {*still_open, *opened} if each.defs & BARRIER_REGISTERS else still_open
        elif each.opcode == "BSYNC":
            go_on |= {labels[instructions[j].label] for j in still_open if instructions[j].defs & each.uses}
        elif each.opcode in INDIRECT:
            go_on |= {labels[label] for label in each.table} or anywhere
        elif each.label:
            go_on.add(labels[each.label])
        elif each.opcode in ("BRA", "JMP", "CALL"):
            raise UnknownInstructionError(f"{each.offset:#06x}: {each.text}")
        following[i] = go_on
        for j in go_on:
            if j not in seen or still_open - open_before[j]:
                seen.add(j)
                open_before[j] |= still_open
                todo.append(j)
    return following


def _written(opcode: str, operands: list[str]) -> int:
    """How many of the operands, from the first on, are results."""
    if opcode == "USETMAXREG":  # asking for more says whether they are there
        return len(operands) - 1
    if opcode in STORES or opcode in BRANCHES - {"BSSY"} or opcode in BARRIERS - {"SYNCS"} or opcode in ("STL", "NOP"):
        return 0
    if opcode in _SET_PREDICATES or opcode in ("SHFL", "ELECT"):
        return 2
    if opcode in ("LOP3", "ULOP3") and _PLAIN_PREDICATE.match(operands[0]):
        return 2
    if opcode in ("VOTE", "VOTEU"):
        return len(operands) - 1
    if _PLAIN_PREDICATE.match(operands[0]) and opcode != "SYNCS":
        raise UnknownInstructionError(f"{opcode} {', '.join(operands)}")
    written = 1
    while written < len(operands) - 1 and _PLAIN_PREDICATE.match(operands[written]):  # carries of IADD3, IMAD, LEA
        written += 1
    if written > 1 and opcode in LOADS | PRODUCTS | CONSTANTS | STACK:
        raise UnknownInstructionError(f"{opcode} {', '.join(operands)}")
    return written


def _width(opcode: str, modifiers: list[str], operands: list[str], i: int) -> int:
    """Consecutive registers that operand `i` stands for, the first of them named."""
    operand = operands[i]
    if opcode in ("UTMALDG", "UTMASTG"):
        if i > 0:
            return 2  # the descriptor's address
        rank = re.match(r"(\d)D$", modifiers[0])
        if rank is None:
            raise UnknownInstructionError(f"{opcode}.{'.'.join(modifiers)}")
        return (2 if opcode == "UTMALDG" else 1) + int(rank[1])  # address, a load's barrier, coordinates
    if operand.startswith("gdesc["):
        return 4  # of both matrices
    if operand.startswith("desc[") or ".64" in operand:
        return 2
    if "[" in operand or _PLAIN_PREDICATE.match(operand.lstrip("!")):
        return 1
    if opcode == "HGMMA":
        columns = re.match(r"64x(\d+)x16$", modifiers[0])
        if columns is None or "F32" not in modifiers[1:]:
            raise UnknownInstructionError(f"HGMMA.{'.'.join(modifiers)}")
        return 4 if i == 1 else int(columns[1]) // 2
    if opcode == "HMMA":
        widths = {"16816": (4, 4, 2, 4), "1688": (4, 2, 1, 4)}.get(modifiers[0])
        if widths is None or "F32" not in modifiers[1:]:
            raise UnknownInstructionError(f"HMMA.{'.'.join(modifiers)}")
        return widths[i]
    if opcode in ("LDSM", "STSM"):
        return {"4": 4, "2": 2}.get(modifiers[-1], 1)
    if opcode in LOADS | CONSTANTS | STORES | STACK:
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if opcode == "CS2R":
        return 1 if "32" in modifiers else 2
    if any(m.endswith("F64") for m in modifiers) or (opcode in ("I2F", "F2I") and {"S64", "U64"} & {*modifiers}):
        raise UnknownInstructionError(f"{opcode}.{'.'.join(modifiers)}")
    if opcode in ("IMAD", "UIMAD") and ("WIDE" in modifiers or "HI" in modifiers):
        whole = [n for n, o in enumerate(operands) if not _PLAIN_PREDICATE.match(o.lstrip("!"))]
        return 2 if i == whole[3] or (i == 0 and "WIDE" in modifiers) else 1
    return 2 if "64" in modifiers else 1


def _registers(operand: str, width: int = 1) -> int:
    found = 0
    for kind, number in _REGISTER.findall(operand):
        found |= ((1 << (1 if kind in ("P", "UP") else width)) - 1) << (_FIRST[kind] + int(number))
    return found
