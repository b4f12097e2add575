"""The Hopper kernels bound to a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import add
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from flashcore.core.config import Config
from flashcore.core.problem import Mask, Problem, Strides
from flashcore.core.target import Target
from flashcore.kernels.hopper.attention import attention_forward
from flashcore.kernels.hopper.specialized import attention_forward_specialized
from flashcore.launch.binding import (
    Binding,
    Pointer,
    Scalar,
    Tma,
    length_pointers,
    pack_gqa,
    packed_tiles,
    score_scalars,
    tail_tile,
)
from flashcore.launch.capability import MAX_GRID_YZ, needs_more_registers

SPECIALIZED = "specialized"  # the schedule that is a kernel of its own
_REGISTERS = 65_536  # of an SM
_RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself in every block
_OPTIONAL = (  # parameters that are None where the problem does not use them
    "lse", "mask_desc", "seqused_k", "cu_seqlens_q", "cu_seqlens_k", "total_q", "total_k", "sequences", "cap", "left",
    "right",
)  # fmt: skip
_KEPT = 32 * 2**20  # bytes of K and V that were seen to stay in an L2 of 50 or 60 MiB beside what passes through it
_SHIFTS = (0, 1, 4, 16, 64)  # blocks by which items may move on with each turn, 0 for to and fro
_BARRIERS, _BARRIERS_OF_WARPGROUPS = 64, 512  # bytes, rounded up
_TYPES = {
    torch.float16: ("fp16", gl.float16), torch.bfloat16: ("bf16", gl.bfloat16), torch.float32: ("fp32", gl.float32),
    torch.bool: ("i8", gl.int8),
}  # fmt: skip


def bind(problem: Problem, config: Config, scale: float, target: Target) -> Binding:
    """What to compile and pass to compute `problem` with `config`; `scale` multiplies q.k before the softmax.

    A grid with a 0 in it means that there is nothing to compute and nothing must be launched.
    """
    if config.schedule == SPECIALIZED:
        return _specialized(problem, config, scale, target)
    p = problem
    block_d, block_dv = block_of(p.head_dim), block_of(p.head_dim_v)
    persistent = config.schedule == "persistent"
    pack = 1 if persistent else pack_gqa(p, config.block_m)
    rows, heads = config.block_m // pack, p.heads_q // pack  # of one head in a block; of the grid
    row_tiles = -(-p.seqlen_q // rows)
    pairs = heads * p.batch
    items = row_tiles * pairs

    total_q, total_k = p.packed or (0, 0)
    queries = (p.heads_q, p.seqlen_q, total_q if p.packed else None)
    keys = (p.heads_kv, p.seqlen_k, total_k if p.packed else p.seqlen_k if p.seqused_k else None)

    def descriptor(
        name: str, extent: tuple[int, int, int | None], columns: int, strides: Strides, box: tuple[int, int]
    ) -> Tma:
        if pack > 1 and name in "qo":
            return _gqa_rows(p, name, pack, columns, strides, (rows, box[1]))
        heads, length, total = extent
        if total is None:
            return _plain(p, name, (heads, length, columns), strides, box)
        batch = 1 if p.packed else p.batch
        # Row y + x - length, see the kernel's _load: x ends where the sequence does, y says where it begins.
        sb, sh, sr = _steps((batch, heads, total + 1, columns), strides)
        shape = (batch, heads, total + 1, length, columns)
        ragged = _descriptor(name, p.dtype, shape, (sb, sh, sr, sr, 1), (1, 1, 1, *box))
        return replace(ragged, offset=-length * sr * p.dtype.itemsize)

    args: dict[str, Any] = {
        "q_desc": descriptor("q", queries, p.head_dim, p.stride_q, (config.block_m, block_d)),
        "k_desc": descriptor("k", keys, p.head_dim, p.stride_k, (config.block_n, block_d)),
        "v_desc": descriptor("v", keys, p.head_dim_v, p.stride_v, (config.block_n, block_dv)),
        "o_desc": descriptor("o", queries, p.head_dim_v, p.stride_o, (config.block_m, block_dv)),
    }
    if p.return_lse:
        args["lse"] = Pointer("lse", "*fp32", True)
    if p.mask is not None:
        args["mask_desc"] = _mask(p, p.mask, config)
    args |= length_pointers(p, config.block_m)
    args |= score_scalars(p, scale)
    args |= {"longest_q": Scalar("i32", p.seqlen_q), "longest_k": Scalar("i32", p.seqlen_k)}
    args |= _divisors(row_tiles=row_tiles, heads=heads, pairs=pairs)
    args["items"] = Scalar("i32", items if persistent else 1)

    constexprs: dict[str, Any] = dict.fromkeys(name for name in _OPTIONAL if name not in args)
    constexprs |= {
        "GROUP": p.group // pack, "CAUSAL": p.is_causal,
        "EVEN_N": p.seqlen_k % config.block_n == 0 and not p.ragged,
        "SINGLE": p.seqlen_k <= config.block_n, "TAIL": tail_tile(p, config.block_n),
        "ENDS": _wide_ends(p, config.block_n), "EMPTY_ROWS": _empty_rows(p),
        "NEGATE": scale < 0, "PERSISTENT": persistent, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        **_columns(p), "WARPS": config.num_warps,
        "SLICES": _slices(p, config), "LATE": items > 2 * target.sms, "SORTED": _sorted(p, config, items, target),
        "MASK_B": int(p.mask is not None and p.mask.strides[0] != 0),
        "MASK_H": int(p.mask is not None and p.mask.strides[1] != 0), "PACK_GQA": pack,
    }  # fmt: skip
    if numbers := packed_tiles(p, config.block_m):
        grid = (numbers, p.heads_q, 1)
    elif persistent:
        grid = (min(items, target.sms * blocks_per_sm(p, config, target)), 1, 1)
    elif p.is_causal:
        at_once = _at_once(p, heads, items, target)
        grid = (at_once, row_tiles, pairs // max(at_once, 1))
    else:
        grid = (row_tiles, heads, p.batch)
    # enable_fp_fusion: one FFMA for scale and maximum per score; its default is off from Triton 3.10 on.
    options = {
        "num_warps": config.num_warps, "maxnreg": config.maxnreg, "enable_fp_fusion": True, "launch_pdl": True
    }  # fmt: skip
    return Binding(attention_forward, True, grid, args, constexprs, options)


def _specialized(p: Problem, config: Config, scale: float, target: Target) -> Binding:
    block_d, block_dv = block_of(p.head_dim), block_of(p.head_dim_v)
    rows = config.block_m * 4 // config.num_warps  # of a warpgroup
    row_tiles = -(-p.seqlen_q // config.block_m)
    items = row_tiles * p.heads_q * p.batch
    blocks = min(items, target.sms * blocks_per_sm(p, config, target))
    together, shift = _deal(p, config, blocks)
    queries, keys = (p.heads_q, p.seqlen_q), (p.heads_kv, p.seqlen_k)
    args: dict[str, Any] = {
        "q_desc": _plain(p, "q", (*queries, p.head_dim), p.stride_q, (rows, block_d)),
        "k_desc": _plain(p, "k", (*keys, p.head_dim), p.stride_k, (config.block_n, block_d)),
        "v_desc": _plain(p, "v", (*keys, p.head_dim_v), p.stride_v, (config.block_n, block_dv)),
        "o_desc": _plain(p, "o", (*queries, p.head_dim_v), p.stride_o, (rows, block_dv)),
    }
    if p.return_lse:
        args["lse"] = Pointer("lse", "*fp32", True)
    args |= score_scalars(p, scale)
    args |= {"longest_q": Scalar("i32", p.seqlen_q), "longest_k": Scalar("i32", p.seqlen_k)}
    args["row_tiles"] = Scalar("i32", row_tiles)
    args |= _divisors(heads=p.heads_q, together=together, cohort=together * row_tiles)
    args |= {"items": Scalar("i32", items)} | _divisors(blocks=blocks) | {"shift": Scalar("i32", shift)}
    constexprs: dict[str, Any] = {} if p.return_lse else {"lse": None}
    constexprs |= {
        "GROUP": p.group, "CAUSAL": p.is_causal, "EVEN_N": p.seqlen_k % config.block_n == 0, "NEGATE": scale < 0,
        **_columns(p), "GROUPS": config.num_warps // 4, "STAGES": config.num_stages, "REGISTERS": config.maxnreg,
    }  # fmt: skip
    # The first warpgroup's warps are the kernel's own, the others come with its partitions, and so do their registers.
    options = {"num_warps": 4, "enable_fp_fusion": True, "launch_pdl": True}
    return Binding(attention_forward_specialized, True, (blocks, 1, 1), args, constexprs, options)


def _divisors(**sizes: int) -> dict[str, Scalar]:
    """Sizes, and what the kernels' `divide` divides by them with."""
    found: dict[str, Scalar] = {}
    for name, size in sizes.items():
        found |= {name: Scalar("i32", size), f"per_{name}": Scalar("i64", -(-(2**32) // max(size, 1)))}
    return found


def _plain(p: Problem, name: str, extent: tuple[int, int, int], strides: Strides, box: tuple[int, int]) -> Tma:
    """Over [batch, heads, rows, columns]."""
    shape = (1 if p.packed else p.batch, *extent)
    return _descriptor(name, p.dtype, shape, (*_steps(shape, strides), 1), (1, 1, *box))


def _gqa_rows(p: Problem, name: str, pack: int, columns: int, strides: Strides, box: tuple[int, int]) -> Tma:
    """Over [batch, key heads, rows, query heads of a key head, columns]: a box has all of these for some rows."""
    rows, width = box
    sb, sh, sr = _steps((p.batch, p.heads_q, p.seqlen_q, columns), strides)
    shape = (p.batch, p.heads_q // pack, p.seqlen_q, pack, columns)
    return _descriptor(name, p.dtype, shape, (sb, sh * pack, sr, sh, 1), (1, 1, rows, pack, width))


def _descriptor(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Tma:
    kind, element = _TYPES[dtype]
    layout = gl.NVMMASharedLayout.get_default_for(list(box), element)
    return Tma(name, kind, shape, strides, box, layout)


def _mask(p: Problem, mask: Mask, config: Config) -> Tma:
    """Over what the mask holds: a dimension in which it is broadcast has size 1, and is read at 0."""
    scores = (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
    shape = tuple(size if stride else 1 for size, stride in zip(scores, mask.strides, strict=True))
    steps = _steps(shape, mask.strides[:3], 16 // mask.dtype.itemsize)
    rows = config.block_m if shape[2] > 1 else 1
    return _descriptor("mask", mask.dtype, shape, (*steps, 1), (1, 1, rows, config.block_n))


def _wide_ends(p: Problem, block_n: int) -> bool:
    """Whether the end of a sequence may be a whole tile instead of narrow ones: where it is one of a few tiles."""
    return p.ragged and not p.is_causal and tail_tile(p, block_n) > 0 and p.seqlen_k <= 4 * block_n


def _at_once(p: Problem, heads: int, items: int, target: Target) -> int:
    """Of how many heads, of all batches, causal blocks start with those that see the most keys. With more of them the
    last blocks to start are shorter and the SMs are done together. But blocks of a head read the same keys: its K and V
    had better stay in the L2 meanwhile, and the fewer keys, the less computing hides that they do not.
    """
    row = (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    keys, queries = p.seqlen_k * row, p.seqlen_q * row  # bytes of a head
    key_heads = p.batch * p.heads_kv
    if items <= target.sms:
        return heads  # one block an SM
    if key_heads * keys + p.batch * p.heads_q * queries <= 2 * _KEPT:  # with q and the output, which pass once
        return p.batch * heads
    most = max(_KEPT * min(1.0, p.seqlen_k / 1024) ** 2, _KEPT / 32)
    divisors = [d for d in _divisors_of(key_heads) if key_heads // d <= MAX_GRID_YZ]
    return heads // p.heads_kv * min(divisors, key=lambda d: abs(math.log(d * keys / most)))


def _deal(p: Problem, config: Config, blocks: int) -> tuple[int, int]:
    """How the items of warpgroups are dealt where they are of unlike lengths: of how many heads, of all batches, they
    come together, and by how many blocks they move on with each turn, of up to three warpgroups. The shares are the
    most even ones, weighed against what K and V of one time that do not fit into the L2 cost. Read from HBM again and
    again they take power: causal 2 to 14% of a call after a pause, up to 25% alone, nothing in turns with other
    kernels, which pay for it. Uneven shares cost the most there.
    """
    lengths = _lengths(p, config)
    if not p.is_causal and min(lengths) == max(lengths):
        return 1, 0
    keys = p.seqlen_k * (p.head_dim + p.head_dim_v) * p.dtype.itemsize  # bytes of a head
    items = len(lengths) * p.batch * p.heads_q
    at_once = blocks / len(lengths)  # heads of which the blocks compute anyway

    def passing(heads: int) -> float:
        return 0.04 * min(1.0, max(heads, at_once) / p.group * keys / (4 * _KEPT))

    together = (d * p.group for d in _divisors_of(p.batch * p.heads_kv))
    exact = [n for n in together if n * len(lengths) * (items + 2**12) < 2**32]  # for the kernel's `divide`
    best = (math.inf, 1, 0)
    for heads in exact:
        if 1.0 + passing(heads) >= best[0]:
            break
        for shift in _SHIFTS if config.block_m < 256 else (0,):
            best = min(best, (_busiest(lengths, items, blocks, heads, shift) + passing(heads), -heads, shift))
    return abs(best[1]), best[2]


def _lengths(p: Problem, config: Config) -> list[float]:
    """What a head's items take, in tiles of keys and half a one for start and end, in the order in which the kernel
    deals them. Where not all warpgroups compute a tile, since its keys are hidden from their rows or, of three, rows
    are not there, the others take two thirds, as causal ones were seen to: the tensor cores bind them less, their
    softmax more.
    """
    groups = config.num_warps // 4
    rows = config.block_m // groups
    lengths = []
    for first in range(0, p.seqlen_q, config.block_m):
        ends = [first + rows * (i + 1) for i in range(groups)]
        seen = [p.seqlen_k - p.seqlen_q + end if p.is_causal else p.seqlen_k for end in ends]
        tiles = [-(-min(keys, p.seqlen_k) // config.block_n) for keys in seen]
        if groups == 3:
            tiles = [n if end - rows < p.seqlen_q else 0 for n, end in zip(tiles, ends, strict=True)]
        lengths.append(min(tiles) + (max(tiles) - min(tiles)) * 2 / 3 + 0.5)
    return lengths[::-1] if p.is_causal else lengths


def _busiest(lengths: Sequence[float], items: int, blocks: int, together: int, shift: int) -> float:
    """What the busiest block has to do, over the mean; items are dealt as the kernel does it. Beside so many that they
    even out those of 64 turns tell, if a head's are few enough to pass by in these.
    """
    if items > 64 * blocks and len(lengths) > 32:
        return 1.0
    items = min(items, 64 * blocks)
    cohort = [length for length in lengths for _ in range(together)]
    dealt = (cohort * -(-items // len(cohort)))[:items] + [0.0] * (-items % blocks)
    shares = [0.0] * blocks
    for turn, begin in enumerate(range(0, items, blocks)):
        lap = dealt[begin : begin + blocks]
        moved = turn * shift % blocks
        lap = lap[moved:] + lap[:moved] if shift or turn % 2 == 0 else lap[::-1]
        shares = list(map(add, shares, lap))
    return max(shares) * blocks / sum(dealt)


def _divisors_of(number: int) -> list[int]:
    pairs = ((i, number // i) for i in range(1, math.isqrt(number) + 1) if number % i == 0)
    return sorted({d for pair in pairs for d in pair})


def _slices(p: Problem, config: Config) -> int:
    """In how many slices PV takes the keys of a whole tile: each runs under the softmax of the next one, which shortens
    what a block takes for a tile. Fewer where registers do not suffice for more and, where no score is hidden, where
    tiles are many or short (D = 32), since other blocks then fill its waits and the order only costs.
    """
    dim = max(p.head_dim, p.head_dim_v)
    one_pass, many = p.seqlen_k <= config.block_n, p.seqlen_k > 1024
    if p.mask is not None:
        return 1 if needs_more_registers() or (one_pass and p.mask.dtype == torch.bool) else 2
    if p.is_causal:
        tight = dim > 64 and (p.softcap > 0 or (p.return_lse and config.block_n > 64))
        return 1 if one_pass or p.packed or tight else 4 if dim <= 64 else 2
    if one_pass:
        return 1 if needs_more_registers() else 2 if dim <= 32 or p.return_lse else 4
    if p.options or config.schedule or (dim <= 64 and tail_tile(p, config.block_n)):
        return 1 if dim <= 32 else 2
    return 1 if many and dim <= 32 else 4


def _sorted(p: Problem, config: Config, items: int, target: Target) -> int:
    """How many sequences the kernel can sort by length, 0 where it does not: with more than one item for every block
    that fits on the GPU the last ones had better be short, with more than three their lengths even out and blocks of
    all sorts side by side are faster.
    """
    one_each = target.sms * blocks_per_sm(p, config, target)
    if not p.ragged or p.batch > 128 or packed_tiles(p, config.block_m) or not one_each < items <= 3 * one_each:
        return 0
    return max(32, 1 << (p.batch - 1).bit_length())


def _empty_rows(p: Problem) -> bool:
    """Whether some row may see no key: its maximum is -inf."""
    return p.mask is not None or p.ragged or p.window != (-1, -1) or (p.is_causal and p.seqlen_q > p.seqlen_k)


def block_of(dim: int) -> int:
    """Columns of a tile that holds `dim` elements of a row: tiles are powers of two, wgmma takes 16 at a time."""
    return max(16, 1 << (dim - 1).bit_length())


def _columns(p: Problem) -> dict[str, int]:
    """The kernels' parameters for it, of K and of V. Products with 32 and 16 columns of V take about as long as one
    with 64; of K, whose columns are added up 16 at a time, fewer take less.
    """
    (d, more_d), (dv, more_dv) = columns(p.head_dim, 32), columns(p.head_dim_v, 64)
    return {"D": d, "MORE_D": more_d, "DV": dv, "MORE_DV": more_dv}


def columns(dim: int, fewest: int) -> tuple[int, int]:
    """Columns that are multiplied, in two parts where that leaves out some of the box and the first has no less than
    `fewest`: a part is a power of two.
    """
    whole = block_of(dim)
    first, rest = whole // 2, dim - whole // 2
    if first >= fewest and block_of(rest) < first:
        return first, block_of(rest)
    return whole, 0


def smem(problem: Problem, config: Config) -> int:
    """Bytes of shared memory of one block."""
    d, dv = block_of(problem.head_dim), block_of(problem.head_dim_v)
    rows = config.block_m * (d if config.schedule == "" and d == dv else d + dv)  # the output leaves from q's buffer
    keys = config.num_stages * config.block_n * (d + dv)
    mask = 0
    if problem.mask is not None:
        mask = config.block_n * (config.block_m if problem.mask.strides[2] else 1) * problem.mask.dtype.itemsize
        if problem.mask.dtype != torch.bool:
            mask += 2 * 8 * config.block_n  # ones, for the sum of the weights
    if config.schedule == SPECIALIZED:
        return 2 * (rows + keys + 8 * config.block_n) + _BARRIERS_OF_WARPGROUPS  # ones, for the sum of the weights
    return 2 * (rows + keys) + mask + _BARRIERS


def blocks_per_sm(problem: Problem, config: Config, target: Target) -> int:
    """Blocks that are on an SM at once, by registers and by shared memory."""
    assert config.maxnreg is not None, "the Hopper kernels' configurations state their registers"
    by_registers = _REGISTERS // (config.maxnreg * config.num_warps * 32)
    return min(by_registers, target.smem_per_sm // (smem(problem, config) + _RESERVED))


def _steps(shape: tuple[int, ...], strides: Strides, unit: int = 8) -> Strides:
    """Strides that TMA accepts, multiples of `unit` elements (16 bytes): those of a dimension of size 1 are never used,
    whatever the caller's tensor says.
    """
    used = [s if size > 1 else 0 for size, s in zip(shape, strides, strict=False)]
    widest = max(*used, shape[-1], unit)
    batch, head, row = (s or -(-widest // unit) * unit for s in used)
    return batch, head, row
