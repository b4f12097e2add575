"""`flashcore audit sass` on real machine code: shipped kernels are clean, a planted branch on data is found."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from flashcore import cli
from flashcore.launch import select
from flashcore.launch.compile_check import TARGETS
from flashcore.security import audit
from flashcore.security.audit import Audited, Variant
from flashcore.security.taint import Taint

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [(80, "portable"), (89, "portable"), (90, "portable"), (90, "hopper")]


@cache
def quick() -> dict[tuple[int, str, bool], Variant]:
    return {(v.target.arch, v.config.kernel, v.control): v for v in audit.variants(list(TARGETS), quick=True)}


@pytest.mark.parametrize(("arch", "kernel"), KERNELS)
def test_shipped_is_clean_and_its_control_is_caught(arch: int, kernel: str) -> None:
    shipped = audit.audit(quick()[arch, kernel, False])
    assert shipped.ok, (shipped.error, shipped.taint and shipped.taint.findings)
    assert shipped.taint is not None
    assert shipped.taint.branches and shipped.taint.memory and shipped.taint.products and shipped.taint.guarded
    control = audit.audit(quick()[arch, kernel, True])
    assert control.ok and control.taint is not None, control.error
    assert control.taint.count("branch") >= 1
    finding = next(f for f in control.taint.findings if f.kind == "branch")
    assert "BRA" in finding.text and len(finding.path) > 2


def test_all_that_is_shipped_is_audited_and_every_kernel_has_a_control() -> None:
    for arch, target in TARGETS.items():
        found = audit.variants([arch])
        assert [(v.problem, v.config) for v in found if not v.control] == list(select.shipped(target))
    assert {(v.target.arch, v.config.kernel) for v in audit.variants(list(TARGETS)) if v.control} == set(KERNELS)


def test_status_and_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = Taint(100, 3, 10, 4, 2, ())
    shipped, control = (v for (arch, _, _), v in quick().items() if arch == 80)
    outcomes = {False: clean, True: clean}

    def pretend(work: list[Variant], jobs: int | None) -> list[Audited]:
        return [Audited(v, outcomes[v.control], "") for v in work]

    monkeypatch.setattr(audit, "audit_all", pretend)
    monkeypatch.setattr(audit, "variants", lambda archs, quick: [shipped, control])
    assert audit.main(["sass"]) == 1, "a control that is missed is a failure"
    assert "0 of 1 controls caught" in capsys.readouterr().out
    real = audit.audit(control)
    outcomes[True] = real.taint or clean
    assert audit.main(["sass", "--json", str(tmp_path / "a.json")]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["environment"].keys() >= {"triton", "ptxas", "nvdisasm", "source"}
    assert record["summary"][0] | {"clean": 1, "tainted_branches": 0, "controls_caught": 1} == record["summary"][0]
    printed = capsys.readouterr().out
    assert "ptxas" in printed and "cannot see" in printed
    outcomes[False] = outcomes[True]
    assert audit.main(["sass"]) == 1, "a shipped variant with a finding"
    assert "branch: 0x" in capsys.readouterr().out


def test_what_cannot_be_compiled_or_read_is_not_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.sass, "disassemble", lambda cubin: ".text.k:\n        /*0000*/ FROB R1 ;\n")
    seen = audit.audit(quick()[80, "portable", False])
    assert not seen.ok and "FROB" in seen.error


def test_another_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere/ptxas")
    with pytest.raises(SystemExit) as ended:
        audit.main(["sass", "--quick"])
    assert ended.value.code == 2


def test_only_what_exists_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.COMMANDS["audit"][0] == "flashcore.security.audit"
    with pytest.raises(SystemExit) as ended:
        audit.main(["timing"])
    assert ended.value.code == 2
    assert "sass" in capsys.readouterr().err


def test_the_document_cites_a_complete_and_clean_record() -> None:
    cited = re.findall(r"results/(audit-sass-[\w-]+\.json)", (ROOT / "docs" / "security.md").read_text())
    assert cited
    for name in cited:
        record = json.loads((ROOT / "results" / name).read_text())
        assert not record["quick"] and record["archs"] == sorted(TARGETS)
        assert all(case["ok"] for case in record["cases"])
