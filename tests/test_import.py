"""Importing is free: no Triton, no network, no process, no GPU, no compiler; each claim in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ENTRIES = [
    "import flashcore",
    "import flashcore; flashcore.UnsupportedError",
    "from flashcore.fast.attention_production import attention",
    "from flashcore import attention; import torch; t = torch.zeros(1, 1, 4, 8); attention(t, t, t)",
]

# Opening a socket and starting a process both raise audit events; the hook cannot be removed by what it watches.
AUDIT = """
import sys
seen = []
def hook(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")):
        seen.append((event, repr(args)[:200]))
sys.addaudithook(hook)
"""


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints for this code; its failure is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("entry", ENTRIES)
def test_triton_network_and_processes_stay_out(entry: str) -> None:
    out = python(f"{AUDIT}\n{entry}\nprint([m for m in sys.modules if m.split('.')[0] == 'triton'], seen)")
    assert out == "[] []"


def test_the_audit_sees_what_it_forbids() -> None:
    out = python(f"{AUDIT}\nimport socket, subprocess\nsocket.socket()\nsubprocess.run(['true'])\nprint(seen)")
    assert "socket." in out and "subprocess.Popen" in out


def test_import_alone_does_not_even_load_torch() -> None:
    assert python("import sys, flashcore\nprint('torch' in sys.modules, flashcore.__version__)").startswith("False 0.")


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_gpu_and_without_a_compiler(entry: str, tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": str(tmp_path), "CC": str(tmp_path / "none")}
    assert python(f"{entry}\nprint('fine')", **environment) == "fine"


@pytest.mark.parametrize("before", ["import torch", "import flashcore.fast.attention_production"])
def test_in_a_forked_child(before: str) -> None:
    code = f"""
import os
{before}
child = os.fork()
if child == 0:
    import torch
    from flashcore.fast.attention_production import attention
    t = torch.zeros(1, 1, 4, 8)
    os._exit(0 if attention(t, t, t).shape == t.shape else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == "0"


@pytest.mark.gpu
def test_importing_leaves_cuda_untouched() -> None:
    entry = "import torch\nfrom flashcore.fast.attention_production import attention"
    assert python(f"{entry}\nprint(torch.cuda.is_initialized())") == "False"
