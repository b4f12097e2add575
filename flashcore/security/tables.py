"""`flashcore audit tables`: hostile tuning tables, and many processes that start at once on shared caches.

A table is read from a folder that somebody else may have filled. Whatever lies there, a call of attention gets a
configuration of the allow-list, or a rule's: nothing raises, nothing waits, nothing else is chosen. The control reads
the same files as a program without care would.

Cold starts: processes that know nothing yet read and change one table and compile into one cache, all at once. The
control writes in place.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import H100
from flashcore.launch import select
from flashcore.security import record
from flashcore.tuning import lookup

ARCH = H100.arch
NAME = f"sm{ARCH}.json"
STRANGER = 54_321  # a user who is not this one
PATIENCE_S = 10


class _Waited(BaseException):
    """Reading a file took longer than PATIENCE_S: no Exception, so that nobody swallows it."""


def problem(seqlen: int = 128, dim: int = 64, is_causal: bool = False, batch: int = 8) -> Problem:
    strides = 8 * seqlen * dim, seqlen * dim, dim
    return Problem(
        torch.float16, batch, 8, 8, seqlen, seqlen, dim, dim, strides, strides, strides, strides, is_causal=is_causal
    )


PROBLEMS = (problem(), problem(512), problem(197, is_causal=True), problem(1024, 128, batch=1))


def good_row(**change: Any) -> dict[str, Any]:
    """A row that is taken: its configuration is on the allow-list of its problem."""
    asked = PROBLEMS[0]
    made = asdict(lookup.row(asked, select.candidates(asked, H100)[-1], 3.5, H100.name, "0123abc"))
    return {**made, **change}


# -- hostile files ------------------------------------------------------------------------------------------------

Maker = Callable[[random.Random, Path], None]
WRONG_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 2**31, 10**40, 1.5, 1e308, -0.0, "", "64", "x" * 5000, "\x00", "../../etc", [], [64], {},
    {"a": 1}, "__import__('os')", "portable; rm", "\ud83d\ude00",
)  # fmt: skip


def _document(rng: random.Random) -> dict[str, Any]:
    lengths = (32, 128, 512)
    rows = [good_row(seqlen_q=rng.choice(lengths), seqlen_k=rng.choice(lengths)) for _ in range(rng.randint(1, 4))]
    return {"format": lookup.FORMAT, "arch": ARCH, "rows": rows}


def _text(rng: random.Random) -> str:
    return json.dumps(_document(rng))


def _truncated(rng: random.Random, path: Path) -> None:
    text = _text(rng)
    path.write_text(text[: rng.randrange(len(text))])


def _flipped(rng: random.Random, path: Path) -> None:
    content = bytearray(_text(rng).encode())
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def _random_bytes(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(600)))


def _deep(rng: random.Random, path: Path) -> None:
    depth = rng.choice((100, 2_000, 200_000))
    opening, closing = rng.choice((("[", "]"), ('{"rows":', "}")))
    path.write_text(opening * depth + "1" + closing * depth)


def _deep_value(rng: random.Random, path: Path) -> None:
    path.write_text(_text(rng).replace("3.5", "[" * 3000 + "]" * 3000, 1))


def _huge_int(rng: random.Random, path: Path) -> None:
    number = rng.choice(("9" * 30, "9" * 4_000, "9" * 100_000, "-" + "9" * 30, "1e999", "1" + "0" * 309 + ".5"))
    field = rng.choice(("block_m", "num_warps", "heads", "us", "maxnreg"))
    document = _document(rng)
    document["rows"][0][field] = "HERE"
    path.write_text(json.dumps(document).replace('"HERE"', number))


def _wrong_type(rng: random.Random, path: Path) -> None:
    document = _document(rng)
    row = rng.choice(document["rows"])
    for field in rng.sample(list(row), rng.randint(1, 3)):
        row[field] = rng.choice(WRONG_VALUES)
    path.write_text(json.dumps(document))


def _wrong_head(rng: random.Random, path: Path) -> None:
    document = _document(rng)
    document[rng.choice(list(document))] = rng.choice(WRONG_VALUES)
    path.write_text(json.dumps(document))


def _not_a_number(rng: random.Random, path: Path) -> None:
    document = _document(rng)
    document["rows"][0][rng.choice(("us", "block_m", "heads"))] = "HERE"
    path.write_text(json.dumps(document).replace('"HERE"', rng.choice(("NaN", "Infinity", "-Infinity"))))


def _duplicate(rng: random.Random, path: Path) -> None:
    field = rng.choice(("block_m", "kernel", "us", "num_warps"))
    again = f'"{field}": {json.dumps(good_row()[field])}, "{field}"'
    path.write_text(_text(rng).replace(f'"{field}"', again, 1))


def _duplicate_head(rng: random.Random, path: Path) -> None:
    path.write_text(_text(rng).replace('"format"', '"rows": [], "format"', 1))


def _fields(rng: random.Random, path: Path) -> None:
    document = _document(rng)
    row = document["rows"][-1]
    if rng.random() < 0.5:
        row[rng.choice(("run", "__class__", "config", "Block_M"))] = rng.choice(WRONG_VALUES)
    else:
        del row[rng.choice(list(row))]
    path.write_text(json.dumps(document))


def _off_the_list(rng: random.Random, path: Path) -> None:
    """Of the right types, and names a configuration that FlashCore never runs."""
    document = _document(rng)
    for row in document["rows"]:
        row.update(rng.choice((
            {"block_m": rng.choice((1, 8, 48, 96, 256, 4096))}, {"block_n": rng.choice((1, 7, 48, 2**30))},
            {"num_warps": rng.choice((1, 3, 64, 2**20))}, {"num_stages": rng.choice((7, 99))},
            {"kernel": rng.choice(("reference", "hopper2", "os.system", ""))}, {"schedule": "persistent!"},
            {"maxnreg": rng.choice((1, 8, 512))}, {"head_dim": 2**30, "num_warps": 16},
            {"kernel": "hopper", "maxnreg": 24},
        )))  # fmt: skip
    path.write_text(json.dumps(document))


def _not_utf8(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.choice((
        _text(rng).encode("utf-16"), _text(rng).encode("utf-8-sig"), b"\xff\xfe" + _text(rng).encode(),
        _text(rng).replace("0123abc", "\udc80").encode("utf-8", "surrogatepass"),
        _text(rng).encode("utf-32"),
    )))  # fmt: skip


def _large(rng: random.Random, path: Path) -> None:
    with path.open("wb") as file:
        file.write(_text(rng).encode())
        file.truncate(lookup.MAX_BYTES + rng.choice((1, 10, 2**22)))  # sparse: takes no room on the disk


def _link(rng: random.Random, path: Path) -> None:
    aim = path.parent / "elsewhere.json"
    aim.write_text(_text(rng))
    path.symlink_to(rng.choice((aim, path, Path("/dev/zero"), Path("/nowhere"), path.parent)))


def _fifo(rng: random.Random, path: Path) -> None:
    os.mkfifo(path)


def _directory(rng: random.Random, path: Path) -> None:
    path.mkdir()


def _socket(rng: random.Random, path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # a socket's own name may be 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def _writable(rng: random.Random, path: Path) -> None:
    path.write_text(_text(rng))
    path.chmod(rng.choice((0o666, 0o622, 0o777, 0o646)))


def _of_a_stranger(rng: random.Random, path: Path) -> None:
    path.write_text(_text(rng))
    os.chown(path, STRANGER, -1)


KINDS: dict[str, Maker] = {
    "truncated": _truncated, "bytes changed": _flipped, "random bytes": _random_bytes, "deep": _deep,
    "a deep value": _deep_value, "a huge number": _huge_int, "wrong types": _wrong_type, "a wrong head": _wrong_head,
    "not a number": _not_a_number, "a name twice": _duplicate, "rows twice": _duplicate_head,
    "other fields": _fields, "off the list": _off_the_list, "not UTF-8": _not_utf8, "too large": _large,
    "a link": _link, "a pipe": _fifo, "a folder": _directory, "a socket": _socket, "writable by others": _writable,
    "a stranger's": _of_a_stranger,
}  # fmt: skip
NEVER_TAKEN = (  # kinds of which no file may count, whatever was drawn
    "truncated", "random bytes", "deep", "a deep value", "a name twice", "rows twice", "not a number", "off the list",
    "too large", "a link", "a pipe", "a folder", "a socket", "writable by others", "a stranger's",
)  # fmt: skip


def kinds() -> list[str]:
    """The kinds that this user can make: only root can give a file away."""
    return [kind for kind in KINDS if kind != "a stranger's" or os.geteuid() == 0]


@contextlib.contextmanager
def tables_in(folder: Path) -> Iterator[None]:
    """Let `select` read its tables from this folder, as if it had never read one."""

    def forget() -> None:
        lookup.table.cache_clear()
        select._rows.cache_clear()

    before, lookup.TABLES = lookup.TABLES, folder
    forget()
    try:
        yield
    finally:
        lookup.TABLES = before
        forget()


def choices(folder: Path) -> list[tuple[Problem, Config]]:
    """What attention would run with the tables in `folder`."""
    with tables_in(folder):
        return [(p, select.select(p, H100)) for p in PROBLEMS]


def careless(folder: Path) -> list[tuple[Problem, Config]]:
    """The same by a program that trusts what it finds: the control."""
    document = json.loads((folder / NAME).read_text())
    rows = [lookup.Row(**entry) for entry in document["rows"]]
    found = [(p, lookup.nearest(p, rows)) for p in PROBLEMS]
    return [(p, row.config) for p, row in found if row is not None]


def hostile(
    count: int, seed: int = 0, read: Callable[[Path], list[tuple[Problem, Config]]] = choices,
    patience_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """Make `count` hostile files, one after the other, and choose configurations with each of them there.

    Returns:
        files by kind; crashes: what raised or waited, by kind and exception; off_the_list: configurations that the
        allow-list does not hold; taken: rows that counted, of kinds of which none may.
    """
    rng = random.Random(seed)
    names = kinds()
    files: Counter[str] = Counter()
    crashes: Counter[str] = Counter()
    off = taken = 0
    allowed = {p: set(select.candidates(p, H100)) for p in PROBLEMS}
    with tempfile.TemporaryDirectory() as top, _alarm():
        for number in range(count):
            kind = names[number % len(names)]
            folder = Path(top) / str(number)
            folder.mkdir()
            KINDS[kind](rng, folder / NAME)
            files[kind] += 1
            try:
                with warnings.catch_warnings(), _patience(patience_s):
                    warnings.simplefilter("ignore")
                    off += sum(config not in allowed[p] for p, config in read(folder))
                    if kind in NEVER_TAKEN and read is choices:
                        with tables_in(folder):
                            taken += sum(map(len, select._rows(H100).values()))
            except (Exception, _Waited) as error:
                crashes[f"{kind}: {type(error).__name__}"] += 1
            _remove(folder)
    return {"files": dict(files), "crashes": dict(crashes), "off_the_list": off, "taken": taken}


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise _Waited

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()  # what an alarm raises in a callback of the collector's is lost
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if collects:
            gc.enable()


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()


# -- cold starts --------------------------------------------------------------------------------------------------

ROWS = 40  # of the shared table: enough bytes that a reader can come upon half of them


def cold_starts(
    processes: int, rounds: int, *, wipe_every: int = 20, compiling: bool = True, in_place: bool = False
) -> dict[str, Any]:
    """`processes` children at once, `rounds` times: each reads the table, adds 1 to every row of it, and compiles.

    A child is a fork of a process that has only imported: its caches are empty. Every `wipe_every` rounds the compile
    cache starts empty. `in_place`: the control, which overwrites the table without a lock.

    Returns:
        starts; torn: tables that a reader found broken or mixed; lost: additions that are not in the last table;
        wrong_code: kernels that differ from the first one compiled; failures: what children raised.
    """
    from flashcore.launch import compiled, launcher  # before the forks: an import is not what is tested

    torch.set_num_threads(1)  # a fork of a process with a thread pool may hang in it
    asked = PROBLEMS[0]
    config = next(c for c in select.candidates(asked, H100) if c.kernel == "portable")
    binding = launcher.bind(asked, config, 0.125, H100)
    context = get_context("fork")
    found: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / NAME
        base = lookup.Row(**good_row(heads=1))
        lookup.write(path, ARCH, [base] * ROWS)
        try:
            os.environ["TRITON_CACHE_DIR"] = str(folder / "wanted")
            want = hashlib.sha256(compiled.compile_for(binding, ARCH).cubin).hexdigest() if compiling else ""

            def start(gate: Any, answers: Any) -> None:
                said = Counter[str]()
                failed = ""
                try:
                    gate.wait(120)
                    said["torn"] += not whole(lookup.read(path, ARCH))
                    add(path, in_place)
                    if compiling:
                        got = hashlib.sha256(compiled.compile_for(binding, ARCH).cubin).hexdigest()
                        said["wrong_code"] += got != want
                    said["torn"] += not whole(lookup.read(path, ARCH))
                except BaseException as error:
                    failed = f"{type(error).__name__}: {error}"[:200]
                answers.put((dict(said), failed))

            for number in range(rounds):
                os.environ["TRITON_CACHE_DIR"] = str(folder / f"cache{number // wipe_every}")
                gate, answers = context.Barrier(processes), context.Queue()
                with warnings.catch_warnings():
                    # a broken table warns; Python warns of a fork beside threads, of which these processes use none
                    warnings.simplefilter("ignore")
                    children = [context.Process(target=start, args=(gate, answers)) for _ in range(processes)]
                    for child in children:
                        child.start()
                for _ in children:
                    said, failed = answers.get(timeout=300)
                    found.update(said)
                    if failed:
                        failures[failed] += 1
                for child in children:
                    child.join()
                found["starts"] += processes
            rows = lookup.read(path, ARCH) if not in_place else ()
        finally:
            os.environ.pop("TRITON_CACHE_DIR", None)
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
    lost = 1 + found["starts"] - rows[0].heads if whole(rows) else found["starts"]
    return {
        "starts": found["starts"], "torn": found["torn"], "lost": lost, "wrong_code": found["wrong_code"],
        "failures": dict(failures),
    }  # fmt: skip


def whole(rows: tuple[lookup.Row, ...]) -> bool:
    """Whether a table is one that somebody wrote: all rows there, and of one writer."""
    return len(rows) == ROWS and len(set(rows)) == 1


def add(path: Path, in_place: bool) -> None:
    """Add 1 to each row."""

    def change(rows: tuple[lookup.Row, ...]) -> list[lookup.Row]:
        return [replace(row, heads=row.heads + 1) for row in rows]

    if in_place:
        path.write_text(lookup._text(ARCH, change(lookup.read(path, ARCH))))
    else:
        lookup.update(path, ARCH, change)


# -- the command --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 when a claim failed or a control held."""
    parser = record.parser("tables", "Hostile tuning tables, and processes that start at once. Needs no GPU.")
    parser.add_argument("--files", type=int, default=10_000, metavar="N", help="hostile files (%(default)s)")
    parser.add_argument("--processes", type=int, default=32, metavar="N", help="that start at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="of starts (%(default)s)")
    options = parser.parse_args(argv)
    began = time.monotonic()
    files = hostile(options.files, options.seed)
    control = hostile(len(kinds()) * 10, options.seed, careless, patience_s=0.2)
    starts = cold_starts(options.processes, options.rounds)
    careful = cold_starts(options.processes, 3, compiling=False, in_place=True)
    crashes, control_crashes = (sum(each["crashes"].values()) for each in (files, control))
    bad = starts["torn"] + starts["lost"] + starts["wrong_code"] + sum(starts["failures"].values())
    rows = [
        record.Row(
            "A hostile tuning table crashes nothing and chooses nothing that is off the allow-list",
            f"{options.files:,} files of {len(files['files'])} kinds: {crashes} crashes, {files['off_the_list']}"
            f" configurations off the list, {files['taken']} rows taken from files that must not count",
            f"a reader without care: {control_crashes} crashes, {control['off_the_list']} configurations off the list",
            not crashes and not files["off_the_list"] and not files["taken"]
            and control_crashes > 0 and control["off_the_list"] > 0,
        ),
        record.Row(
            "Processes that start at once read whole tables and whole kernels, and lose no change",
            f"{starts['starts']:,} starts of {options.processes} at once: {starts['torn']} torn reads,"
            f" {starts['lost']} changes lost, {starts['wrong_code']} kernels that differ,"
            f" {sum(starts['failures'].values())} failures",
            f"writing in place: {careful['torn']} torn reads in {careful['starts']} starts",
            not bad and careful["torn"] > 0,
        ),
    ]  # fmt: skip
    complete = options.files >= 10_000 and options.processes * options.rounds >= 3_200
    return record.finish(
        "tables", rows, options.json, arguments=argv, seconds=time.monotonic() - began, gpu=False, complete=complete,
        hostile=files, hostile_control=control, cold_starts=starts, cold_starts_control=careful,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
