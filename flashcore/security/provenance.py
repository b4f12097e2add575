"""Which loads give public values: those through a pointer that the caller gave for lengths, and nothing else.

Lengths (seqused_k, cu_seqlens_q, cu_seqlens_k) are public, q, k, v and masks are not. A register's provenance is the
set of kernel parameters that its value may come from, followed from constant memory through every operand around
every loop, guards or not. A load is public where its address comes from pointers to lengths, from numbers and thread
indices, and from no other pointer, no constant of unknown meaning, no loaded value and no matrix product. So an
address mixed from public and secret pointers is secret, and a page table's entry makes a secret of what it points to.

Only loads from global memory into registers count: what passes shared memory is secret, whatever it was. A store that
may go through a pointer to lengths makes every load secret.

Assumed, not seen: that addresses stay within the tensor they point to (compute-sanitizer), and that nobody else writes
data into the lengths' memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from flashcore.launch.binding import Binding, Scalar
from flashcore.launch.compiled import Compiled
from flashcore.launch.packet import Template, runtime
from flashcore.security import sass
from flashcore.security.sass import Code, Instruction

PUBLIC_TENSORS = ("seqused_k", "cu_seqlens_q", "cu_seqlens_k")

_FIRST = {80: 0x160, 89: 0x160, 90: 0x210}  # where parameters begin in constant bank 0
_CONSTANT = re.compile(r"c\[([^\]]*)\]\[([^\]]*)\]")
# Below the parameters, in bank 0: the sizes of block and grid (32-bit numbers), and on sm_90 the descriptor of global
# memory that every access names.
_NUMBERS = range(0x00, 0x18)
_DESCRIPTOR = {90: range(0x208, 0x210)}


@dataclass(frozen=True, slots=True)
class Parameters:
    """What lies where in constant bank 0; everything that is in none of these ranges is taken for a secret pointer."""

    lengths: tuple[range, ...]  # pointers to public values
    numbers: tuple[range, ...]


def parameters(binding: Binding, compiled: Compiled) -> Parameters:
    """The layout of a kernel's parameters, as it is launched with them."""
    template = Template(binding, compiled)
    first = _FIRST[compiled.arch]
    tensors = [a.tensor for a in runtime(binding) if not isinstance(a, Scalar)]
    slots = [offset for offset, _ in template.slots]
    lengths = [range(first + at, first + at + 8) for name, at in zip(tensors, slots, strict=True)
               if name in PUBLIC_TENSORS]  # fmt: skip
    scratch = template.offsets[-2:]  # pointers too, though null
    numbers = [
        range(first + at, first + at + size)
        for at, size in zip(template.offsets, template.sizes, strict=True)
        if at not in slots and at not in scratch
    ]
    return Parameters(tuple(lengths), (*numbers, _NUMBERS, _DESCRIPTOR.get(compiled.arch, range(0))))


def public_loads(code: Code, where: Parameters) -> frozenset[int]:
    """The indices of the instructions that load nothing but lengths."""
    if not where.lengths:
        return frozenset()
    origins = [_constants(each, where) for each in code.instructions]
    before = _fixpoint(code, origins)
    found: list[int] = []
    for i, each in enumerate(code.instructions):
        state = before[i]
        if state is None or not each.addresses:
            continue
        from_lengths, from_others = (bool(each.addresses & registers) for registers in state)
        if each.opcode in sass.STORES or each.opcode.startswith("ATOM"):
            if from_lengths:
                return frozenset()
        elif each.opcode == "LDG" and from_lengths and not from_others and not any(origins[i]):
            found.append(i)
    return frozenset(found)


State = tuple[int, int]  # registers that may come from a pointer to lengths, and from anything else that is no number


def _fixpoint(code: Code, origins: list[tuple[bool, bool]]) -> list[State | None]:
    before: list[State | None] = [None] * len(code.instructions)
    before[0] = (0, 0)
    todo, waiting = [0], {0}
    while todo:
        i = heappop(todo)
        waiting.discard(i)
        after = _after(code.instructions[i], before[i] or (0, 0), origins[i])
        for j in code.successors[i]:
            known = before[j]
            merged = after if known is None else (known[0] | after[0], known[1] | after[1])
            if merged != known:
                before[j] = merged
                if j not in waiting:
                    waiting.add(j)
                    heappush(todo, j)
    return before


def _after(each: Instruction, state: State, origin: tuple[bool, bool]) -> State:
    if not each.defs:
        return state
    loaded = each.opcode in sass.LOADS or each.opcode in sass.PRODUCTS
    lengths, others = (
        registers & ~each.kills | (each.defs if own or each.uses & registers else 0)
        for registers, own in zip(state, (origin[0], origin[1] or loaded), strict=True)
    )
    return lengths, others


def _constants(each: Instruction, where: Parameters) -> tuple[bool, bool]:
    """Whether an instruction reads from constant memory (a pointer to lengths, anything else that is no number)."""
    lengths = others = False
    for bank, offset in _CONSTANT.findall(each.text):
        read = _read(each, offset) if bank == "0x0" else None
        if read is None:
            others = True  # another bank, or an index that is not known here
        else:
            lengths |= _any_in(read, where.lengths)
            others |= not all(_any_in([byte], (*where.lengths, *where.numbers)) for byte in read)
    return lengths, others


def _read(each: Instruction, offset: str) -> range | None:
    """The bytes that a constant operand stands for; None where a register has a say."""
    if not re.fullmatch(r"0x[0-9a-f]+", offset):
        return None
    modifiers = re.split(r"\s", each.text.split(each.opcode, 1)[1], maxsplit=1)[0].split(".")
    size = 16 if "128" in modifiers else 8 if {"64", "WIDE"} & {*modifiers} else 4
    return range(int(offset, 16), int(offset, 16) + size)


def _any_in(numbers: Iterable[int], ranges: Iterable[range]) -> bool:
    held = tuple(ranges)
    return any(n in r for n in numbers for r in held)
