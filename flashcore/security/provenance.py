"""Which loads give public values: those through a pointer that the caller gave for lengths, and nothing else.

Lengths (seqused_k, cu_seqlens_q, cu_seqlens_k) are public, q, k, v and masks are not. Where a register's value may
come from is followed from constant memory, where a kernel's parameters are, as taint.py follows data. A load is public
where its address comes from pointers to lengths, from numbers and thread indices, from what other public loads gave,
and from no other pointer, no constant of unknown meaning, no other loaded value and no matrix product. So a search
among lengths is public, an address mixed from public and secret pointers is secret, and so is what a page table's entry
leads to.

Otherwise what passes shared memory is secret, whatever it was, but for one load: warps beside the kernel's first ones
read there what they are to do, a byte for each at the end of the block's shared memory, which Triton writes and no
tensor has part in. That is taken for public if it is read by a warp's own number and nothing that came from a load or
a product is stored to shared memory word by word. A store that may go through a pointer to lengths, or may store one,
makes every load secret.

Assumed, not seen: that addresses stay within the tensor or the tile they point to (compute-sanitizer), and that nobody
else writes data into the lengths' memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flashcore.launch.binding import Binding, Scalar
from flashcore.launch.compiled import Compiled
from flashcore.launch.packet import Template, runtime
from flashcore.security import sass, taint
from flashcore.security.sass import Code, Instruction

PUBLIC_TENSORS = ("seqused_k", "cu_seqlens_q", "cu_seqlens_k")

# c[bank][offset], and cx[register][offset], whose bank a register holds; not the desc[...][...] of an access.
_CONSTANT = re.compile(r"\bcx?\[([^\]]*)\]\[([^\]]*)\]")
# Below the parameters, in bank 0: the sizes of block and grid (32-bit numbers), and the descriptor of global memory
# that every access names (on sm_80 and sm_89 not in its text).
_NUMBERS = range(0x00, 0x18)
_DESCRIPTOR = {80: range(0x118, 0x120), 89: range(0x118, 0x120), 90: range(0x208, 0x210)}
_INTO_SHARED = frozenset({"LDGSTS", "UTMALDG"})  # copies, which may read lengths: they come out as secrets
# What ptxas writes in the cubin's header of a kernel, as cuobjdump prints it.
_BANK = re.compile(r"EIATTR_PARAM_CBANK\s+Format:\s+\S+\s+Value:\s+0x[0-9a-f]+ 0x([0-9a-f]+)")
_PARAMETER = re.compile(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x([0-9a-f]+)\s+Size\s+: 0x([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Parameters:
    """What lies where in constant bank 0; everything that is in none of these ranges is taken for a secret pointer."""

    lengths: tuple[range, ...]  # pointers to public values
    numbers: tuple[range, ...]
    duties: int | None = None  # where in shared memory warps read what they are to do, less their own number


def parameters(binding: Binding, compiled: Compiled) -> Parameters:
    """Where a kernel finds what it is launched with.

    Raises:
        ValueError: the machine code's header lists other parameters than the launch passes.
    """
    found = _parameters(binding, Template(binding, compiled), compiled.arch, header(compiled.cubin))
    first = binding.options["num_warps"]
    others = compiled.threads // 32 - first
    return replace(found, duties=compiled.shared - others - first) if others else found


def _parameters(binding: Binding, template: Template, arch: int, listed: list[range]) -> Parameters:
    sizes = [len(place) for place in listed]
    if sizes != template.sizes:
        raise ValueError(f"the kernel has parameters of {sizes} bytes, its launch passes {template.sizes}")
    at = dict(zip(template.offsets, listed, strict=True))
    names = [a.tensor for a in runtime(binding) if not isinstance(a, Scalar)]
    tensors = [at[offset] for offset, _ in template.slots]
    lengths = tuple(place for name, place in zip(names, tensors, strict=True) if name in PUBLIC_TENSORS)
    pointers = [*tensors, *listed[-2:]]  # Triton's scratch last, though null
    numbers = (place for place in listed if place not in pointers)
    return Parameters(lengths, (*numbers, _NUMBERS, _DESCRIPTOR[arch]))


def header(cubin: bytes) -> list[range]:
    """A kernel's parameters, in order, as byte ranges of constant bank 0: what the cubin says of itself.

    They don't always begin where the bank's parameters do: in front of a TMA descriptor there may be a gap.

    Raises:
        ValueError: the cubin doesn't say, or says it of several kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        said = subprocess.run([sass.tool("cuobjdump"), "-elf", file], check=True, capture_output=True, text=True).stdout
    banks = _BANK.findall(said)
    if len(banks) != 1:
        raise ValueError(f"the cubin names {len(banks)} places of parameters")
    first = int(banks[0], 16) & 0xFFFF  # below its upper half, the size of them all
    found = sorted(tuple(int(number, 16) for number in each) for each in _PARAMETER.findall(said))
    if [ordinal for ordinal, _, _ in found] != [*range(len(found))]:
        raise ValueError(f"the cubin lists parameters {[ordinal for ordinal, _, _ in found]}")
    return [range(first + offset, first + offset + size) for _, offset, size in found]


def public_loads(code: Code, where: Parameters) -> frozenset[int]:
    """The indices of the instructions that load nothing but lengths, or a warp's duty."""
    return _lengths(code, where) | _duties(code, where)


def _duties(code: Code, where: Parameters) -> frozenset[int]:
    if where.duties is None:
        return frozenset()
    stored = [i for i, each in enumerate(code.instructions) if each.opcode == "STS"]
    asked = [
        i for i, each in enumerate(code.instructions)
        if each.opcode == "LDS" and re.search(rf"LDS\.U8 R\d+, \[R\d+\+UR\d+\+{where.duties:#x}\]", each.text)
    ]  # fmt: skip
    data = frozenset(
        i for i, each in enumerate(code.instructions)
        if (each.opcode in sass.LOADS and i not in asked) or each.opcode in sass.PRODUCTS
    )  # fmt: skip
    reached = taint.reached_by(code, data)
    tainted = [code.instructions[i].uses & (reached[i] or 0) for i in (*stored, *asked)]
    return frozenset() if any(tainted) else frozenset(asked)


def _lengths(code: Code, where: Parameters) -> frozenset[int]:
    if not where.lengths:
        return frozenset()
    origins = [_constants(each, where) for each in code.instructions]
    loads = frozenset(
        i for i, each in enumerate(code.instructions) if each.opcode in sass.LOADS or each.opcode in sass.PRODUCTS
    )
    lengths = frozenset(i for i, (from_lengths, _) in enumerate(origins) if from_lengths)
    others = frozenset(i for i, (_, from_others) in enumerate(origins) if from_others)
    of_lengths = taint.reached_by(code, lengths, fresh=loads)  # no pointer to lengths is ever stored, see below
    candidates = frozenset(
        i for i, each in enumerate(code.instructions)
        if each.opcode == "LDG" and each.addresses & (of_lengths[i] or 0) and not any(origins[i])
    )  # fmt: skip
    of_others = taint.reached_by(code, others | (loads - candidates))  # a candidate's value is as secret as its address
    found: list[int] = []
    for i, each in enumerate(code.instructions):
        from_lengths, from_others = of_lengths[i], of_others[i]
        if from_lengths is None or from_others is None:
            continue
        writes = each.opcode in sass.STORES - _INTO_SHARED or each.opcode.startswith("ATOM")
        if writes and each.uses & from_lengths:
            return frozenset()
        if i in candidates and not each.addresses & from_others:
            found.append(i)
    return frozenset(found)


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
    wide = {"64", "WIDE"} & {*modifiers} or (each.opcode in ("IMAD", "UIMAD") and "HI" in modifiers)
    size = 16 if "128" in modifiers else 8 if wide else 4
    return range(int(offset, 16), int(offset, 16) + size)


def _any_in(numbers: Iterable[int], ranges: Iterable[range]) -> bool:
    held = tuple(ranges)
    return any(n in r for n in numbers for r in held)
