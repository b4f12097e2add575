"""`flashcore audit sass` on real machine code: shipped kernels are clean, a planted branch on data is found."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from flashcore import cli
from flashcore.launch import select
from flashcore.launch.compile_check import TARGETS
from flashcore.security import audit
from flashcore.security.audit import Audited
from flashcore.security.controls import CONTROLS
from flashcore.security.taint import Taint
from flashcore.security.unwritten import Read
from flashcore.security.variants import Variant, drawn, variants

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [(80, "portable"), (89, "portable"), (90, "portable"), (90, "hopper")]


@pytest.fixture(scope="module")
def quick() -> list[Audited]:
    return list(audit.audit_all(variants(list(TARGETS), quick=True)))


@cache
def one(control: str = "") -> Variant:
    return next(v for v in variants([80], quick=True) if v.control == control)


@pytest.mark.parametrize(("arch", "kernel"), KERNELS)
def test_shipped_is_clean_and_every_control_is_caught(quick: list[Audited], arch: int, kernel: str) -> None:
    ours = [r for r in quick if (r.variant.target.arch, r.variant.config.kernel) == (arch, kernel)]
    for shipped in (r for r in ours if not r.variant.control):
        assert shipped.ok and shipped.taint, (shipped.variant.name, shipped.error, shipped.taint)
        assert shipped.taint.branches and shipped.taint.memory and shipped.taint.products
        # The portable kernel divides, the Hopper kernels do not; a logarithm and a soft cap have guards, too.
        p = shipped.variant.problem
        assert bool(shipped.taint.guarded) == (kernel == "portable" or p.return_lse or p.softcap > 0)
        specialized = shipped.variant.config.schedule == "specialized"  # its warps read what they are to do
        assert bool(shipped.taint.public_loads) == (shipped.variant.problem.ragged or specialized)
    controls = {r.variant.control: r for r in ours if r.variant.control}
    expected = {"rescale", "mask", "length", "pointer", *(["specialized rescale"] if kernel == "hopper" else [])}
    assert controls.keys() == CONTROLS[kernel].keys() == expected
    for control in controls.values():
        assert control.ok and control.taint, (control.variant.name, control.error)
    for name in expected - {"length", "pointer"}:
        seen = controls[name].taint
        assert seen and seen.count("branch")
        finding = next(f for f in seen.findings if f.kind == "branch")
        assert "BRA" in finding.text and len(finding.path) > 2


@pytest.mark.parametrize(("arch", "kernel"), KERNELS)
def test_kernels_that_read_lengths_fail_where_lengths_are_secret(
    quick: list[Audited], arch: int, kernel: str
) -> None:
    reading = [r for r in quick if r.variant.problem.ragged and r.variant.config.kernel == kernel
               and r.variant.target.arch == arch and not r.variant.control]  # fmt: skip
    assert {r.variant.problem.packed is not None for r in reading} == {False, True}
    assert all(r.undeclared for r in reading)
    silent = replace(reading[0], undeclared=0)
    assert not silent.ok, "were it not for the lengths, nothing was seen"


def test_all_that_is_shipped_is_audited_and_every_kernel_has_its_controls() -> None:
    for arch, target in TARGETS.items():
        found = [(v.problem, v.config) for v in variants([arch]) if not v.control]
        assert found[: len(list(select.shipped(target)))] == list(select.shipped(target))
    controls = {(v.target.arch, v.config.kernel, v.control) for v in variants(list(TARGETS)) if v.control}
    assert controls == {(*kernel, control) for kernel in KERNELS for control in CONTROLS[kernel[1]]}


@pytest.mark.parametrize(("arch", "kernel"), KERNELS)
def test_every_flag_of_a_kernel_is_audited_on_and_off(arch: int, kernel: str) -> None:
    functions: dict[str, dict[str, set[object]]] = {}
    for v in variants([arch]):
        if v.config.kernel == kernel and not v.control:
            binding = audit.bound(v)
            names = functions.setdefault(binding.fn.__name__, {})
            for name in binding.fn.arg_names:
                given = binding.constexprs.get(name, "passed")
                names.setdefault(name, set()).add(given)
    assert len(functions) == (2 if kernel == "hopper" else 1)
    for names in functions.values():
        flags = {name for name, values in names.items() if values & {None, True, False} and name != "EMULATED"}
        alone = {name for name in flags if len(names[name]) == 1}
        expected = {"SPLIT"} if kernel == "portable" else set()  # chosen by the architecture
        assert alone == expected, {name: names[name] for name in alone}
        assert names["GROUP"] > {1}


def test_every_combination_of_options_is_audited() -> None:
    for arch, kernel in KERNELS:
        ours = [v.problem for v in variants([arch]) if v.config.kernel == kernel and not v.control]
        seen = {(*p.options, p.is_causal) for p in ours if p.head_dim == 64}
        names = ("window", "softcap", "attn_mask", "seqused_k")
        for chosen in product((False, True), repeat=4):
            options = tuple(name for name, used in zip(names, chosen, strict=True) if used)
            assert (*options, False) in seen
            assert (*options, True) in seen or "window" in options
        for softcap, window in product((False, True), repeat=2):
            options = ("window",) * window + ("softcap",) * softcap + ("cu_seqlens",)
            assert (*options, False) in seen


def test_random_problems_are_the_same_ones_again() -> None:
    found = drawn([80, 90], 30)
    assert found == drawn([80, 90], 30) and found[:20] == drawn([80], 20) and drawn([80, 90], 0) == []
    assert found != drawn([80, 90], 30, seed=1)
    assert [v.target.arch for v in found] == [80] * 30 + [90] * 30 and len(dict.fromkeys(found)) == 60
    assert {v.config.kernel for v in found} == {"portable", "hopper"}
    narrow = [v for v in found if v.problem.head_dim != v.problem.head_dim_v]
    assert narrow and any(not v.problem.aligned_rows for v in found) and any(v.problem.packed for v in found)
    assert all(v.problem.dtype != torch.float32 for v in found), "which no tensor core computes"


def test_status_and_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = Taint(100, 3, 10, 4, 2, ())
    shipped, control = one(), one("rescale")
    outcomes = {"": clean, "rescale": clean}
    unset: dict[str, tuple[Read, ...]] = {"": (), "rescale": ()}

    def pretend(work: list[Variant], jobs: int | None) -> list[Audited]:
        return [Audited(v, outcomes[v.control], "", unwritten=unset[v.control], gap_noticed=True) for v in work]

    monkeypatch.setattr(audit, "audit_all", pretend)
    monkeypatch.setattr(audit, "variants", lambda archs, quick: [shipped, control])
    assert audit.main(["sass"]) == 1, "a control that is missed is a failure"
    assert "0 of 1 controls caught" in capsys.readouterr().out
    real = audit.audit(control)
    outcomes["rescale"] = real.taint or clean
    assert audit.main(["sass", "--json", str(tmp_path / "a.json")]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["environment"].keys() >= {"triton", "ptxas", "nvdisasm", "source"}
    said = {"clean": 1, "tainted_branches": 0, "controls_caught": 1, "written": 1, "gaps_noticed": 1}
    assert record["summary"][0] | said == record["summary"][0]
    printed = capsys.readouterr().out
    assert "ptxas" in printed and "cannot see" in printed
    outcomes[""] = outcomes["rescale"]
    assert audit.main(["sass"]) == 1, "a shipped variant with a finding"
    assert "branch: 0x" in capsys.readouterr().out
    outcomes[""], unset[""] = clean, (Read(16, "FADD R2, R3, R4", ("R3",)),)
    assert audit.main(["sass"]) == 1, "a shipped variant that reads what nothing wrote"
    assert "unwritten: 0x0010 FADD R2, R3, R4: R3" in capsys.readouterr().out


def test_what_cannot_be_compiled_or_read_is_not_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.sass, "disassemble", lambda cubin: ".text.k:\n        /*0000*/ FROB R1 ;\n")
    seen = audit.audit(one())
    assert not seen.ok and "FROB" in seen.error


def test_another_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere/ptxas")
    with pytest.raises(SystemExit) as ended:
        audit.main(["sass", "--quick"])
    assert ended.value.code == 2


def test_only_what_exists_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.COMMANDS["audit"][0] == "flashcore.security.audit"
    with pytest.raises(SystemExit) as ended:
        audit.main(["energy"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "sass" in said and "timing" in said


def test_the_document_cites_a_complete_and_clean_record() -> None:
    cited = re.findall(r"results/(audit-sass-[\w-]+\.json)", (ROOT / "docs" / "security.md").read_text())
    assert cited
    for name in cited:
        record = json.loads((ROOT / "results" / name).read_text())
        assert not record["quick"] and record["archs"] == sorted(TARGETS)
        assert all(case["ok"] for case in record["cases"])
