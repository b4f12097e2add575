"""Which branches and addresses of a kernel depend on data: a fixpoint over its control flow.

A register is tainted where data may have flowed into it. Data comes from memory (every load from global or shared
memory) and from the tensor cores, and flows from an instruction's operands, its guard included, to its results.
Public are the kernel's parameters (constant memory: pointers, strides, lengths, the scale), the indices of thread and
block, immediates, the state of mbarriers, and what is loaded through a pointer to lengths (provenance.py).

What may not be tainted, one finding for each instruction:

- "branch": whatever decides where to go on, or which threads go on together;
- "address": of memory, constants, descriptors and matrices;
- "predicate": of an instruction that reads or writes memory or multiplies matrices;
- "barrier": operands and guards of barriers, fences, mbarriers;
- "uniform": the registers of the descriptor of global memory, which every access of it names on sm_80 and sm_89
  though the text does not show which they are: of those that it was ever loaded into, some must be without data.

Not a finding, and counted instead: arithmetic under a tainted guard, such as an exponential's two steps for very small
arguments. It is issued either way and touches no memory. Whether the time it takes tells its guard is a question for
measurement.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from flashcore.security import sass
from flashcore.security.sass import Code, Instruction

_BITS = sass.BITS
_ALL = (1 << _BITS) - 1
_DESCRIPTOR = re.compile(r"c\[0x0\]\[0x118\]")  # of global memory, on sm_80 and sm_89


@dataclass(frozen=True, slots=True)
class Finding:
    """An instruction that lets data decide what only public values may decide."""

    kind: str  # "branch", "address", "predicate", "barrier", "uniform"
    offset: int  # bytes from the kernel's start
    text: str
    registers: tuple[str, ...]  # the tainted ones that decide
    path: tuple[str, ...]  # one way for the data to get there, from its source to this instruction


@dataclass(frozen=True, slots=True)
class Taint:
    """What the analysis found in one kernel."""

    instructions: int  # reachable ones
    branches: int  # of these, instructions that steer
    memory: int  # of these, loads, stores, and matrix products with operands in shared memory
    products: int  # of these, tensor-core instructions; all accumulate in fp32, or decoding would have refused
    guarded: int  # of these, arithmetic under a tainted guard
    findings: tuple[Finding, ...]
    public_loads: int = 0  # loads of lengths, whose results are public

    def count(self, *kinds: str) -> int:
        """How many findings are of these kinds; of any where none is named."""
        return sum(not kinds or finding.kind in kinds for finding in self.findings)


def analyse(code: Code, public: frozenset[int] = frozenset(), *, paths: bool = True) -> Taint:
    """Follow data through a kernel; `public` are the instructions that load nothing secret, by index.

    Without `paths` no finding says how the data got there, which takes longer to find out than all the rest.
    """
    sources = frozenset(
        i for i, each in enumerate(code.instructions)
        if i not in public and (each.opcode in sass.LOADS or each.opcode in sass.PRODUCTS)
    )  # fmt: skip
    before = reached_by(code, sources)
    descriptors = {each.defs for each in code.instructions if _DESCRIPTOR.search(each.text)}
    findings = []
    branches = memory = products = guarded = reached = 0
    for i, each in enumerate(code.instructions):
        tainted = before[i]
        if tainted is None:
            continue
        reached += 1
        branches += each.opcode in sass.BRANCHES
        memory += each.addresses != 0
        products += each.opcode in sass.PRODUCTS
        guarded += each.opcode in sass.ARITHMETIC and each.guard & tainted != 0
        for kind, deciding in _sinks(each, descriptors if all(d & tainted for d in descriptors) else set()):
            if decisive := deciding & tainted:
                path = _path(code, before, sources, i, decisive) if paths else ()
                findings.append(Finding(kind, each.offset, each.text, tuple(sass.names(decisive)), path))
                break
    return Taint(reached, branches, memory, products, guarded, tuple(findings), len(public))


def reached_by(code: Code, sources: frozenset[int], fresh: frozenset[int] = frozenset()) -> list[int | None]:
    """For each instruction the registers that, where it runs, may hold what comes from the results of `sources`.

    None for an instruction that nothing leads to. `fresh` are those whose results come from nothing that they read.
    """
    worlds = _Worlds(code, sources, fresh)
    before = sass.forward(code, 0, lambda state, i, following: worlds.along(worlds.after(state, i), i, following))
    return [None if s is None else worlds.running(s, i) for i, s in enumerate(before)]


class _Worlds:
    """Tainted registers, once whatever the guards are, and once for each guard's being true and being false.

    A register that `@P0 IADD3` writes keeps its old value where P0 is false, so it stays tainted if it was; but a
    following `@P0 LDS` reads it only where P0 is true, and there it is public. Compilers guard whole sequences and
    branch around others, and without the worlds each of them would be a false alarm. A world ends where its predicate
    is written.

    A state is one integer: world w's registers from bit w * _BITS on, world 0 for no assumption. What may be tainted
    where two assumptions hold is tainted in both worlds, so their intersection bounds it.
    """

    def __init__(self, code: Code, sources: frozenset[int], fresh: frozenset[int]) -> None:
        self._code = code
        self._sources = sources
        self._fresh = fresh
        self._guards = _guards(code)
        self._predicates = sorted({predicate for predicate, _ in self._guards if predicate})
        literals = [(predicate, negated) for predicate in self._predicates for negated in (False, True)]
        self._index = {literal: w for w, literal in enumerate(literals, 1)}
        self._index[0, False] = self._index[0, True] = 0
        self._count = 1 + len(literals)
        self._every = sum(1 << w * _BITS for w in range(self._count))

    def running(self, state: int, i: int) -> int:
        """Registers that may be tainted where instruction `i` runs: where its guard holds."""
        return state >> self._index[self._guards[i]] * _BITS & _ALL

    def after(self, state: int, i: int) -> int:
        """The state behind instruction `i`."""
        each = self._code.instructions[i]
        if not each.defs:
            return state
        predicate, negated = self._guards[i]
        inputs = each.uses & self.running(state, i)
        tainting = 0
        if i in self._sources:
            tainting = self._every
        elif inputs and i not in self._fresh:
            tainting = sum(1 << w * _BITS for w in range(self._count) if inputs & state >> w * _BITS)
        if predicate:
            if not each.guard & state:  # where it is skipped the old value stays, and being skipped tells nothing
                tainting &= ~(1 << self._index[predicate, not negated] * _BITS)
            state &= ~(each.defs << self._index[predicate, negated] * _BITS)
        else:
            state &= ~(each.defs * self._every)
        state |= each.defs * tainting
        for written in self._predicates:
            if written & each.defs:
                for truth in (False, True):
                    at = self._index[written, truth] * _BITS
                    state = state & ~(_ALL << at) | (state & _ALL) << at
        return state

    def along(self, state: int, i: int, following: int) -> int:
        """The state behind branch `i` where it leads to `following`: its guard held, or did not."""
        each = self._code.instructions[i]
        predicate, negated = self._guards[i]
        ways = self._code.successors[i]
        if each.opcode not in ("BRA", "CALL") or not predicate or each.uses != each.guard or len(ways) != 2:
            return state
        false = negated if following != i + 1 else not negated
        state &= (state >> self._index[predicate, false] * _BITS & _ALL) * self._every
        return state & ~(_ALL << self._index[predicate, not false] * _BITS)


def _guards(code: Code) -> list[tuple[int, bool]]:
    """Each instruction's guard as (predicate, whether it runs where that is false); (0, False) for none.

    A guard that is a copy or the negation of another predicate counts as that one: `PLOP3.LUT P1, PT, PT, PT, UP0,
    0x80, 0x0` gives P1 the value of UP0, with 0x40 its negation.
    """
    Copies = dict[int, tuple[int, bool]]
    before: list[Copies | None] = [None] * len(code.instructions)
    before[0] = {}
    todo = [0]
    while todo:
        i = todo.pop()
        each = code.instructions[i]
        copies = {p: of for p, of in (before[i] or {}).items() if not (p | of[0]) & each.defs}
        if (copy := _copied(each)) and not copy[0] & each.defs:
            copies[each.defs] = (before[i] or {}).get(copy[0], copy) if not copy[1] else copy
        for j in code.successors[i]:
            known = before[j]
            merged = copies if known is None else dict(known.items() & copies.items())
            if merged != known:
                before[j] = merged
                todo.append(j)
    guards = []
    for each, known in zip(code.instructions, before, strict=True):
        predicate, negated = (known or {}).get(each.guard, (each.guard, False))
        guards.append((predicate, negated != each.negated))
    return guards


def _copied(each: Instruction) -> tuple[int, bool] | None:
    """What an unguarded PLOP3 copies, as (predicate, whether negated); None where it computes more, or two results."""
    found = re.match(r"U?PLOP3\.LUT U?P\d, U?PT, (\w+), (\w+), (\w+), (0x\w+), ", each.text)
    if found is None or each.uses.bit_count() != 1 or each.guard:
        return None
    place = next(n for n, operand in enumerate(found.groups()[:3]) if not operand.endswith("PT"))
    table = int(found[4], 16)
    if_true, if_false = table >> 7 & 1, table >> (7 - (4 >> place)) & 1
    return None if if_true == if_false else (each.uses, not if_true)


def _sinks(each: Instruction, descriptors: set[int]) -> list[tuple[str, int]]:
    """(kind, registers that must be public) of an instruction, the most telling first."""
    if each.opcode in sass.BRANCHES:
        return [("branch", each.uses)]
    if each.opcode in sass.BARRIERS:
        return [("barrier", each.uses)]
    found = [("address", each.addresses)]
    if each.opcode in sass.LOADS | sass.STORES | sass.STACK | sass.CONSTANTS | sass.PRODUCTS:
        found.append(("predicate", each.uses & sass.PREDICATES))
    if each.opcode in sass.GLOBAL and "desc[" not in each.text:
        found.append(("uniform", sum(descriptors)))
    return found


def _path(
    code: Code, before: list[int | None], sources: frozenset[int], sink: int, registers: int
) -> tuple[str, ...]:
    """One way from a source to the instruction `sink`, found backwards and breadth first."""
    leading: list[list[int]] = [[] for _ in code.instructions]
    for i, following in enumerate(code.successors):
        if before[i] is not None:
            for j in following:
                leading[j].append(i)
    came: dict[tuple[int, int], tuple[int, int] | None] = {}
    todo: deque[tuple[int, int]] = deque()

    def visit(i: int, wanted: int, came_from: tuple[int, int] | None) -> None:
        while wanted:
            bit = wanted & -wanted
            wanted ^= bit
            if (i, bit) not in came:
                came[i, bit] = came_from
                todo.append((i, bit))

    visit(sink, registers, None)
    while todo:
        at = todo.popleft()
        i, bit = at
        for j in leading[i]:
            each = code.instructions[j]
            tainted = before[j] or 0
            if each.defs & bit and j in sources:
                steps = [j]
                step: tuple[int, int] | None = at
                while step is not None:
                    steps.append(step[0])
                    step = came[step]
                return tuple(_telling(code, steps))
            if each.defs & bit and each.uses & tainted:
                visit(j, each.uses & tainted, at)
            if tainted & bit and not each.kills & bit:
                visit(j, bit, at)
    return ()


def _telling(code: Code, steps: list[int]) -> list[str]:
    """Of the instructions on a path those that move the data on, as text."""
    told = [code.instructions[steps[0]]]
    for i in steps[1:-1]:
        each = code.instructions[i]
        if each.uses & told[-1].defs and each.defs:
            told.append(each)
    told.append(code.instructions[steps[-1]])
    return [f"{each.offset:#06x} {each.text}" for each in told]
