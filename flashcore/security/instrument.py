"""The shipped kernels with clock reads around their bodies: an instrumented copy, since no kernel can be timed from
inside without changing it.

Every block writes how many cycles of its SM's clock passed from before its first load to after its last store was
handed on, all its warps included: a barrier comes before the second reading. What lies between is the shipped source,
line by line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

from flashcore.launch.binding import Binding, Pointer
from flashcore.security.controls import CONTROLS
from flashcore.testing.mutants import Mutant, plant

CYCLES = "cycles"  # the parameter, int64 [blocks]
READ_CLOCK = "mov.u64 $0, %clock64;"

_READ = """@{jit}
def read_clock():
    return {language}.inline_asm_elementwise(
        "{read}", "=l", [], dtype={language}.int64, is_pure=False, pack=1
    )


"""
_WRITE = """    {barrier}
    block = ({language}.program_id(2) * {language}.num_programs(1) + {language}.program_id(1))
    block = block * {language}.num_programs(0) + {language}.program_id(0)
    {language}.store(cycles + block, read_clock() - began)
"""


def _inserted(jit: str, barrier: str, first: str, parameters: str, begin: str, end: str) -> tuple[tuple[str, str], ...]:
    """(what stands in the source, what takes its place), for fragments that are there exactly once."""
    language = jit.replace("gluon", "gl").replace("triton", "tl").removesuffix(".jit")
    write = _WRITE.format(barrier=barrier, language=language)
    return (
        (f"@{jit}\ndef {first}(", _READ.format(jit=jit, language=language, read=READ_CLOCK) + f"@{jit}\ndef {first}("),
        (f"def attention_forward(\n    {parameters},", f"def attention_forward(\n    cycles, {parameters},"),
        (begin, f"    began = read_clock()\n{begin}"),
        (end, write + end if end.startswith("    if") else end + write),
    )


_INSERTED = {
    "portable": _inserted(
        "triton.jit", "tl.debug_barrier()", "load_rows", "q, k, v, o, lse", "    fast, slow = tl.program_id(0),",
        "    if lse is not None:\n",
    ),
    # behind gdc_wait, or the kernel in front would be timed too
    "hopper": _inserted(
        "gluon.jit", "block_barrier()", "divide", "q_desc, k_desc, v_desc, o_desc, lse",
        "    seqlen_q, seqlen_k, first_q, first_k = longest_q,", "        turn += 1\n    tma.store_wait(0)\n",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Timed(Mutant):
    """A mutant with the clock reads in it as well; for none, its fragment stands for itself."""

    inserted: tuple[tuple[str, str], ...] = ()

    def source(self) -> str:
        text = Mutant.source(self)
        for old, new in self.inserted:
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {text.count(old)} times in {self.file}: {old!r}")
            text = text.replace(old, new)
        return text


def timed(binding: Binding, kernel: str, control: str = "") -> Binding:
    """`binding` with the instrumented copy of its kernel, by name, for the kernel, and a control, by name, in it.

    Its first parameter is the address of CYCLES. It starts when what is in front of it in the stream has ended.
    """
    options = {**binding.options, "launch_pdl": False} if "launch_pdl" in binding.options else binding.options
    args = {CYCLES: Pointer(CYCLES, "*i64", True), **binding.args}
    return replace(binding, fn=_module(kernel, control).attention_forward, args=args, options=options)


@cache
def _module(kernel: str, control: str) -> ModuleType:
    return plant(_copy(kernel, control))


def _copy(kernel: str, control: str) -> _Timed:
    fault = CONTROLS[kernel][control or "rescale"]
    new = fault.new if control else fault.old
    return _Timed(f"timed {fault.name if control else kernel}", fault.file, fault.old, new, _INSERTED[kernel])
