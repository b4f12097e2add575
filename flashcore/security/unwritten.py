"""Does machine code read a register that nothing has written? A fault of the compiler's, and a silent one.

ptxas 12.8 was seen to drop the copy of an address where k and v take one place in shared memory by turns, in tiles of
different widths: three of four products then read v wherever the uniform register of what ran before led. PTX is right
there, so that nothing but the machine code, or a run, shows it.

Registers are followed forward through every way that the code can take. One that may have been written on some way
counts as written: what is found is read before anything was written to it, whatever the data. Where two halves are
merged, ptxas reads the register of which a half is not set yet, also from the stack: PRMT into one of its own operands
and words of the stack are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashcore.security import sass
from flashcore.security.sass import Code, Instruction

_AT_ENTRY = 1 << 1  # R1, the stack pointer


@dataclass(frozen=True, slots=True)
class Read:
    """An instruction that reads registers which nothing wrote."""

    offset: int  # bytes from the kernel's start
    text: str
    registers: tuple[str, ...]


def reads(code: Code) -> tuple[Read, ...]:
    """Every such instruction of a kernel."""
    written = sass.forward(code, _AT_ENTRY, lambda before, i, _: before | code.instructions[i].defs)
    found = []
    for each, before in zip(code.instructions, written, strict=True):
        if before is not None and (missing := _used(each) & ~before):
            found.append(Read(each.offset, each.text, tuple(sass.names(missing))))
    return tuple(found)


def _used(each: Instruction) -> int:
    used = each.uses & ~sass.STACK_WORDS
    return used & ~each.defs if each.opcode == "PRMT" else used


def without_a_write(code: Code) -> Code | None:
    """The control: `code` without the one write in front of the first read of a register that it computed itself; None
    where there is no such in what runs before the first branch.
    """
    once, twice = 0, _AT_ENTRY
    for j, each in enumerate(code.instructions):
        if needed := _used(each) & once & ~twice:
            i = next(i for i, other in enumerate(code.instructions[:j]) if other.defs & needed)
            gone = replace(code.instructions[i], defs=0, kills=0)
            return replace(code, instructions=(*code.instructions[:i], gone, *code.instructions[i + 1 :]))
        twice |= once & each.defs
        once |= each.defs
        if code.successors[j] != (j + 1,):
            break
    return None
