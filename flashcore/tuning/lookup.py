"""Tuning tables: which configuration was measured fastest for which problem.

A table is data, flashcore/tuning/tables/sm<arch>.json, that `flashcore tune` writes and a reviewer reads in a diff,
one row a line. Reading is strict, and nothing in a table is run: a row only points at a configuration, and the caller
takes it only if its own allow-list holds the same one. A file that others could have written, or that a link names,
is not read at all. Whoever writes holds a lock and replaces the whole file, so that a reader sees the old table or the
new one, also when the writer is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flashcore.core.config import Config
from flashcore.core.problem import Problem

TABLES = Path(__file__).parent / "tables"
FORMAT = 1
MAX_BYTES = 1 << 20  # a table of some hundred rows has about 100 KB
MAX_TEXT = 200  # characters of a name in a row, and of a message
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# From so many heads in a batch on, every GPU has many waves of tiles, whose keys do not stay in its L2, and more of
# them change no choice.
MANY_HEADS = 2048
# A row speaks for problems within these factors of its lengths and heads, and of its head dimension.
REACH = 4.0
REACH_HEAD_DIM = 1.5
# Keys past the end are hidden by code that costs registers, and tiles that hold some are work for nothing: as far as
# another length. A tile of 128 keys can be so where one of 64 is not.
UNEVEN = 4.0
HALF = 2.0
# Rows that end in half a sector of the L2, or lie across its lines, cost TMA more requests, which tiles of more rows
# make up for.
REQUESTS = 4.0


@dataclass(frozen=True, slots=True)
class Row:
    """A problem, as far as the choice of a tile depends on it, and the configuration that won there.

    Where nothing was measured yet, `us` is None and `provenance` says where the configuration comes from.
    """

    dtype: str  # "float16", "bfloat16"
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    heads: int  # batch * query heads
    is_causal: bool
    kernel: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    schedule: str
    maxnreg: int | None
    us: float | None  # gpu warm, microseconds
    machine: str  # the GPU's name
    commit: str  # of FlashCore
    provenance: str  # "" for a measured row

    @property
    def config(self) -> Config:
        return Config(
            self.kernel, self.block_m, self.block_n, self.num_warps, self.num_stages, self.schedule, self.maxnreg
        )  # fmt: skip


def row(problem: Problem, config: Config, us: float, machine: str, commit: str) -> Row:
    """The row that records that `config` won `problem` with `us` microseconds."""
    return Row(
        str(problem.dtype).removeprefix("torch."), problem.head_dim, problem.seqlen_q, problem.seqlen_k,
        problem.batch * problem.heads_q, problem.is_causal, **asdict(config),
        us=us, machine=machine, commit=commit, provenance="",
    )  # fmt: skip


def nearest(problem: Problem, rows: Iterable[Row]) -> Row | None:
    """The row that speaks for `problem`, or None: of those with its mask, the one with the smallest product of the
    ratios of both lengths, heads and head dimension, none of them out of reach, of UNEVEN where only one of the two has
    keys that fill tiles of 64, else HALF where only one has keys that fill tiles of 128, and of REQUESTS where their
    rows cost TMA unlike requests. A row of the problem's dtype wins a tie, then the first.
    """
    best: tuple[tuple[float, bool], Row] | None = None
    heads = min(problem.batch * problem.heads_q, MANY_HEADS)
    requests = _requests(problem.head_dim)
    for candidate in rows:
        if candidate.is_causal != problem.is_causal:
            continue
        head_dim = _ratio(candidate.head_dim, problem.head_dim)
        if head_dim > REACH_HEAD_DIM or (queries := _ratio(candidate.seqlen_q, problem.seqlen_q)) > REACH:
            continue
        keys, many = _ratio(candidate.seqlen_k, problem.seqlen_k), _ratio(min(candidate.heads, MANY_HEADS), heads)
        if keys > REACH or many > REACH:
            continue
        unlike = _unlike(candidate.seqlen_k, problem.seqlen_k)
        if _requests(candidate.head_dim) != requests:
            unlike *= REQUESTS
        distance = (queries * keys * many * head_dim * unlike, DTYPES[candidate.dtype] != problem.dtype)
        if best is None or distance < best[0]:
            best = distance, candidate
    return best[1] if best else None


def _unlike(keys: int, others: int) -> float:
    if (keys % 64 == 0) != (others % 64 == 0):
        return UNEVEN
    return HALF if (keys % 128 == 0) != (others % 128 == 0) else 1.0


def ends_in_half_a_sector(dim: int) -> bool:
    """Whether a row of so many columns of two bytes ends in half of an L2's sector of 32 bytes, for which TMA asks
    apart: tiles of 64 query rows were seen to take up to 1.7 times as long, wherever rows begin. Not 8 columns, which
    are nothing but half a sector.
    """
    return dim > 16 and dim % 16 != 0


def _requests(dim: int) -> str:
    """Why TMA asks more often than once a line for a row of so many columns."""
    if ends_in_half_a_sector(dim):
        return "half a sector"
    return "across lines" if dim > 64 and dim & (dim - 1) else ""


def _ratio(a: int, b: int) -> float:
    a, b = max(a, 1), max(b, 1)
    return a / b if a > b else b / a


@cache
def table(arch: int) -> tuple[Row, ...]:
    """The shipped rows for an architecture (90 ...), none where nobody measured yet."""
    path = TABLES / f"sm{arch}.json"
    return read(path, arch) if path.exists() else ()


def read(path: Path, arch: int) -> tuple[Row, ...]:
    """The rows of a file. One that is no table of `arch` warns and counts as empty, so that rules serve instead."""
    try:
        return parse(_content(path).decode("utf-8"), arch)
    except (OSError, ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
        why = why if len(why) <= MAX_TEXT else why[:MAX_TEXT] + " ..."
        warnings.warn(f"tuning table {path.name} is not used: {why}", RuntimeWarning, stacklevel=2)
        return ()


def _content(path: Path) -> bytes:
    """The bytes of a regular file that nobody but its owner, who is trusted anyway, can write.

    What is looked at is what is read: the file is opened once, and never waited for, as a pipe would have it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if hasattr(os, "geteuid"):
            # root, this user, or whoever installed this very module
            if found.st_uid not in (0, os.geteuid(), os.stat(__file__).st_uid):
                raise ValueError(f"it belongs to another user, {found.st_uid}")
            if found.st_mode & 0o002 or (found.st_mode & 0o020 and found.st_gid != os.getegid()):
                raise ValueError(f"others can write into it: mode {stat.S_IMODE(found.st_mode):o}")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return content


def parse(text: str, arch: int) -> tuple[Row, ...]:
    """The rows of a table's text.

    Raises:
        ValueError: it is not of the format, down to each field's type; the message names the row.
        RecursionError: it nests too deep.
    """
    document = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    if not isinstance(document, dict) or set(document) != {"format", "arch", "rows"}:
        raise ValueError("expected an object of format, arch and rows")
    versions = document["format"], document["arch"]
    if versions != (FORMAT, arch) or any(type(v) is not int for v in versions):  # True and 1.0 are equal to 1
        raise ValueError(f"expected format {FORMAT} for arch {arch}, got {versions[0]!r}, {versions[1]!r}")
    if not isinstance(document["rows"], list):
        raise ValueError("rows: expected a list")
    return tuple(_row(i, entry) for i, entry in enumerate(document["rows"]))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("expected each name once in an object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"expected numbers, got {text}")


_OPTIONAL = {"maxnreg": int, "us": float}
_TYPES = {"str": str, "int": int, "bool": bool}
_FIELDS = {f.name: _OPTIONAL.get(f.name) or _TYPES[str(f.type)] for f in fields(Row)}


def _row(index: int, entry: object) -> Row:
    if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
        raise ValueError(f"row {index}: expected an object of {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        value = entry[name]
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is not kind:  # bool is an int to isinstance
            raise ValueError(f"row {index}: {name}: expected {kind.__name__}, got {type(value).__name__}")
        if isinstance(value, str) and not (len(value) <= MAX_TEXT and value.isprintable()):
            raise ValueError(f"row {index}: {name}: expected at most {MAX_TEXT} printable characters")
        if kind in (int, float) and not 0 < entry[name] < 2**31:  # NaN fails too
            raise ValueError(f"row {index}: {name}: expected a number above 0 and below 2^31, got {value!r}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"row {index}: dtype: expected {' or '.join(DTYPES)}, got {entry['dtype']!r}")
    measured = entry["us"] is not None
    if measured != (entry["provenance"] == "") or measured != bool(entry["machine"] and entry["commit"]):
        raise ValueError(f"row {index}: expected us, machine and commit, or else a provenance")
    return Row(**entry)


def write(path: Path, arch: int, rows: Iterable[Row]) -> None:
    """Write a table that `read` accepts, one row a line, in the order given; readers see the old or the new file.

    Raises:
        ValueError: a row that `read` would refuse, or more rows than it would read.
        OSError: the disk is full, the folder cannot be written; the old file is as it was.
    """
    text = _text(arch, rows)
    with _locked(path.parent):
        _replace(path, text)


def update(path: Path, arch: int, change: Callable[[tuple[Row, ...]], Iterable[Row]]) -> None:
    """Write what `change` makes of the rows that are there (none where there is no table), as `write` does.

    Nobody else who uses `update` or `write` comes in between.
    """
    with _locked(path.parent):
        _replace(path, _text(arch, change(read(path, arch) if path.exists() else ())))


def _text(arch: int, rows: Iterable[Row]) -> str:
    lines = ",\n".join("  " + json.dumps(asdict(r), allow_nan=False) for r in rows)
    text = f'{{\n "format": {FORMAT},\n "arch": {arch},\n "rows": [\n{lines}\n ]\n}}\n'
    parse(text, arch)
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"a table of more than {MAX_BYTES} bytes")
    return text


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among those who lock this folder, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a machine that loses power must not keep the name without the bytes
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
