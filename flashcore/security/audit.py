"""`flashcore audit sass`: does anything that the kernels execute, or any address, depend on the data? And do they read
registers that nothing wrote, as a compiler's fault has them (unwritten.py)?

Compiles every shipped variant and follows q, k, v and masks through the machine code (taint.py says how; which loads
give lengths, provenance.py). Needs no GPU. Each architecture's kernels are audited again with branches on data planted
in them, which must be found. The other audits have modules of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from flashcore.launch.binding import Binding
from flashcore.launch.compile_check import TARGETS
from flashcore.measure import machine
from flashcore.security import sass, taint, unwritten
from flashcore.security.taint import Taint
from flashcore.security.variants import Variant, drawn, variants

UNSEEN = (
    "the variants that a problem's options select beyond those listed, and kernels that another compiler makes",
    "how long an instruction takes: arithmetic under a guard that data decides (column `guarded`), the memory system",
    "whether the GPU executes what nvdisasm's text says, and what it does beyond that",
    "power, frequency, electromagnetic effects, other programs on the GPU, the code around the kernels",
)


@dataclass(frozen=True, slots=True)
class Audited:
    """What the audit says of one variant."""

    variant: Variant
    taint: Taint | None  # None where there is an error
    error: str  # "" when it compiled and could be read
    undeclared: int = 0  # findings were the lengths secret, which a kernel that reads some must have
    unwritten: tuple[unwritten.Read, ...] = ()
    gap_noticed: bool = False  # whether the same kernel without one of its writes is found out

    @property
    def ok(self) -> bool:
        """A shipped variant without findings, or a control with one."""
        if self.error or self.taint is None:
            return False
        if self.variant.control:
            return bool(self.taint.findings)
        written = not self.unwritten and self.gap_noticed
        return written and not self.taint.findings and bool(self.undeclared) == self.variant.problem.ragged

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        said = {"variant": self.variant.name, "control": self.variant.control, "ok": self.ok, "error": self.error}
        if self.taint is None:
            return said
        more = {"unwritten": [asdict(read) for read in self.unwritten], "gap_noticed": self.gap_noticed}
        return said | asdict(self.taint) | {"undeclared": self.undeclared} | more


def audit(variant: Variant) -> Audited:
    """Compile a variant and analyse its machine code. What goes wrong on the way becomes the `error`."""
    from flashcore.launch import compiled
    from flashcore.security import provenance

    try:
        binding = bound(variant)
        machine_code = compiled.compile_for(binding, variant.target.arch)
        code = sass.parse(sass.disassemble(machine_code.cubin))
        found = taint.analyse(code, provenance.public_loads(code, provenance.parameters(binding, machine_code)))
        undeclared = taint.analyse(code, paths=False).count() if variant.problem.ragged else 0
        unset, faulty = unwritten.reads(code), unwritten.without_a_write(code)
    except Exception as failure:  # a compiler may raise anything; what cannot be read is not clean
        first = next(iter(str(failure).strip().splitlines()), "no message")
        return Audited(variant, None, f"{type(failure).__name__}: {first}")
    error = "" if found.products else "no tensor-core instruction: this is no attention kernel"
    return Audited(variant, found, error, undeclared, unset, faulty is not None and bool(unwritten.reads(faulty)))


def bound(variant: Variant) -> Binding:
    """The kernel of a variant, with its control in it, bound to the problem."""
    from flashcore.launch import launcher
    from flashcore.security.controls import planted

    scale = variant.problem.head_dim**-0.5
    binding = launcher.bind(variant.problem, variant.config, -scale if variant.negative else scale, variant.target)
    return planted(binding, variant.config.kernel, variant.control) if variant.control else binding


def audit_all(work: Sequence[Variant], jobs: int | None = None) -> Iterator[Audited]:
    """`audit` of each, several at a time in processes of their own; None = one for each core."""
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn")) as pool:
        yield from pool.map(audit, work)


def toolchain() -> dict[str, str]:
    """What compiled and what disassembled: the audit speaks of these alone."""
    return {
        "triton": machine.installed("triton") or "?",
        **{name: _version(sass.tool(name)) for name in ("ptxas", "nvdisasm")},
        "python": platform.python_version(),
    }


def _version(program: Path) -> str:
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else "?"


COMMANDS: dict[str, tuple[str, str]] = {  # the other audits: name -> module, what it asks
    "bitwise": ("flashcore.security.bitwise", "the same bits on every repeat, stream, process and place in a batch"),
    "faults": ("flashcore.security.faults", "things that fail, and calls that make no sense; needs no GPU"),
    "fuzz": ("flashcore.security.fuzz", "random problems over every option, through every gate"),
    "load": ("flashcore.security.load", "threads and streams at once; does memory grow?"),
    "sanitize": ("flashcore.security.sanitize", "compute-sanitizer's four tools over every kernel and option"),
    "tables": ("flashcore.security.tables", "hostile tuning tables, and processes that start at once; needs no GPU"),
    "timing": ("flashcore.security.timing", "cycles and wall time of kernels on data of two classes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when something is tainted, could not be read, or a control was missed."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        status: int = import_module(COMMANDS[given[0]][0]).main(given[1:])
        return status
    parser = argparse.ArgumentParser(prog="flashcore audit", description="Does execution depend on the data?")
    kinds = parser.add_subparsers(required=True, metavar="audit")
    for name, (_, what) in COMMANDS.items():
        kinds.add_parser(name, help=what)
    options = kinds.add_parser("sass", help="the machine code of every shipped variant; needs no GPU")
    options.add_argument("--arch", type=int, nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    options.add_argument("--quick", action="store_true", help="one variant of each kernel, schedule and mask")
    options.add_argument("--random", type=int, default=0, metavar="N", help="of each, N more of random problems")
    options.add_argument("--jobs", type=int, help="processes; one for each core")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all of it here too")
    chosen = parser.parse_args(argv)

    if path := os.environ.get("TRITON_PTXAS_PATH"):
        parser.error(f"TRITON_PTXAS_PATH={path}: the audit names and speaks of the ptxas that Triton ships")
    tools = toolchain()
    print("  ".join(f"{name} {version}" for name, version in tools.items()))
    work = list(dict.fromkeys([*variants(chosen.arch, quick=chosen.quick), *drawn(chosen.arch, chosen.random)]))
    columns = f"{'instr':>7}{'branch':>7}{'memory':>7}{'guarded':>8}{'lengths':>8}"
    print(f"{columns} | tainted: branch address other | variant")
    results = []
    for each in audit_all(work, chosen.jobs):
        results.append(each)
        print(_row(each), flush=True)
    shipped = [r.ok for r in results if not r.variant.control]
    controls = [r.ok for r in results if r.variant.control]
    print(f"\n{sum(shipped)} of {len(shipped)} shipped variants clean")
    print(f"{sum(controls)} of {len(controls)} controls caught")
    ragged = [r.undeclared > 0 for r in results if r.variant.problem.ragged and not r.variant.control]
    print(f"{sum(ragged)} of {len(ragged)} variants that read lengths would fail were lengths secret")
    print("It cannot see:", *UNSEEN, sep="\n  - ")
    if chosen.json:
        record = {
            "schema": 1, "kind": "audit-sass",
            "environment": {
                "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"), "gpu": None, **tools,
                "commit": machine.commit(), "source": machine.source(),
            },
            "quick": chosen.quick, "random": chosen.random, "archs": chosen.arch, "unseen": UNSEEN,
            "summary": summary(results), "cases": [r.as_json() for r in results],
        }  # fmt: skip
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r.ok for r in results) else 1


def summary(results: Sequence[Audited]) -> list[dict[str, object]]:
    """Counts by architecture: of the shipped variants in all, and how many controls there are and were caught."""
    rows: list[dict[str, object]] = []
    for arch in sorted({r.variant.target.arch for r in results}):
        here = [r for r in results if r.variant.target.arch == arch]
        shipped = [r for r in here if not r.variant.control]
        read = [r.taint for r in shipped if r.taint]
        controls = [r for r in here if r.variant.control]
        rows.append({
            "arch": arch, "variants": len(shipped), "clean": sum(r.ok for r in shipped),
            **{name: sum(getattr(t, name) for t in read)
               for name in ("instructions", "branches", "memory", "products", "guarded")},
            "tainted_branches": sum(t.count("branch") for t in read),
            "tainted_addresses": sum(t.count("address") for t in read),
            "tainted_other": sum(t.count("predicate", "barrier", "uniform") for t in read),
            "public_loads": sum(t.public_loads for t in read),
            "reads_lengths": sum(r.variant.problem.ragged for r in shipped),
            "undeclared": sum(r.undeclared > 0 for r in shipped),
            "controls": len(controls), "controls_caught": sum(r.ok for r in controls),
            "written": sum(not r.unwritten for r in shipped if r.taint),
            "gaps_noticed": sum(r.gap_noticed for r in shipped),
        })  # fmt: skip
    return rows


def _row(each: Audited) -> str:
    t = each.taint
    if t is None:
        return f"{each.variant.name}: {each.error}"
    branches, addresses = t.count("branch"), t.count("address")
    counts = f"{t.instructions:7}{t.branches:7}{t.memory:7}{t.guarded:8}{t.public_loads:8}"
    tainted = f"{branches:15} {addresses:7} {t.count() - branches - addresses:5}"
    lines = [f"{counts} | {tainted} | {each.variant.name} {each.error}".rstrip()]
    if not each.variant.control:
        lines += [f"    unwritten: {r.offset:#06x} {r.text}: {', '.join(r.registers)}" for r in each.unwritten]
        for finding in t.findings:
            lines.append(f"    {finding.kind}: {finding.offset:#06x} {finding.text}")
            lines += [f"        {step}" for step in finding.path]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
