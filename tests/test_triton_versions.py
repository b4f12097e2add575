"""Every shipped kernel, and C++, compiles under the oldest Triton served, the newest release, and the installed one.

Every tile under the installed release; under the others the largest of each kernel, dtype, head dimension and option,
since all of them take minutes. `make test` puts the other releases into .venv-triton/<version>, without a second torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINNED = dict(re.findall(r"^TRITON_(OLDEST|NEWEST) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
VERSIONS = ["installed", PINNED["OLDEST"], PINNED["NEWEST"]]


def run(release: str, cache: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with this release of Triton, which keeps what it compiles in `cache`; None = where the other tests do."""
    path = [str(ROOT)]
    if release != "installed":
        beside = ROOT / ".venv-triton" / release
        if not (beside / "triton").is_dir():
            pytest.skip(f"triton {release} is not beside this one: `make test` installs it")
        path.insert(0, str(beside))
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(path),
            **({} if cache is None else {"TRITON_CACHE_DIR": str(cache)}),
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.parametrize("release", VERSIONS)
def test_every_shipped_kernel_compiles(release: str, tmp_path: Path) -> None:
    arguments = [] if release == "installed" else ["--one-tile"]
    cache = None if release == "installed" else tmp_path  # much of it is compiled by other tests, too
    done = run(release, cache, "-m", "flashcore.launch.compile_check", *arguments)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"sm_{r['arch']} {r['kernel']} {r['config']}: {r['error']}" for r in results if not r["ok"]]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert {r["arch"] for r in results} == {80, 89, 90}
    expected = version("triton") if release == "installed" else release
    assert {r["triton"] for r in results} == {expected}
    assert all(r["registers"] > 0 for r in results)


SOURCE = """
#include <string>
extern "C" int answer() { return std::string(ANSWER, 'x').size(); }
"""
LIBRARY = """
import ctypes, sys
from pathlib import Path
import triton
from flashcore.launch.compiled import build_library

folder = sys.argv[1]
path = build_library(
    "answer", Path(folder, "answer.cpp"), folder, include_dirs=[], library_dirs=[], libraries=["stdc++"],
    flags=["-std=c++20", "-DANSWER=42"],
)
print(triton.__version__, ctypes.CDLL(str(path)).answer())
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("release", VERSIONS)
def test_its_compiler_builds_a_library_of_cpp(release: str, tmp_path: Path) -> None:
    (tmp_path / "answer.cpp").write_text(SOURCE)
    done = run(release, tmp_path, "-c", LIBRARY, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [version("triton") if release == "installed" else release, "42"]
