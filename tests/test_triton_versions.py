"""Every shipped kernel compiles under the oldest Triton served, the newest release, and the installed one.

Every tile under the installed release; under the others the largest of each kernel, dtype, head dimension and option,
since all of them take minutes. `make test` puts the other releases into .venv-triton/<version>, without a second torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINNED = dict(re.findall(r"^TRITON_(OLDEST|NEWEST) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
VERSIONS = ["installed", PINNED["OLDEST"], PINNED["NEWEST"]]


@pytest.mark.parametrize("release", VERSIONS)
def test_every_shipped_kernel_compiles(release: str, tmp_path: Path) -> None:
    path = [str(ROOT)]
    arguments = [] if release == "installed" else ["--one-tile"]
    if release != "installed":
        beside = ROOT / ".venv-triton" / release
        if not (beside / "triton").is_dir():
            pytest.skip(f"triton {release} is not beside this one: `make test` installs it")
        path.insert(0, str(beside))
    done = subprocess.run(
        [sys.executable, "-m", "flashcore.launch.compile_check", *arguments],
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(path),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"sm_{r['arch']} {r['kernel']} {r['config']}: {r['error']}" for r in results if not r["ok"]]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert {r["arch"] for r in results} == {80, 89, 90}
    expected = version("triton") if release == "installed" else release
    assert {r["triton"] for r in results} == {expected}
    assert all(r["registers"] > 0 for r in results)
