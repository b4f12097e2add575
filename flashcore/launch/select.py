"""Which kernel and tile compute a problem: a pure function of the problem, the GPU and the shipped tuning table.

The allow-list below holds every configuration that FlashCore ever runs. Each was compiled for its architecture with no
register spilled for plain problems, but for 8 and 16 bytes of two Hopper tiles between head dimensions 64 and 96,
causal under Triton 3.6, and causal with lse under 3.9, 8 of one at 104 and 120 under 3.9, 8 of one pass that hides
keys at 64 under 3.6 and 3.7, of three warpgroups above 96 up to 24 causal and else 8 under 3.6, and up to 32 of four,
stored once and loaded between loops or where a warpgroup loads for all, with lse under 3.9 8 of them in each tile; in
the portable kernel rows that are not 16-byte aligned spill some, and on sm_80 and sm_89 packed sequences with a soft
cap and lse. A tuning table and the caller's block sizes only point into the list.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import torch

from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Mask, Problem
from flashcore.core.target import Target
from flashcore.launch.binding import pack_gqa, tail_tile
from flashcore.launch.capability import reasons
from flashcore.tuning import lookup

# (block_m, block_n, num_warps, num_stages) up to a head dimension.
# wgmma takes 64 rows a warpgroup, its operands come from shared memory: 4 warps for 64 rows, 8 for 128.
# Fewer than 64 rows run on mma.sync, also on Hopper.
_Tile = tuple[int, int, int, int]
_Tiles = dict[int, tuple[_Tile, ...]]
_PORTABLE_SM90: _Tiles = {
    32: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2),
         (128, 128, 8, 2), (32, 64, 4, 2), (16, 64, 4, 2)),
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2),
         (128, 64, 8, 3), (128, 128, 8, 2), (32, 64, 4, 2), (16, 64, 4, 2), (16, 128, 4, 2)),
    96: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3),
         (128, 128, 8, 2), (32, 32, 2, 2), (16, 64, 4, 2)),
    128: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3),
          (128, 128, 8, 2), (32, 32, 2, 2), (16, 64, 4, 2)),
    192: ((64, 32, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3), (128, 64, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    256: ((64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2), (16, 32, 4, 2)),
}  # fmt: skip
# mma.sync reads its accumulators and weights from registers, 16 rows a warp: what fits is smaller. Triton keeps the
# weights of a chain of products in registers only where a tile has at least as many rows as columns.
_PORTABLE_SM80: _Tiles = {
    32: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 32, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2),
         (32, 64, 4, 2), (16, 64, 4, 2)),
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 128, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2),
         (128, 64, 8, 3), (32, 64, 4, 2), (16, 64, 4, 2)),
    96: ((64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (128, 32, 8, 3), (32, 32, 4, 2),
         (16, 64, 4, 2)),
    128: ((64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3), (32, 64, 4, 2),
          (32, 32, 4, 2)),
    192: ((64, 16, 4, 2), (32, 64, 8, 2), (32, 32, 4, 2)),
    256: ((64, 32, 8, 2), (64, 32, 8, 3), (32, 64, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
}  # fmt: skip

# A mask's tile is in registers beside the scores.
_PORTABLE_SM90_MASKED: _Tiles = {
    64: ((64, 64, 4, 2), (64, 32, 4, 2), (16, 64, 4, 2)),
    128: ((64, 64, 8, 2), (64, 32, 4, 2)),
    192: ((64, 32, 8, 2), (32, 32, 4, 2)),
    256: ((64, 32, 8, 2), (16, 32, 4, 2)),
}
_PORTABLE_SM80_MASKED: _Tiles = {
    64: ((64, 32, 4, 2), (16, 64, 4, 2)),
    128: ((64, 32, 8, 2), (32, 32, 4, 2)),
    192: ((32, 32, 4, 2),),
    256: ((64, 32, 8, 2), (32, 32, 4, 2)),
}
# fp32 is multiplied by FFMA, whose operands and results are all in registers, and code grows with the tile.
_PORTABLE_FP32: _Tiles = {
    64: ((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    128: ((32, 16, 8, 2), (16, 16, 4, 2)),
    192: ((16, 16, 4, 2),),
    256: ((16, 32, 8, 2),),
}
_PORTABLE_FP32_MASKED = _PORTABLE_FP32 | {64: _PORTABLE_FP32[64][1:]}


_HEAD_DIMS = tuple(_PORTABLE_SM90)


def _portable(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The portable kernel's configurations for this head dimension that fit the GPU's shared memory."""
    masked = problem.mask is not None
    if problem.dtype == torch.float32:
        tiles, schedule = _PORTABLE_FP32_MASKED if masked else _PORTABLE_FP32, ""
    elif target.arch >= 90:
        tiles, schedule = _PORTABLE_SM90_MASKED if masked else _PORTABLE_SM90, ""
    else:
        tiles, schedule = _PORTABLE_SM80_MASKED if masked else _PORTABLE_SM80, "split"
    dim = max(padded(dim, problem.aligned_rows) for dim in (problem.head_dim, problem.head_dim_v))
    fitting = next(tiles[most] for most in tiles if dim <= most)
    configs = (Config("portable", *tile, schedule) for tile in fitting)
    return tuple(c for c in configs if portable_smem(problem, c, target) <= target.smem_per_block)


def portable_smem(problem: Problem, config: Config, target: Target) -> int:
    """Bytes of shared memory that the portable kernel asks for at most: what its compiler does, counted."""
    d, dv = (padded(dim, problem.aligned_rows) for dim in (problem.head_dim, problem.head_dim_v))
    if not problem.aligned_rows:
        d = dv = max(d, dv)  # as portable.bind has them
    wgmma = target.arch >= 90 and config.block_m >= 64 and problem.dtype != torch.float32
    # A wgmma may still read the tile before the one being computed; mma.sync has it in registers by then.
    tiles = config.num_stages if wgmma else config.num_stages - 1
    rows = config.block_m * max(d, dv)  # q first, the output last
    weights = 0 if wgmma and config.num_warps * 16 == config.block_m else config.block_m * config.block_n
    reduction = 4 * config.block_m * config.num_warps  # row maxima and sums of warps that share rows
    elements = rows + tiles * config.block_n * (d + dv) + weights
    return problem.dtype.itemsize * elements + reduction + _mask_smem(problem, config)


def _mask_smem(problem: Problem, config: Config) -> int:
    """A mask is read as it lies in memory and passes through shared memory to the threads that hold the scores."""
    if problem.mask is None:
        return 0
    *_, row, key = problem.mask.strides
    rows, keys = (config.block_m if row else 1), (config.block_n if key else 1)
    return rows * keys * 4


def padded(dim: int, aligned_rows: bool) -> int:
    """Columns of shared memory that a row of `dim` elements takes: what `portable.columns` says, summed."""
    whole = max(16, 1 << (dim - 1).bit_length())
    if not aligned_rows:
        return whole
    first = max(16, whole // 2)
    rest = max(16, 1 << max(dim - first - 1, 0).bit_length())
    return min(whole, first + rest)


# (block_m, block_n, num_warps, registers a thread) by the padded head dimension: plain ones, those for problems whose
# last keys get a tile of their own, those for causal blocks that take one tile of rows, whose diagonal does, and those
# for others that hide some scores or want the lse from blocks that stay, which takes a few registers more. With 80
# registers 24 warps share an SM, with 96 20, with 128 16, with 168 12, with 255 8.
_HOPPER: dict[int, tuple[tuple[_Tile, ...], ...]] = {
    32: (((64, 128, 4, 128), (64, 64, 4, 96), (128, 128, 8, 128), (64, 128, 4, 96)),
         ((64, 64, 4, 96), (64, 128, 4, 128), (64, 64, 4, 80)),
         ((64, 128, 4, 128), (64, 64, 4, 96), (128, 128, 8, 128), (64, 128, 4, 168), (64, 64, 4, 80)),
         ((64, 64, 4, 96), (64, 128, 4, 168), (64, 64, 4, 80))),
    64: (((64, 128, 4, 128), (128, 128, 8, 128), (64, 64, 4, 96), (64, 256, 4, 255)),
         ((64, 64, 4, 96), (64, 128, 4, 168), (64, 128, 4, 128)),
         ((64, 128, 4, 128), (64, 64, 4, 96), (128, 128, 8, 128), (64, 64, 4, 128), (64, 128, 4, 168)),
         ((64, 64, 4, 128), (64, 128, 4, 168), (64, 128, 4, 128), (128, 64, 8, 128), (64, 64, 4, 96))),
    96: (((128, 64, 8, 128), (64, 64, 4, 128), (64, 128, 4, 168)),
         ((128, 64, 8, 128), (64, 64, 4, 128)),
         ((128, 64, 8, 128), (64, 64, 4, 128), (64, 128, 4, 168)),
         ((128, 64, 8, 128), (64, 64, 4, 128), (64, 128, 4, 255))),
    128: (((64, 64, 4, 168), (64, 128, 4, 255), (128, 128, 8, 255), (64, 64, 4, 128)),
          ((64, 64, 4, 128), (64, 128, 4, 255)),
          ((64, 64, 4, 128), (64, 64, 4, 168), (64, 128, 4, 255)),
          ((64, 64, 4, 168), (64, 128, 4, 255), (128, 128, 8, 255))),
}  # fmt: skip
# The same for problems with further options: for one alone that costs few registers, for one or two, for any number.
# Small tiles: most options wait for memory of their own, which more blocks hide better.
_HOPPER_OPTIONS: dict[int, tuple[tuple[_Tile, ...], tuple[_Tile, ...], tuple[_Tile, ...]]] = {
    32: (((64, 64, 4, 96), (64, 128, 4, 168), (64, 64, 4, 128)), ((64, 64, 4, 128),), ((64, 64, 4, 168),)),
    64: (((64, 64, 4, 96), (64, 128, 4, 168), (64, 64, 4, 128)), ((64, 64, 4, 128),), ((64, 64, 4, 168),)),
    96: (((128, 64, 8, 128), (64, 64, 4, 128)), ((64, 64, 4, 168),), ((64, 64, 4, 255),)),
    128: (((64, 64, 4, 168), (64, 128, 4, 255)), ((64, 64, 4, 168),), ((64, 64, 4, 255),)),
}  # fmt: skip
# Where a window or a soft cap is the only option, causal and with lse, too, and where both are the only ones.
_HOPPER_BOUNDS: dict[int, tuple[_Tile, _Tile]] = {
    32: ((64, 64, 4, 80), (64, 64, 4, 96)),
    64: ((64, 64, 4, 96), (64, 64, 4, 96)),
    96: ((64, 64, 4, 128), (64, 64, 4, 128)),
    128: ((64, 64, 4, 128), (64, 64, 4, 168)),
}
# Where lengths on the device are the only option, causal and with lse, too.
_HOPPER_LENGTHS: dict[int, tuple[_Tile, ...]] = {
    32: ((64, 64, 4, 96), (64, 64, 4, 128)),
    64: ((64, 64, 4, 96), (64, 64, 4, 128)),
    96: ((128, 64, 8, 128), (64, 64, 4, 128)),
    128: ((64, 64, 4, 128), (64, 64, 4, 168)),
}


def _half_sectors(p: Problem) -> bool:
    """Whether rows of K or V end in half a sector of the L2."""
    return any(map(lookup.ends_in_half_a_sector, (p.head_dim, p.head_dim_v)))


@cache
def _doubled(tiles: tuple[_Tile, ...]) -> tuple[_Tile, ...]:
    """`tiles` and those of twice as many query rows on twice as many warps, which ask for each row of K and V half as
    often: for rows that end in half a sector.
    """
    doubles = ((128, n, 8, 128) for m, n, _, registers in tiles if m == 64 and registers <= 128)
    return tuple(dict.fromkeys((*tiles, *doubles)))


def _mask_alone(p: Problem, mask: Mask, light: tuple[_Tile, ...], width: int, target: Target) -> tuple[Config, ...]:
    """With a mask alone: what was seen to be the fastest, then `light`; `width` is the padded head dimension. With a
    bias, blocks may stay for several items at head dimensions above 32 or where rows end in half a sector.
    """
    wide, first = p.seqlen_k % 128 == 0 and p.seqlen_k >= 512, None
    if _half_sectors(p) and width != 96 and (width > 96 or mask.dtype != torch.bool):
        first = (128, 64, 8, 128 if width <= 64 else 168)
    elif mask.dtype == torch.bool:
        first = (64, 128, 4, 128) if p.seqlen_k == 128 and width <= 64 else None
    elif width == 32:
        first = (64, 128, 4, 168) if p.seqlen_k == 128 else (64, 128, 4, 128) if wide and mask.strides[0] else None
    elif width == 64:
        at_once = -(-p.seqlen_q // 64) * p.batch * p.heads_q <= 4 * target.sms
        first = (64, 128, 4, 168) if wide and not at_once else (64, 64, 4, 128)
    order = light if first is None else (first, *(tile for tile in light if tile != first))
    flat = tuple(Config("hopper", m, n, warps, 1, "", registers) for m, n, warps, registers in order)
    if first is None or first[1] != 64 or p.seqlen_k <= 64 or not _counts(p, first[0]):
        return flat
    return (replace(flat[0], schedule="persistent"), *flat)


def _hopper_options(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The Hopper kernel's configurations for a problem with options. With seqused_k or a bias alone, blocks may stay
    for several items.
    """
    p, dim = problem, max(problem.head_dim, problem.head_dim_v)
    width = next((padded for padded in _HOPPER_OPTIONS if dim <= padded), None)
    if width is None:
        return ()
    if p.options in (("seqused_k",), ("cu_seqlens",)):
        lengths = _HOPPER_LENGTHS[width]
        return _hopper_lengths(p, _doubled(lengths) if _half_sectors(p) else lengths)
    light, some, many = _HOPPER_OPTIONS[width]
    wide_mask = p.mask is not None and p.mask.dtype == torch.float32
    burden = len(p.options) + p.is_causal + 2 * wide_mask
    if set(p.options) <= {"window", "softcap"}:
        first = _HOPPER_BOUNDS[width][len(p.options) - 1]
        others = light if p.options == ("softcap",) and burden == 1 and not p.return_lse else ()
        tiles: tuple[_Tile, ...] = (first, *(tile for tile in others if tile != first))
        tiles = _doubled(tiles) if _half_sectors(p) and not p.softcap and dim <= 96 else tiles
    elif burden > 2:
        tiles = many
    elif burden == 2 or p.return_lse:
        tiles = _doubled(some) if _half_sectors(p) else some
    elif p.mask is not None:
        return _mask_alone(p, p.mask, light, width, target)
    else:
        tiles = light
    return tuple(Config("hopper", m, n, warps, 1, "", registers) for m, n, warps, registers in tiles)


def _hopper_lengths(p: Problem, tiles: tuple[_Tile, ...]) -> tuple[Config, ...]:
    """For lengths on the device: blocks that take one tile and, for seqused_k without more, those that stay, which
    take a few registers more.
    """
    most = max(p.head_dim, p.head_dim_v)
    flat = tuple(Config("hopper", m, n, warps, 1, "", registers) for m, n, warps, registers in tiles)
    if p.packed and p.is_causal and p.return_lse and most > 96:
        return tuple(c for c in flat if c.block_m == 64)  # 128 rows spill
    if p.packed or p.is_causal or p.return_lse or not _counts(p, 64):
        return flat
    spilling = 128 if most > 96 else 96 if most > 32 and p.seqlen_k <= 256 else 0  # registers that are too few
    # Blocks of 128 rows that stay are slower up to D = 32.
    stay = (c for c in flat if p.seqlen_k > c.block_n and c.maxnreg != spilling and (most > 32 or c.block_m == 64))
    return (*(replace(c, schedule="persistent") for c in stay), *flat)


_FOUR = Config("hopper", 256, 128, 16, 5, "specialized", 128)
_FILLED = 0.92  # of the rows and keys that the blocks of four warpgroups have room for in all their turns


def _four(p: Problem, target: Target) -> bool:
    """Whether blocks of four warpgroups that share K and V are ahead, at head dimensions of 24 to 64: beside so many
    keys that what they save outweighs the begins and ends of items, which nothing hides in a block's only turn. They
    save power and, where rows lie across the L2's lines, waits for K and V. Causal, beside more keys: small blocks
    compute less of what is hidden. A rule, since most of the table's rows were timed in turns with others alone, at the
    clock that all of them leave: docs/design/hopper-log.md has what four take after a pause and alone.
    """
    dim = max(p.head_dim, p.head_dim_v)
    if not 16 < dim <= 64:
        return False
    items, keys = -(-p.seqlen_q // _FOUR.block_m) * p.batch * p.heads_q, -(-p.seqlen_k // _FOUR.block_n)
    turns = -(-items // target.sms)
    lines = p.head_dim % 32 == 0 and p.head_dim_v % 32 == 0  # rows are whole lines of the L2, or halves
    if p.is_causal:
        fewest = 1024 if _half_sectors(p) else 8192 if dim <= 32 else 4096
    elif lines and (dim <= 32 or turns < 4):  # a first turn waits for what all SMs ask for
        fewest = 768 if dim <= 32 else 1024
    else:
        fewest = 512
    if p.seqlen_k < (fewest if turns > 1 else 2 * fewest):
        return False
    room = turns * target.sms * _FOUR.block_m * keys * _FOUR.block_n
    return p.batch * p.heads_q * p.seqlen_q * p.seqlen_k >= _FILLED * room


def _specialized(problem: Problem, target: Target) -> tuple[Config, ...]:
    """Blocks of warpgroups that share K and V: three, with 160 registers a thread, and two, with 240, which waste fewer
    rows where these are few. Small blocks are faster at head dimensions up to 64, unless rows end in half a sector or
    four serve, and than two there and causal up to 96.
    """
    p, dim = problem, max(problem.head_dim, problem.head_dim_v)
    if p.seqlen_k <= 128 or not _counts(p, 128) or pack_gqa(p, 64) > 1:
        return ()
    if p.is_causal and (p.seqlen_q > p.seqlen_k or -(-p.seqlen_q // 128) * p.batch * p.heads_q < target.sms):
        return ()  # rows that see no key, or fewer blocks than SMs
    three, two = (Config("hopper", m, 128, m // 16, 2, "specialized", r) for m, r in ((192, 160), (128, 240)))
    if dim <= 64:
        return (_FOUR,) * _four(p, target) + (three,) * _half_sectors(p)
    return (three,) if p.is_causal and dim <= 96 else (three, two)


def _hopper(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The Hopper kernels' configurations: blocks that take one tile, blocks that stay for several, and blocks of
    warpgroups that share K and V.
    """
    if problem.options:
        return _hopper_options(problem, target)
    dim = max(problem.head_dim, problem.head_dim_v)
    lists = next((_HOPPER[padded] for padded in _HOPPER if dim <= padded), ((),) * 4)
    plain, tailed, diagonal, masked = map(_doubled, lists) if _half_sectors(problem) else lists
    configs = []
    for tile, schedule in product(dict.fromkeys((*plain, *tailed, *diagonal, *masked)), ("", "persistent")):
        m, n, warps, registers = tile
        single = problem.seqlen_k <= n  # one pass needs fewer registers, and its block has nothing to stay for
        if single:
            fitting = plain
        elif problem.is_causal and not schedule:
            fitting = diagonal
        elif problem.is_causal or (problem.return_lse and schedule):
            fitting = masked
        elif problem.seqlen_k % n:
            fitting = tailed if tail_tile(problem, n) else masked
        else:
            fitting = plain
        if tile not in fitting:
            continue
        if registers == 96 and n == 128 and (problem.is_causal or not single):
            continue  # nothing but one pass without a mask fits
        if schedule and (single or not _counts(problem, m) or pack_gqa(problem, m) > 1):
            continue
        tail = tail_tile(problem, n)
        tight = registers == 128 and (dim > 96 or (dim > 32 and n == 128))
        tight = tight or (problem.return_lse and not problem.is_causal and (registers < 128 or 64 < dim <= 96))
        if (schedule and tight and tail) or (registers == 80 and not problem.is_causal and tail == n):
            continue  # a second copy of the loop and the next item together spill, in 80 registers a whole tile's alone
        configs.append(Config("hopper", m, n, warps, 1, schedule, registers))
    return (*configs, *_specialized(problem, target))


def _counts(p: Problem, block_m: int) -> bool:
    """Whether a persistent block finds its items by 32-bit reciprocals, which are exact while products fit."""
    pairs = p.batch * p.heads_q
    row_tiles = -(-p.seqlen_q // block_m)
    return (pairs * row_tiles + 2**12) * max(pairs, row_tiles) < 2**32


# Kernel -> its allow-list for a problem and a GPU; in the order in which they are preferred where no row decides.
_CONFIGS: dict[str, Callable[[Problem, Target], tuple[Config, ...]]] = {"hopper": _hopper, "portable": _portable}
KERNELS: tuple[str, ...] = tuple(_CONFIGS)


def select(
    problem: Problem,
    target: Target,
    *,
    backend: str | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
) -> Config:
    """The configuration that computes `problem` on `target`.

    Of the configurations that can, the one in the tuning table's nearest row, where one is near enough
    (`tuning.lookup.nearest`); elsewhere a rule's, and beside many keys at head dimensions up to 64 (`_four`).

    Args:
        backend: a kernel by name, which then serves or raises; None = any.
        block_m, block_n: only tiles of these sizes; None = any.

    Raises:
        UnsupportedError: no kernel, or not the one asked for, serves the problem; with each one's reasons.
        ValueError: an unknown backend, or block sizes that no kernel has for this problem; says which exist.
    """
    if backend == "reference":
        return Config("reference", 0, 0, 0, 0)
    if backend is not None and backend not in KERNELS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, (*KERNELS, 'reference')))}, got {backend!r}")
    allowed = _allowed(problem, target, KERNELS if backend is None else (backend,))
    chosen = [c for c in allowed if block_m in (None, c.block_m) and block_n in (None, c.block_n)]
    if not chosen:
        tiles = ", ".join(f"{m}x{n}" for m, n in sorted({(c.block_m, c.block_n) for c in allowed}))
        asked = " x ".join("any" if size is None else str(size) for size in (block_m, block_n))
        raise ValueError(f"block_m, block_n: expected one of {tiles} for this problem on {target.name}, got {asked}")
    if _FOUR in chosen:
        return _FOUR
    if -(-problem.seqlen_q // 64) * problem.batch * problem.heads_q <= target.sms:  # more rows a block leave SMs idle
        chosen = [c for c in chosen if c.block_m <= 64] or chosen
    known = {} if problem.options else _rows(target)  # the table knows plain and causal problems
    rows = sorted(placed for config in chosen for placed in known.get((config, problem.is_causal), ()))
    if chosen[0].kernel == "hopper" and (heads := pack_gqa(problem, 64)) > 1:  # as one head of all their rows
        problem = replace(problem, heads_q=problem.heads_kv, seqlen_q=problem.seqlen_q * heads)
    row = lookup.nearest(problem, (row for _, row in rows))
    return row.config if row else _by_rule(problem, target, chosen)


def candidates(problem: Problem, target: Target) -> tuple[Config, ...]:
    """Every configuration that can compute `problem` on `target`: what a tuning run measures, one by one.

    Raises:
        UnsupportedError: there is none.
    """
    return _allowed(problem, target, KERNELS)


def _allowed(problem: Problem, target: Target, kernels: Sequence[str]) -> tuple[Config, ...]:
    why = {kernel: reasons(kernel, problem, target) for kernel in kernels}
    found = tuple(c for kernel in kernels if not why[kernel] for c in _CONFIGS[kernel](problem, target))
    if not found:
        small = (f"no tile fits the {target.smem_per_block} bytes of shared memory of a block on {target.name}",)
        raise UnsupportedError("no kernel computes this attention problem", {k: r or small for k, r in why.items()})
    return found


@cache
def _rows(target: Target) -> dict[tuple[Config, bool], list[tuple[int, lookup.Row]]]:
    """The tuning table's rows for this architecture whose configuration is on the allow-list of their own problem, with
    their places in it: by configuration and whether they are causal, since every new problem asks.
    """
    rows = {row: _listed(row, target) for row in lookup.table(target.arch)}
    unknown = [row for row, listed in rows.items() if listed is not None and row.config not in listed]
    if unknown:
        warnings.warn(
            f"tuning table for sm_{target.arch}: {len(unknown)} rows name a configuration that is not on the"
            f" allow-list and are not used, the first is {unknown[0].config}", RuntimeWarning, stacklevel=2
        )  # fmt: skip
    known: dict[tuple[Config, bool], list[tuple[int, lookup.Row]]] = {}
    for place, (row, listed) in enumerate(rows.items()):
        if listed is not None and row.config in listed:
            known.setdefault((row.config, row.is_causal), []).append((place, row))
    return known


def _listed(row: lookup.Row, target: Target) -> tuple[Config, ...] | None:
    """The allow-list for a row's problem; None where its kernel does not serve here, under this Triton say."""
    if row.kernel not in KERNELS:
        return ()
    dtype = lookup.DTYPES[row.dtype]
    p = _problem(
        dtype, head_dim=row.head_dim, batch=row.heads, heads=1, seqlen_q=row.seqlen_q, seqlen_k=row.seqlen_k,
        is_causal=row.is_causal,
    )  # fmt: skip
    return None if reasons(row.kernel, p, target) else _CONFIGS[row.kernel](p, target)


_MANY_KEYS = 1024  # from which on blocks that stay for several items were seen to cost


def _many_requests(p: Problem) -> bool:
    """Whether TMA's requests for rows of K and V bind in tiles of 64 query rows: where these end in half a sector, or
    lie across the L2's lines, at head dimensions between 64 and 96. Half a sector alone makes up for what 128 rows cost
    where each sees few keys, from 72 columns on, or where they fill the ends of packed sequences worse, but at 56.
    """
    dim = max(p.head_dim, p.head_dim_v)
    few_keys = p.window != (-1, -1) or (p.options and p.is_causal)
    if few_keys or (p.mask is not None and p.mask.dtype == torch.bool) or (p.packed and dim > 48):
        return _half_sectors(p) and dim > 64
    return _half_sectors(p) or (64 < dim <= 96 and not p.packed)


def _by_rule(p: Problem, target: Target, configs: Sequence[Config]) -> Config:
    """The Hopper kernel's first configuration where it serves; where keys are few, as blocks that stay for up to four
    items each, and more than two where these are of unlike lengths. That saves a block's start and end, which are
    nothing beside many keys: then the next tile had better go to whichever SM is done first. For twice as many, blocks
    of warpgroups that share K and V, where they serve and fill the GPU.

    Else 128 rows where TMA's requests for rows of K and V bind (`_many_requests`).

    Of the portable kernel the tile nearest to what the shape asks for; the first in the list among equals.
    Rows: 64, the most that 4 warps hold without sharing rows, so that several blocks share an SM and hide each
    other's loads. 128 where that still leaves two blocks for every SM: K and V then pass L2 half as often. Less
    where 64 leave half of the SMs idle, or where there are no more query rows.
    Keys: 64, so that one row's scores and the accumulator fit in registers; 32 at head dimensions above 128.
    """
    heads = p.batch * p.heads_q

    def blocks(rows: int) -> int:
        return -(-p.seqlen_q // rows) * heads

    ours = [c for c in configs if c.kernel == "hopper"]
    if ours:
        least = 2 if p.ragged else 1
        stays = "persistent" if least < blocks(64) / (4 * target.sms) <= 4 and 128 < p.seqlen_k < _MANY_KEYS else ""
        shared = p.seqlen_k >= 2 * _MANY_KEYS and blocks(128) >= target.sms
        ours = [c for c in ours if (c.schedule == "specialized") == shared] or ours
        wide = _many_requests(p)
        ours = [c for c in ours if (c.block_m == 128) == wide] or ours
        return next((c for c in ours if c.schedule == stays), ours[0])
    rows = 64
    if p.seqlen_q >= 256 and blocks(128) >= 2 * target.sms and target.arch < 90:
        rows = 128
    while rows > 16 and (blocks(rows) <= target.sms // 2 or rows >= 2 * p.seqlen_q):
        rows //= 2
    keys = 64 if max(p.head_dim, p.head_dim_v) <= 128 else 32

    def far(config: Config) -> tuple[float, float]:
        return abs(math.log2(config.block_m / rows)), abs(math.log2(config.block_n / keys))

    return min(configs, key=far)


def shipped(target: Target) -> Iterator[tuple[Problem, Config]]:
    """Every variant that is compiled before a release, for this GPU.

    What `select` answers for plain problems, and each configuration of the allow-list with what makes its largest
    code: causal with lengths that no tile divides and lse, or else the most that it serves; the same with narrow
    tiles, the last one or those on the diagonal.
    """
    plain = [_problem(head_dim=dim, seqlen_q=n) for dim in (32, 64, 80, 128, 256) for n in (128, 257, 512)]
    plain += [_problem(torch.bfloat16, head_dim=64, heads_kv=2, seqlen_q=512, is_causal=c) for c in (False, True)]
    for dim, n, c in ((64, 2048, False), (64, 8192, True), (40, 2048, True)):
        plain += [_problem(head_dim=dim, seqlen_q=n, is_causal=c, return_lse=lse) for lse in (False, True)]
    yield from dict.fromkeys((problem, select(problem, target)) for problem in plain)
    known: dict[int, Container[Config]] = {}
    for dim in (*_HEAD_DIMS, 40, 104):  # these for what only rows that end in half a sector have
        largest: dict[tuple[Config, str], Problem] = {}
        for seqlen, is_causal in ((197, True), (64, True), (512, False), (224, False), (290, False), (100, False)):
            for lse in (True, False):
                problem = _problem(head_dim=dim, seqlen_q=seqlen, is_causal=is_causal, return_lse=lse)
                for config in candidates(problem, target):
                    narrow = ""  # which sort of narrow tiles it has
                    if config.kernel == "hopper" and tail_tile(problem, config.block_n):
                        narrow = "diagonal" if is_causal else "last"
                    if config not in known.get(padded(dim, False), ()):
                        largest.setdefault((config, narrow), problem)
        known[dim] = {config for config, _ in largest}
        yield from ((problem, config) for (config, _), problem in largest.items())


def _problem(
    dtype: torch.dtype = torch.float16,
    *,
    head_dim: int = 64,
    batch: int = 8,
    heads: int = 8,
    heads_kv: int | None = None,
    seqlen_q: int = 128,
    seqlen_k: int | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Problem:
    """A contiguous problem; keys as queries where nothing else is said."""
    heads_kv, seqlen_k = heads_kv or heads, seqlen_k or seqlen_q
    rows = heads * seqlen_q * head_dim, seqlen_q * head_dim, head_dim
    keys = heads_kv * seqlen_k * head_dim, seqlen_k * head_dim, head_dim
    return Problem(
        dtype, batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim, rows, keys, keys, rows,
        is_causal=is_causal, return_lse=return_lse,
    )  # fmt: skip
