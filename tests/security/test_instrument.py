"""The copies with clock reads: the shipped code between the two readings, in machine code as in the source."""

from __future__ import annotations

import math
import re
from difflib import unified_diff
from itertools import pairwise
from pathlib import Path

import pytest

from flashcore import kernels
from flashcore.core.target import A100, H100, L4, Target
from flashcore.launch import compiled, launcher
from flashcore.launch.binding import Binding
from flashcore.launch.packet import Template, runtime
from flashcore.security import controls, instrument, sass, taint, timing

KERNELS = [("portable", A100), ("portable", L4), ("portable", H100), ("hopper", H100)]


def timed(kernel: str, target: Target, control: str = "") -> tuple[Binding, compiled.Compiled]:
    problem = timing.problem_of(timing.INSIDE)
    config = timing.one_block_an_item(kernel, problem, target)
    assert config is not None
    binding = instrument.timed(launcher.bind(problem, config, 0.125, target), kernel, control)
    return binding, compiled.compile_for(binding, target.arch)


@pytest.mark.parametrize("control", ["", "rescale"])
@pytest.mark.parametrize(("kernel", "target"), KERNELS)
def test_the_clock_is_read_before_the_first_load_and_behind_the_last_store(
    kernel: str, target: Target, control: str
) -> None:
    binding, machine_code = timed(kernel, target, control)
    code = sass.parse(sass.disassemble(machine_code.cubin))

    def places(pattern: str) -> list[int]:
        return [i for i, each in enumerate(code.instructions) if re.search(pattern, each.text)]

    first, last = places("SR_CLOCKLO")
    assert first < min(places(r"\b(LDG|LDGSTS|UTMALDG)\b"))
    *stores, written = places(r"\b(STG|UTMASTG)\b")
    assert stores and max(stores) < last < written, "the only store behind it is that of the cycles"
    assert max(stores) < places("BAR.SYNC")[-1] < last, "every warp is done"
    assert max(places("HMMA|HGMMA")) < last
    if kernel == "hopper":
        assert max(places("UTMASTG")) < places("UTMACMDFLUSH")[-1] < last
        assert not machine_code.kernel.metadata.launch_pdl
    found = taint.analyse(code)
    assert bool(found.count("branch")) == bool(control), found.findings
    assert math.prod(binding.grid) == timing.INSIDE.batch * timing.INSIDE.heads


@pytest.mark.parametrize(("kernel", "target"), KERNELS)
def test_the_control_of_wall_time_is_the_shipped_kernel_with_a_branch_on_data(kernel: str, target: Target) -> None:
    problem = timing.problem_of(timing.QUIET)
    config = timing.one_block_an_item(kernel, problem, target)
    assert config and config.block_n <= timing.QUIET.seqlen_k // 4, "a maximum that rises does so several times"
    shipped = launcher.bind(problem, config, 0.125, target)
    assert math.prod(shipped.grid) == 2
    for binding, branches in ((shipped, 0), (controls.planted(shipped, kernel, "rescale"), 1)):
        code = sass.parse(sass.disassemble(compiled.compile_for(binding, target.arch).cubin))
        assert taint.analyse(code).count("branch") == branches


def test_the_address_of_the_cycles_is_passed_first() -> None:
    binding, machine_code = timed("hopper", H100)
    assert [name for name in binding.fn.arg_names if name in binding.args][0] == instrument.CYCLES
    assert runtime(binding)[0] == binding.args[instrument.CYCLES]
    template = Template(binding, machine_code)
    assert template.slots[0] == (0, None)
    offsets = [offset for offset, _ in template.slots]
    assert all(a < b for a, b in pairwise(offsets)) and len(offsets) == 5


@pytest.mark.parametrize("kernel", ["portable", "hopper"])
def test_only_clock_reads_are_added(kernel: str) -> None:
    shipped = (Path(kernels.__file__).parent / kernel / "attention.py").read_text().splitlines()
    copied = Path(instrument._module(kernel, "").__file__ or "").read_text().splitlines()
    changed = [line for line in unified_diff(shipped, copied, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    removed = [line[1:].strip() for line in changed if line.startswith("-")]
    added = [line[1:].strip() for line in changed if line.startswith("+")]
    beside = [line for line in shipped if line.startswith("from .")]
    assert set(beside) <= set(removed) and len(removed) == 1 + len(beside), "the parameters, and imports from beside it"
    assert any(line.startswith("cycles, ") and line.removeprefix("cycles, ") in removed for line in added)
    assert len(added) - len(removed) == 12


def test_a_kernel_that_has_moved_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(instrument._INSERTED, "portable", (("no such line", ""),))
    with pytest.raises(ValueError, match="no such line"):
        instrument._copy("portable", "").source()
