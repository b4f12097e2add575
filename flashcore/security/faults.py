"""`flashcore audit faults`: what happens when something fails, and when a call makes no sense. Needs no GPU.

Calls go to a GPU made of ctypes (fake_gpu.py) by both launch paths, so that everything up to the driver's call is the
shipped code, and whatever a GPU may refuse can be made to fail. After each fault the next call must be right; what was
refused has launched nothing and written nothing; what was raised is documented. Then random argument sets: each is
launched only if the rules, written down once more in arguments_drawn.py, call it a problem.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flashcore import reference
from flashcore.core.target import A100, H100
from flashcore.fast.attention_production import attention
from flashcore.launch import compiled, driver, launcher, packet, select, shim
from flashcore.security import arguments_drawn, fake_gpu, record, tables
from flashcore.tuning import lookup

DOCUMENTED = (TypeError, ValueError, RuntimeError)  # UnsupportedError is a RuntimeError
_REAL: dict[str, Any] = {"shim": shim.load, "start": shim.start, "compile": compiled.compile_for, "load": driver.load}


class Broken(AssertionError):
    """A promise that a fault broke."""


class Scene:
    """The fake GPU, and what every fault looks at before and after."""

    def __init__(self, gpu: fake_gpu.FakeGpu, rng: random.Random, folder: Path) -> None:
        self.gpu, self.rng, self.folder = gpu, rng, folder
        self.right: list[tuple[Any, dict[str, Any], Any]] = []
        kinds: tuple[dict[str, Any], ...] = ({}, {"is_causal": True}, {"return_lse": True})
        for i, options in enumerate(kinds):
            tensors = self.qkv(2, 2, 24 + 8 * i, 16)
            self.right.append((tensors, options, reference.cpu(*tensors, is_causal="is_causal" in options)))

    def qkv(self, *shape: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
        seed = self.rng.getrandbits(31)
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        return q, k, v

    def unseen(self) -> tuple[Any, dict[str, Any]]:
        """A call that nothing is known of yet."""
        length = self.rng.randint(1, 40)
        return self.qkv(1, self.rng.randint(1, 3), length, 8), {"scale": self.rng.random() + 0.01}

    def works(self) -> None:
        """Calls that were fine before are right, also into tensors of the caller's."""
        tensors, options, want = self.rng.choice(self.right)
        out = torch.full_like(tensors[0], float("nan")) if self.rng.random() < 0.3 else None
        got = attention(*tensors, **options, out=out)
        got = got[0] if isinstance(got, tuple) else got
        if not torch.equal(got, want) or (out is not None and got is not out):
            raise Broken("the next call is wrong")

    def refuses(self, call: Callable[[], Any], *documented: type[BaseException], out: Tensor | None = None) -> None:
        """`call` raises what is documented, launches nothing and leaves `out` alone."""
        launches = len(self.gpu.launches)
        before = None if out is None else out.clone()
        try:
            call()
        except BaseException as error:
            if isinstance(error, documented or DOCUMENTED):
                return self._nothing_happened(launches, out, before)
            raise Broken(f"raised {type(error).__name__}: {error}") from error
        raise Broken("nothing was raised")

    def _nothing_happened(self, launches: int, out: Tensor | None, before: Tensor | None) -> None:
        if len(self.gpu.launches) != launches:
            raise Broken("it launched")
        if out is not None and before is not None and not torch.equal(out.nan_to_num(7.0), before.nan_to_num(7.0)):
            raise Broken("out was written")

    @contextlib.contextmanager
    def failing(self, what: str, error: BaseException) -> Iterator[None]:
        self.gpu.failing[what] = error
        try:
            yield
        finally:
            del self.gpu.failing[what]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b)


def _child(work: Callable[[], None]) -> int:
    """The wait status of a fork that does `work`; its exit status is 1 where that raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads beside a fork: the child does little and leaves
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


# -- the faults ---------------------------------------------------------------------------------------------------


def out_of_memory(s: Scene) -> None:
    """No memory for the output of a call seen before, or of a new one."""
    tensors, options, _ = s.rng.choice(s.right)
    if s.rng.random() < 0.5:
        tensors, options = s.unseen()
    with s.failing("empty", torch.OutOfMemoryError("CUDA out of memory")):
        s.refuses(lambda: attention(*tensors, **options), torch.OutOfMemoryError)


def out_of_memory_for_lse(s: Scene) -> None:
    """The output has its memory, the lse does not."""
    tensors, _ = s.unseen()
    out = torch.full_like(tensors[0], float("nan"))
    attention(*tensors, return_lse=True)
    with s.failing("empty", torch.OutOfMemoryError("CUDA out of memory")):
        s.refuses(lambda: attention(*tensors, return_lse=True, out=out), torch.OutOfMemoryError, out=out)


def bad_arguments(s: Scene) -> None:
    q, k, v = s.qkv(2, 2, 24, 16)
    out = torch.full_like(q, float("nan"))
    options: dict[str, Any] = {}
    wrong = s.rng.randrange(8)
    if wrong == 0:
        k = k[..., :8]
    elif wrong == 1:
        v = v.bfloat16()
    elif wrong == 2:
        q = q.mT.contiguous().mT
    elif wrong == 3:
        options["block_m"] = 48
    elif wrong == 4:
        options["scale"] = float("nan")
    elif wrong == 5:
        k, v = k[:1], v[:1]
    elif wrong == 6:
        options["attn_mask"] = torch.ones(24, 23, dtype=torch.bool)
    else:
        q, k, v = q.double(), k.double(), v.double()
        out = out.double()
    s.refuses(lambda: attention(q, k, v, out=out, **options), out=out)


def another_device(s: Scene) -> None:
    tensors = dict(zip("qkv", s.qkv(2, 2, 24, 16), strict=True))
    out = torch.full_like(tensors["q"], float("nan"))
    name = s.rng.choice(("k", "v", "out", "attn_mask", "seqused_k"))
    made = {
        "out": out, "attn_mask": torch.ones(24, 24, dtype=torch.bool), "seqused_k": torch.ones(2, dtype=torch.int32),
        **tensors,
    }[name]  # fmt: skip
    given: dict[str, Any] = {**tensors, "out": out, name: made.to("meta")}
    s.refuses(lambda: attention(**given), ValueError, out=out)


def hostile_table(s: Scene) -> None:
    """A tuning table as tables.py makes them, before a call that has to choose."""
    folder = Path(tempfile.mkdtemp(dir=s.folder))
    tables.KINDS[s.rng.choice(tables.kinds())](s.rng, folder / f"sm{A100.arch}.json")
    tensors, options = s.unseen()
    with tables.tables_in(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tuning table", RuntimeWarning)
        got = attention(*tensors, **options)
    if not _equal(got, reference.cpu(*tensors, **options)):
        raise Broken("wrong beside a hostile table")


def compiler_fails(s: Scene) -> None:
    tensors, _ = s.unseen()
    packet._loaded.clear()
    launcher.forget()
    with s.failing("compile", RuntimeError("compiling attention for sm_80: ptxas died")):
        s.refuses(lambda: attention(*tensors))


def interrupted(s: Scene) -> None:
    """Ctrl-C while a kernel is compiled or loaded."""
    tensors, _ = s.unseen()
    packet._loaded.clear()
    launcher.forget()
    with s.failing(s.rng.choice(("compile", "load")), KeyboardInterrupt()):
        s.refuses(lambda: attention(*tensors), KeyboardInterrupt)


def compiler_is_missing(s: Scene) -> None:
    """What Triton starts is not there, or dies: compile_for says so as documented."""
    error = s.rng.choice((
        FileNotFoundError("ptxas"), PermissionError("ptxas"), OSError(28, "No space left on device"), KeyError("cubin"),
        AssertionError("an assertion of the compiler"),
    ))  # fmt: skip

    def dies(*_: Any) -> None:
        raise error

    with mock.patch.object(compiled, "_compile", dies):
        s.refuses(lambda: _REAL["compile"](_a_kernel(), H100.arch), RuntimeError)


def no_shim(s: Scene) -> None:
    """The C compiler fails while the launch path is built: it warns, and Python serves."""
    tensors, options = s.unseen()

    def dies() -> None:
        raise s.rng.choice((RuntimeError("gcc died"), FileNotFoundError("gcc"), OSError(28, "No space left")))

    with mock.patch.multiple(
        shim, _module=None, _failure=None, _building=None, attend=None, _build=dies, load=_REAL["shim"],
        start=_REAL["start"],
    ):  # fmt: skip
        if s.rng.random() < 0.5:  # it is built beside a kernel
            packet._loaded.clear()
        launcher.forget()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flashcore: the compiled launch path is off", RuntimeWarning)
            for _ in range(2):
                if not _equal(attention(*tensors, **options), reference.cpu(*tensors, **options)):
                    raise Broken("wrong without the shim")
    launcher.forget()


def loading_fails(s: Scene) -> None:
    tensors, _ = s.unseen()
    packet._loaded.clear()
    launcher.forget()
    with s.failing("load", driver.CudaError("loading attention: out of memory (CUresult 2)")):
        s.refuses(lambda: attention(*tensors), RuntimeError)


def launching_fails(s: Scene) -> None:
    """The driver refuses a launch, of a call seen before or of a new one."""
    tensors, options, _ = s.rng.choice(s.right)
    if s.rng.random() < 0.5:
        tensors, options = s.unseen()
    s.gpu.status = s.rng.choice((1, 2, 200, 400, 700, 701, 715, 716, 717, 718, 719, 999))
    try:
        s.refuses(lambda: attention(*tensors, **options), RuntimeError)
    finally:
        s.gpu.status = 0


def cold_in_capture(s: Scene) -> None:
    """A call that would have to compile, while a CUDA graph is captured."""
    tensors, _ = s.unseen()
    packet._loaded.clear()
    launcher.forget()
    s.gpu.capturing = True
    try:
        s.refuses(lambda: attention(*tensors), RuntimeError)
    finally:
        s.gpu.capturing = False


def full_disk(s: Scene) -> None:
    """No room for a table or a record: OSError, the old file is whole, and nothing is left beside it."""
    folder = Path(tempfile.mkdtemp(dir=s.folder))
    path = folder / f"sm{A100.arch}.json"
    rows = [lookup.Row(**tables.good_row())] * 20
    lookup.write(path, A100.arch, rows)
    room = s.rng.randrange(lookup._text(A100.arch, rows * 2).__len__())

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        writes: tuple[Callable[[], None], ...] = (
            lambda: lookup.write(path, A100.arch, rows * 2), lambda: record.write(path, {"rows": ["x" * 40_000]})
        )
        for write in writes:
            with contextlib.suppress(OSError):
                write()
                raise Broken("a full disk went unnoticed")

    if _child(work):
        raise Broken("a full disk was not reported as OSError")
    if lookup.read(path, A100.arch) != tuple(rows) or len(list(folder.iterdir())) != 1:
        raise Broken("a full disk left a broken table, or something beside it")


def killed(s: Scene) -> None:
    """The process is killed at some moment of writing a table: readers find the old one or the new one."""
    folder = Path(tempfile.mkdtemp(dir=s.folder))
    path = folder / f"sm{A100.arch}.json"
    row = lookup.Row(**tables.good_row())
    versions = [tuple([replace(row, heads=h)] * 20) for h in (1, 2)]
    lookup.write(path, A100.arch, versions[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        try:
            while True:
                for version in versions:
                    lookup.write(path, A100.arch, version)
        finally:
            os._exit(0)
    time.sleep(s.rng.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if lookup.read(path, A100.arch) not in versions:
            raise Broken("a killed writer left a mixed table")
    lookup.write(path, A100.arch, versions[1])  # and its lock went with it
    if lookup.read(path, A100.arch) != versions[1]:
        raise Broken("nobody can write after a killed writer")


def damaged_compile_cache(s: Scene) -> None:
    """Files of Triton's cache cut off, emptied, overwritten, deleted: the kernel is compiled again and loads."""
    folder = _compiled_once(s) / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.parent / "good", folder)
    for file in folder.rglob("__grp__*"):  # the group names its files by their full paths
        file.write_text(file.read_text().replace(str(folder.parent / "good"), str(folder)))
    files = [f for f in folder.rglob("*") if f.suffix in (".json", ".cubin", ".ptx")]
    wanted = hashlib.sha256(next(f for f in files if f.suffix == ".cubin").read_bytes()).hexdigest()
    for file in s.rng.sample(files, s.rng.randint(1, len(files))):
        content = file.read_bytes()
        damage = s.rng.randrange(4)
        if damage == 0:
            file.write_bytes(content[: s.rng.randrange(len(content))])
        elif damage == 1:
            file.write_bytes(s.rng.randbytes(len(content)))
        elif damage == 2:
            file.unlink()
        else:
            file.write_bytes(b"")

    def load(image: bytes, *_: Any, **__: Any) -> driver.Loaded:
        if hashlib.sha256(image).hexdigest() != wanted:  # as the driver finds of an image that was cut off
            raise driver.CudaError("loading attention: device kernel image is invalid (CUresult 200)")
        return driver.Loaded(1, fake_gpu.CONTEXT, 128, 0)

    with (
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(folder)}),
        mock.patch.multiple(compiled, compile_for=_REAL["compile"]),
        mock.patch.multiple(driver, load=load, parameters=lambda function: None),
        mock.patch.object(compiled, "runner", lambda made: None),
        mock.patch.object(packet, "_loaded", {}),
    ):
        packet.load(_a_kernel(), 0, H100.arch)
        again = _REAL["compile"](_a_kernel(), H100.arch)
    if hashlib.sha256(again.cubin).hexdigest() != wanted:
        raise Broken("the damage is still there")


def _compiled_once(s: Scene) -> Path:
    top = s.folder / "compiled"
    if not top.exists():
        with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(top / "good")}):
            _REAL["compile"](_a_kernel(), H100.arch)
    return top


def _a_kernel() -> Any:
    from flashcore.launch import portable

    asked = tables.PROBLEMS[0]
    config = next(c for c in select.candidates(asked, H100) if c.kernel == "portable")
    return portable.bind(asked, config, 0.125)


FAULTS: tuple[Callable[[Scene], None], ...] = (
    out_of_memory, out_of_memory_for_lse, bad_arguments, another_device, hostile_table, compiler_fails, interrupted,
    compiler_is_missing, no_shim, loading_fails, launching_fails, cold_in_capture, full_disk, killed,
    damaged_compile_cache,
)  # fmt: skip
# In one of so many rounds alone: these take longest.
RARELY: dict[Callable[[Scene], None], int] = {damaged_compile_cache: 5, killed: 2, full_disk: 2}


def inject(count: int, seed: int, native: Any, faults: Sequence[Callable[[Scene], None]] = FAULTS) -> dict[str, Any]:
    """Let `count` things fail, one after the other, by the compiled shim `native` or, None, by the Python path.

    Returns:
        faults by name; broken: what was promised and not kept, by fault.
    """
    rng = random.Random(seed)
    made: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, fake_gpu.installed(native) as gpu:
        scene = Scene(gpu, rng, Path(name))
        for round in range(count):
            for fault in faults:
                if sum(made.values()) >= count or (round % RARELY.get(fault, 1) and len(faults) > 1):
                    continue
                made[fault.__name__] += 1
                try:
                    fault(scene)
                    scene.works()
                except Exception as error:
                    broken[f"{fault.__name__}: {type(error).__name__}: {error}"[:300]] += 1
                gpu.allocated.clear()
                gpu.launches.clear()
            if sum(made.values()) >= count:
                break
    return {"faults": dict(made), "broken": dict(broken)}


def _deaf(self: Any, prepared: Any) -> None:
    """A launch that nobody asks whether it happened: the control's."""
    self.call(prepared.config, self.function, prepared.parameters, None)


def control(seed: int) -> int:
    """How many faults are noticed in a launch path that swallows the driver's errors."""
    with mock.patch.object(packet.Launch, "launch", _deaf):
        return sum(inject(20, seed, None, [launching_fails])["broken"].values())


def unchecked(count: int, seed: int) -> bool:
    """Whether random arguments are caught breaking a launch path without its checks. It may crash: a fork runs it."""

    def work() -> None:
        with mock.patch("flashcore.fast.attention_production.check", lambda *_: None):
            if arguments_drawn.try_all(count, seed, None)["wrong"]:
                os._exit(3)

    return _child(work) != 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a promise was broken or a control held."""
    parser = record.parser("faults", "Things that fail and calls that make no sense. Needs no GPU.")
    parser.add_argument("--faults", type=int, default=1_000, metavar="N", help="(%(default)s)")
    parser.add_argument("--calls", type=int, default=50_000, metavar="N", help="random argument sets (%(default)s)")
    options = parser.parse_args(argv)
    began = time.monotonic()
    torch.set_num_threads(1)
    with fake_gpu.native() as native:
        paths = {"python": None} if native is None else {"python": None, "shim": native}
        injected = {p: inject(options.faults // len(paths), options.seed, m) for p, m in paths.items()}
        drawn = {p: arguments_drawn.try_all(options.calls // len(paths), options.seed, m) for p, m in paths.items()}
    noticed, caught = control(options.seed), unchecked(2_000, options.seed)
    broken = sum(sum(found["broken"].values()) for found in injected.values())
    count = sum(sum(found["faults"].values()) for found in injected.values())
    calls, launched, wrong = (sum(found[what] for found in drawn.values()) for what in ("calls", "launched", "wrong"))
    rows = [
        record.Row(
            "After a fault the next call is right, nothing is half written, only documented errors are raised",
            f"{count:,} faults of {len(FAULTS)} kinds by the {' and the '.join(paths)} path: {broken} promises broken",
            f"a launch path that swallows the driver's errors: noticed {noticed} times of 20",
            not broken and noticed > 0,
        ),
        record.Row(
            "Nothing that is no attention problem is launched",
            f"{calls:,} random argument sets, {launched:,} of them launched: {wrong} that should not have been, were"
            " wrong, or raised what is not documented",
            f"without the checks: {'caught' if caught else 'not caught'}",
            not wrong and caught,
        ),
    ]
    for found in (*injected.values(), *drawn.values()):
        for text in (*found.get("broken", ()), *found.get("examples", ())):
            print(f"  {text}")
    return record.finish(
        "faults", rows, options.json, arguments=argv, seconds=time.monotonic() - began, gpu=False,
        complete=count >= 1_000 and calls >= 50_000, injected=injected, drawn=drawn,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
