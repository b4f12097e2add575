"""Which branches and addresses of a kernel depend on data: a fixpoint over its control flow.

A register is tainted where data may have flowed into it. Data comes from memory (every load from global, shared or
local memory) and from the tensor cores, and flows from an instruction's operands, its guard included, to its results.
Public are the kernel's parameters (constant memory: pointers, strides, lengths, the scale), the indices of thread and
block, immediates, and the state of mbarriers. Loads are not told apart, which is the safe side: a kernel that reads
lengths from memory needs them told apart by the pointer they come through.

What may not be tainted, one finding for each instruction:

- "branch": whatever decides where to go on, or which threads go on together;
- "address": of memory, constants, descriptors and matrices;
- "predicate": of an instruction that reads or writes memory or multiplies matrices;
- "barrier": operands and guards of barriers, fences, mbarriers;
- "uniform": a register that a warp shares. They hold addresses, descriptors and uniform branches' conditions, some of
  which the text does not show, and are written under the assumption that the warp is together.

Not a finding, and counted instead: arithmetic under a tainted guard, such as an exponential's two steps for very small
arguments. It is issued either way and touches no memory. Whether the time it takes tells its guard is a question for
measurement.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from flashcore.security import sass
from flashcore.security.sass import Code, Instruction

_UNIFORM = ((1 << 128) - 1 << 272) | (0xFFFF << 400)
_BITS = 448  # of a set of registers
_ALL = (1 << _BITS) - 1


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

    def count(self, *kinds: str) -> int:
        """How many findings are of these kinds; of any where none is named."""
        return sum(not kinds or finding.kind in kinds for finding in self.findings)


def analyse(code: Code) -> Taint:
    """Follow data through a kernel."""
    worlds = _Worlds(code)
    states = _fixpoint(code, worlds)
    before = [None if s is None else worlds.running(s, each) for s, each in zip(states, code.instructions, strict=True)]
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
        for kind, deciding in _sinks(each, tainted):
            if decisive := deciding & tainted:
                path = _path(code, before, i, decisive)
                findings.append(Finding(kind, each.offset, each.text, tuple(sass.names(decisive)), path))
                break
    return Taint(reached, branches, memory, products, guarded, tuple(findings))


def _is_source(each: Instruction) -> bool:
    return each.opcode in sass.LOADS or each.opcode in sass.PRODUCTS


class _Worlds:
    """Tainted registers, once whatever the guards are, and once for each guard's being true and being false.

    A register that `@P0 IADD3` writes keeps its old value where P0 is false, so it stays tainted if it was; but a
    following `@P0 LDS` reads it only where P0 is true, and there it is public. Compilers guard whole sequences, and
    without the worlds each of them would be a false alarm. A world ends where its predicate is written.

    A state is one integer: world w's registers from bit w * _BITS on, world 0 for no assumption. What may be tainted
    where two assumptions hold is tainted in both worlds, so their intersection bounds it.
    """

    def __init__(self, code: Code) -> None:
        self._guards = sorted({each.guard for each in code.instructions if each.guard})
        literals = [(guard, negated) for guard in self._guards for negated in (False, True)]
        self._index = {literal: w for w, literal in enumerate(literals, 1)}
        self._every = sum(1 << w * _BITS for w in range(1 + len(literals)))

    def running(self, state: int, each: Instruction) -> int:
        """Registers that may be tainted where the instruction runs: where its guard holds."""
        return state >> self._world(each, True) * _BITS & _ALL

    def after(self, state: int, each: Instruction) -> int:
        """The state behind an instruction."""
        defs = each.defs
        if not defs:
            return state
        runs = self._world(each, True)
        inputs = each.uses & (state >> runs * _BITS)
        tainting = 0
        if _is_source(each):
            tainting = self._every
        elif inputs:
            tainting = sum(1 << w * _BITS for w in range(self._every.bit_length() // _BITS + 1)
                           if inputs & state >> w * _BITS)  # fmt: skip
        if runs:  # elsewhere the old values stay; a tainted guard tells itself by which of them it is
            if not each.guard & state:
                tainting &= ~(1 << self._world(each, False) * _BITS)
            state &= ~(defs << runs * _BITS)
        else:
            state &= ~(defs * self._every)
        state |= defs * tainting
        for guard in self._guards:
            if guard & defs:
                for negated in (False, True):
                    at = self._index[guard, negated] * _BITS
                    state = state & ~(_ALL << at) | (state & _ALL) << at
        return state

    def _world(self, each: Instruction, runs: bool) -> int:
        return self._index[each.guard, each.negated == runs] if each.guard else 0


def _fixpoint(code: Code, worlds: _Worlds) -> list[int | None]:
    """The state in front of each instruction; None where nothing leads."""
    before: list[int | None] = [None] * len(code.instructions)
    before[0] = 0
    todo, waiting = [0], {0}
    while todo:
        i = heappop(todo)
        waiting.discard(i)
        after = worlds.after(before[i] or 0, code.instructions[i])
        for following in code.successors[i]:
            known = before[following]
            if known is None or after & ~known:
                before[following] = (known or 0) | after
                if following not in waiting:
                    waiting.add(following)
                    heappush(todo, following)
    return before


def _sinks(each: Instruction, tainted: int) -> list[tuple[str, int]]:
    """(kind, registers that must be public) of an instruction, the most telling first."""
    if each.opcode in sass.BRANCHES:
        return [("branch", each.uses)]
    if each.opcode in sass.BARRIERS:
        return [("barrier", each.uses)]
    found = [("address", each.addresses)]
    if each.opcode in sass.LOADS | sass.STORES | sass.CONSTANTS | sass.PRODUCTS:
        found.append(("predicate", each.uses & sass.PREDICATES))
    if each.uses & tainted and each.defs & _UNIFORM:
        found.append(("uniform", each.uses))
    return found


def _path(code: Code, before: list[int | None], sink: int, registers: int) -> tuple[str, ...]:
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
            if each.defs & bit and _is_source(each):
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
