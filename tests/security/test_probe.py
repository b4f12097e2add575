"""The probe's machine code: both clocks are read side by side, by one thread, with no programmatic launch about it."""

from __future__ import annotations

import re

import pytest

from flashcore.security import instrument, probe, sass


def test_compiles_for_hopper_and_reads_both_clocks_side_by_side() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(probe.read, {"into": "*i64"}, {}, {(0,): [["tt.divisibility", 16]]})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    ptx = compiled.asm["ptx"]
    assert instrument.READ_CLOCK.split()[-1] in ptx and "%smid;" in ptx and "%globaltimer" in ptx
    assert "griddepcontrol" not in ptx and not compiled.metadata.launch_pdl
    texts = [each.text for each in sass.parse(sass.disassemble(compiled.asm["cubin"])).instructions]
    cycles, now = (next(i for i, text in enumerate(texts) if name in text) for name in ("CLOCKLO", "GLOBALTIMERLO"))
    assert now == cycles + 1
    assert len([text for text in texts if re.search(r"\bSTG\b", text)]) == 3
    assert compiled.metadata.num_warps == 1


def test_both_launches_are_plain_ones_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Read:
        def __getitem__(self, grid):
            return lambda into, **options: launches.append((grid, into.data_ptr(), options))

    monkeypatch.setattr(probe, "read", Read())
    pair = probe.Probe("cpu")
    pair.before()
    pair.after()
    (grid, first, options), (_, second, _) = launches
    assert grid == (1,) and options == {"num_warps": 1} and second - first == 32, "rows aligned alike"
