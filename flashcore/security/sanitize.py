"""`flashcore audit sanitize`: compute-sanitizer's four tools over calls that touch every kernel and option.

    memcheck    accesses outside of allocations, misaligned ones, leaks of the device heap
    racecheck   shared memory read and written without a barrier in between
    initcheck   global memory that is read before anybody wrote it
    synccheck   barriers that not all threads of a warp or block reach

One process a tool and part, so that they share the cores; PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an
allocation of its own, or else an overrun lands in the allocator's pool and nobody sees it. The control of each tool
is a kernel with a fault that it must find (CONTROLS, in CUDA C, compiled here by torch's runtime compiler). Needs
compute-sanitizer, of the CUDA toolkit or of `pip install nvidia-cuda-sanitizer-api`. Nothing that a kernel does is
suppressed. Calls of the driver that return an error are not counted: FlashCore asks for a kernel's parameters one after
the other until the driver says that there is no further one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flashcore.core.errors import UnsupportedError
from flashcore.security import record

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit status that a tool gives when it found something
PARTS = 4

# One fault a tool, launched on one block. `data` holds 64 floats, `fresh` as many that nobody has written.
CONTROLS: dict[str, str] = {
    "memcheck": "data[64 + 4096 + threadIdx.x] = 1.0f;",
    "racecheck": "__shared__ float box[64]; box[threadIdx.x] = data[threadIdx.x];"
                 " data[threadIdx.x] = box[(threadIdx.x + 33) % 64];",
    "initcheck": "data[threadIdx.x] = fresh[threadIdx.x];",
    "synccheck": "if (threadIdx.x % 32 < 16) __syncthreads(); data[threadIdx.x] = 1.0f;",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """One tool over one part, or over its control (part -1)."""

    tool: str
    part: int
    status: int  # 0 clean, FOUND, or what the process or the time limit (124) ended with
    calls: int  # of the matrix, that a kernel served
    summary: str  # the tool's last words
    seconds: float


def matrix() -> Iterator[tuple[str, dict[str, Any]]]:
    """Small calls, by name: each kernel, schedule and option, lengths that no tile divides, both dtypes."""
    half = torch.float16
    for backend in ("portable", "hopper"):
        base: dict[str, Any] = {"backend": backend, "shape": (2, 2, 70, 70, 64), "dtype": half}
        yield f"{backend} plain", base
        yield f"{backend} bf16 causal lse", {**base, "dtype": torch.bfloat16, "is_causal": True, "return_lse": True}
        yield f"{backend} D=128, more keys", {**base, "shape": (1, 2, 33, 200, 128)}
        yield f"{backend} D=32, one row", {**base, "shape": (1, 2, 1, 64, 32)}
        yield f"{backend} window, soft cap", {**base, "window": (20, 5), "softcap": 5.0}
        yield f"{backend} bool mask", {**base, "attn_mask": torch.bool}
        yield f"{backend} bias", {**base, "attn_mask": half, "is_causal": True}
        yield f"{backend} seqused_k", {**base, "seqused_k": True}
        yield f"{backend} packed", {**base, "packed": True, "is_causal": True}
        yield f"{backend} packed, window, lse", {**base, "packed": True, "window": (9, -1), "return_lse": True}
        yield f"{backend} negative scale", {**base, "scale": -0.3}
        yield f"{backend} many tiles", {**base, "shape": (16, 8, 300, 300, 64)}
        yield f"{backend} many causal tiles", {**base, "shape": (16, 8, 300, 300, 64), "is_causal": True}
    yield "portable D=80", {"backend": "portable", "shape": (1, 2, 70, 70, 80), "dtype": half}
    yield "portable D=256", {"backend": "portable", "shape": (1, 2, 70, 70, 256), "dtype": half}
    yield "portable rows of any alignment", {
        "backend": "portable", "shape": (1, 2, 70, 70, 24), "dtype": half, "layout": "odd_rows"
    }  # fmt: skip


def call(options: dict[str, Any], device: str) -> None:
    """Run one entry of the matrix twice and wait for it.

    Raises:
        UnsupportedError: the kernel does not serve it here.
    """
    from flashcore.fast.attention_production import attention
    from flashcore.fast.varlen import attention_varlen
    from flashcore.testing import lay_out

    given = dict(options)
    b, h, sq, sk, d = given.pop("shape")
    dtype, layout = given.pop("dtype"), given.pop("layout", "contiguous")
    packed = given.pop("packed", False)
    generator = torch.Generator(device).manual_seed(0)

    def tensor(rows: int) -> torch.Tensor:
        shape = (b * rows, h, d) if packed else (b, h, rows, d)
        made = torch.randn(shape, generator=generator, device=device).to(dtype)
        return made if layout == "contiguous" else lay_out(made, layout)

    q, k, v = tensor(sq), tensor(sk), tensor(sk)
    if given.get("attn_mask") is torch.bool:
        given["attn_mask"] = torch.rand(b, 1, sq, 80, device=device)[..., :sk] > 0.3
    elif "attn_mask" in given:
        given["attn_mask"] = torch.randn(1, h, sq, 80, device=device).to(given["attn_mask"])[..., :sk]
    if given.pop("seqused_k", False):
        given["seqused_k"] = torch.randint(0, sk + 1, (b,), device=device, dtype=torch.int32)
    for _ in range(2):
        if packed:
            cu = [torch.arange(0, (b + 1) * rows, rows, device=device, dtype=torch.int32) for rows in (sq, sk)]
            attention_varlen(q, k, v, cu[0], cu[1], sq, sk, **given)
        else:
            attention(q, k, v, **given)
    if device != "cpu":
        torch.cuda.synchronize()


def work(part: int, device: str) -> int:
    """Run every PARTS-th entry of the matrix. Nothing of torch's own runs but making the inputs."""
    done = 0
    for number, (name, options) in enumerate(matrix()):
        if number % PARTS != part:
            continue
        try:
            call(options, device)
            done += 1
        except UnsupportedError as refusal:
            print(f"{name}: refused: {refusal}")
    print(f"part {part}: {done} calls")
    return 0


def plant(tool: str) -> int:
    """Launch the tool's control."""
    body = CONTROLS[tool]
    source = f'extern "C" __global__ void fault(float* data, float* fresh) {{ {body} }}'
    kernel: Any = torch.cuda._compile_kernel(source, "fault")
    data, fresh = torch.zeros(64, device="cuda"), torch.empty(64, device="cuda")
    kernel((1, 1, 1), (64, 1, 1), [data, fresh])
    torch.cuda.synchronize()
    return 0


def sanitizer() -> str | None:
    """compute-sanitizer on the path, in the toolkit's usual place, or of its wheel."""
    wheel = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    toolkit = Path("/usr/local/cuda/bin/compute-sanitizer")
    places = [*sorted(wheel.glob("**/compute-sanitizer/compute-sanitizer")), toolkit]
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.exists()), None)


def run(program: str, tool: str, part: int, limit_s: float) -> Outcome:
    """One tool over a part of the matrix, or over its control."""
    module = [sys.executable, "-m", "flashcore.security.sanitize"]
    inner = [*module, "--part", str(part)] if part >= 0 else [*module, "--control", tool]
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    if part >= 0 and tool in ("racecheck", "synccheck"):  # initcheck has to see who else writes
        command += ["--kernel-name", "kns=attention"]
    began = time.monotonic()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run([*command, *inner], capture_output=True, text=True, timeout=limit_s, env=environment)
        status, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        status, said = 124, f"no end within {limit_s:.0f} s"
    calls = re.search(rf"^part {part}: (\d+) calls", said, re.MULTILINE)
    seconds = round(time.monotonic() - began, 1)
    return Outcome(tool, part, status, int(calls[1]) if calls else 0, _summary(said), seconds)


def _summary(said: str) -> str:
    """What the tool found first and how it ended."""
    lines = [line.replace("=", "").strip() for line in said.splitlines() if line.startswith("=========")]
    lines = [line for line in lines if line and line != "COMPUTE-SANITIZER"]
    rest = [line.strip() for line in said.splitlines() if line.strip()]
    told = " / ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or (rest[-1] if rest else "no output")
    return told[:300]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a tool found something, or not its control; 2 without compute-sanitizer."""
    parser = record.parser("sanitize", "compute-sanitizer over every kernel and option. Needs a GPU.")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="processes at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=150.0, metavar="T", help="for each process (%(default)s)")
    parser.add_argument("--part", type=int, help="run a part of the matrix in this process, without a tool")
    parser.add_argument("--control", choices=TOOLS, help="run a tool's control in this process")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.part is not None:
        return work(options.part, device)
    if options.control:
        return plant(options.control)
    program = sanitizer()
    if program is None:
        print("flashcore audit sanitize: compute-sanitizer is not installed", file=sys.stderr)
        return 2
    began = time.monotonic()
    asked = [(tool, part) for part in (-1, *range(PARTS)) for tool in options.tools]
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda each: run(program, each[0], each[1], options.seconds), asked))
    for o in outcomes:
        what = "control" if o.part < 0 else f"part {o.part}"
        print(f"  {o.tool:10} {what:8} {o.status:4} {o.seconds:6.1f} s {o.calls:3} calls  {o.summary}")
    rows = [_row(tool, [o for o in outcomes if o.tool == tool]) for tool in options.tools]
    return record.finish(
        "sanitize", rows, options.json, arguments=argv, seconds=time.monotonic() - began,
        complete=set(options.tools) == set(TOOLS), outcomes=[asdict(o) for o in outcomes],
        matrix=[name for name, _ in matrix()],
    )  # fmt: skip


def _row(tool: str, outcomes: Sequence[Outcome]) -> record.Row:
    parts = [o for o in outcomes if o.part >= 0]
    planted = [o for o in outcomes if o.part < 0]
    clean, caught = [o.status == 0 for o in parts], all(o.status == FOUND for o in planted)
    return record.Row(
        f"{tool} finds nothing in any kernel or option",
        f"{sum(o.calls for o in parts)} calls in {len(parts)} parts, {sum(clean)} of them clean",
        f"a kernel with a fault for it: {'found' if caught else 'not found'}",
        all(clean) and all(o.calls for o in parts) and bool(planted) and caught,
    )


if __name__ == "__main__":
    sys.exit(main())
