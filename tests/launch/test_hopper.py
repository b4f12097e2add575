"""The Hopper kernel bound to problems: grids, descriptors, options, arithmetic on indices, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flashcore.core.config import Config
from flashcore.core.errors import UnsupportedError
from flashcore.core.problem import Problem, Strides
from flashcore.core.target import A100, H100, H200, L4, Target
from flashcore.kernels.hopper import attention
from flashcore.launch import capability, compiled, hopper
from flashcore.launch import select as room
from flashcore.launch.binding import Binding, Pointer, Scalar, Tma, tail_tile
from flashcore.launch.capability import reasons
from flashcore.launch.select import _counts, candidates, select

FLAT = Config("hopper", 64, 128, 4, 1, "", 128)
STAYS = Config("hopper", 64, 128, 4, 1, "persistent", 128)
B200 = Target("NVIDIA B200", (10, 0), 148, 232_448, 233_472, 126 * 2**20)
T4 = Target("Tesla T4", (7, 5), 40, 65_536, 65_536, 4 * 2**20)


@pytest.fixture(autouse=True)
def tested_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is refused under other releases; what these tests ask does not depend on the installed one."""
    monkeypatch.setattr(capability, "_triton", lambda: "3.6.0")


@pytest.fixture
def fresh_rows() -> Iterator[None]:
    """The tuning table as a new process reads it."""
    room._rows.cache_clear()
    yield
    room._rows.cache_clear()


def contiguous(heads: int, rows: int, columns: int, layout: str = "bhsd") -> Strides:
    if layout == "bshd":
        return rows * heads * columns, columns, heads * columns
    return heads * rows * columns, rows * columns, columns


def problem(
    batch: int = 2, heads: int = 8, seqlen: int = 512, head_dim: int = 64, *, heads_kv: int | None = None,
    seqlen_k: int | None = None, head_dim_v: int | None = None, layout: str = "bhsd", **change: Any,
) -> Problem:  # fmt: skip
    heads_kv, head_dim_v = heads_kv or heads, head_dim_v or head_dim
    seqlen_k = seqlen if seqlen_k is None else seqlen_k
    plain = Problem(
        torch.float16, batch, heads, heads_kv, seqlen, seqlen_k, head_dim, head_dim_v,
        contiguous(heads, seqlen, head_dim, layout), contiguous(heads_kv, seqlen_k, head_dim, layout),
        contiguous(heads_kv, seqlen_k, head_dim_v, layout), contiguous(heads, seqlen, head_dim_v, layout),
    )  # fmt: skip
    return dataclasses.replace(plain, **change)


def bind(asked: Problem, config: Config = FLAT, scale: float = 0.125, target: Target = H100) -> Binding:
    return hopper.bind(asked, config, scale, target)


def hopper_configs(asked: Problem, target: Target = H100) -> list[Config]:
    return [c for c in candidates(asked, target) if c.kernel == "hopper"]


def scalars(binding: Binding) -> dict[str, Any]:
    return {name: a.value for name, a in binding.args.items() if isinstance(a, Scalar)}


def descriptor(binding: Binding, name: str) -> Tma:
    found = binding.args[f"{name}_desc"]
    assert isinstance(found, Tma) and found.tensor == name
    return found


# -- the grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "flat"),
    [
        ({}, (8, 6, 2)),
        ({"seqlen": 513}, (9, 6, 2)),
        ({"seqlen": 1}, (1, 6, 2)),
        ({"is_causal": True}, (6, 8, 2)),  # the tiles of long rows first, over all heads
        ({"is_causal": True, "seqlen": 449}, (6, 8, 2)),
        ({"heads_kv": 2}, (8, 6, 2)),
        ({"batch": 65_535}, (8, 6, 65_535)),
    ],
)
def test_a_block_an_item(change: dict[str, Any], flat: tuple[int, int, int]) -> None:
    binding = bind(problem(**{"heads": 6, **change}))
    assert binding.grid == flat
    assert scalars(binding)["items"] == 1 and not binding.constexprs["PERSISTENT"]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("batch", "blocks"), [(1, 64), (8, 512), (9, 528), (32, 528)])
def test_blocks_that_stay(batch: int, blocks: int, is_causal: bool) -> None:
    binding = bind(problem(batch, is_causal=is_causal), STAYS)
    assert binding.grid == (blocks, 1, 1)  # at most the 132 * 4 that fit at once
    assert scalars(binding)["items"] == batch * 8 * 8 and binding.constexprs["PERSISTENT"]


def test_blocks_that_stay_follow_the_gpu() -> None:
    asked = problem(32)
    assert bind(asked, STAYS, target=dataclasses.replace(H100, sms=78)).grid == (78 * 4, 1, 1)
    little = dataclasses.replace(H100, smem_per_sm=100 * 1024)
    assert bind(asked, STAYS, target=little).grid == (132 * 2, 1, 1)


@given(
    st.integers(1, 40), st.sampled_from([1, 3, 8]), st.integers(1, 1100), st.sampled_from([8, 64, 128]), st.booleans()
)
def test_no_grid_is_larger_than_its_items(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> None:
    asked = problem(batch, heads, seqlen, head_dim, is_causal=causal)
    for config in hopper_configs(asked):
        tiles = math.ceil(seqlen / config.block_m)
        items = batch * heads * tiles
        grid = bind(asked, config).grid
        if config.schedule:
            assert grid == (min(items, H100.sms * hopper.blocks_per_sm(asked, config, H100)), 1, 1)
        else:
            assert math.prod(grid) == items


@pytest.mark.parametrize(
    ("head_dim", "m", "n", "warps", "registers", "blocks"),
    [
        (64, 64, 128, 4, 128, 4), (64, 64, 128, 4, 168, 3), (64, 64, 64, 4, 96, 5), (64, 64, 256, 4, 255, 2),
        (64, 128, 128, 8, 128, 2), (128, 64, 64, 4, 168, 3), (128, 64, 128, 4, 168, 2), (128, 128, 128, 8, 255, 1),
    ],
)  # fmt: skip
def test_blocks_an_sm(head_dim: int, m: int, n: int, warps: int, registers: int, blocks: int) -> None:
    for schedule, target in product(("", "persistent"), (H100, H200)):
        config = Config("hopper", m, n, warps, 1, schedule, registers)
        assert hopper.blocks_per_sm(problem(head_dim=head_dim), config, target) == blocks


def test_shared_memory_is_what_the_kernel_allocates() -> None:
    tile = 64 * 64 * 2  # bytes of q, and of the output
    assert hopper.smem(problem(), FLAT) - 64 == tile + 2 * (2 * tile)  # the output leaves from q's buffer
    assert hopper.smem(problem(), STAYS) - 64 == 2 * tile + 2 * (2 * tile)  # q's already holds the next item's
    assert hopper.smem(problem(head_dim_v=32), FLAT) - 64 == tile + tile // 2 + 2 * tile + tile  # sizes differ
    assert hopper.smem(problem(head_dim=40), FLAT) == hopper.smem(problem(), FLAT)


# -- what is passed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_lse", [False, True])
def test_arguments_are_the_kernels(return_lse: bool) -> None:
    binding = bind(problem(return_lse=return_lse))
    names = binding.fn.arg_names
    assert set(names) == {*binding.args, *binding.constexprs} and not {*binding.args} & {*binding.constexprs}
    assert list(binding.args) == [name for name in names if name in binding.args]
    assert binding.args.get("lse") == (Pointer("lse", "*fp32", True) if return_lse else None)
    assert binding.gluon
    assert binding.options == {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": True, "launch_pdl": True}


def test_scalars() -> None:
    asked = problem(3, 6, 200, heads_kv=2, seqlen_k=300)
    values = scalars(bind(asked, STAYS, 0.5))
    assert values.pop("qk_scale") == pytest.approx(0.5 * math.log2(math.e), rel=1e-15)
    assert values == {
        "longest_q": 200, "longest_k": 300, "row_tiles": 4, "heads": 6, "pairs": 18, "items": 72,
        "per_row_tiles": 2**30, "per_heads": 715_827_883, "per_pairs": 238_609_295,
    }  # fmt: skip
    types = {name: a.type for name, a in bind(problem(1, 1, 1)).args.items() if isinstance(a, Scalar)}
    assert {types[f"per_{name}"] for name in ("row_tiles", "heads", "pairs")} == {"i64"}  # 2**32 for a size of 1
    assert scalars(bind(problem(1, 1, 1)))["per_heads"] == 2**32


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_descriptors(layout: str) -> None:
    asked = problem(3, 8, 256, 64, heads_kv=2, seqlen_k=300, head_dim_v=32, layout=layout)
    binding = bind(asked)
    q, k, v, o = (descriptor(binding, name) for name in "qkvo")
    assert (q.shape, k.shape, v.shape, o.shape) == ((3, 8, 256, 64), (3, 2, 300, 64), (3, 2, 300, 32), (3, 8, 256, 32))
    wanted = (asked.stride_q, asked.stride_k, asked.stride_v, asked.stride_o)
    assert len(set(wanted)) == 4 and [d.strides for d in (q, k, v, o)] == [(*strides, 1) for strides in wanted]
    assert (q.strides[1] < q.strides[2]) == (layout == "bshd")
    assert (q.box, k.box, v.box, o.box) == ((1, 1, 64, 64), (1, 1, 128, 64), (1, 1, 128, 32), (1, 1, 64, 32))
    assert [d.layout.swizzle_byte_width for d in (q, k, v, o)] == [128, 128, 64, 64]  # a row of the tile
    assert {d.dtype for d in (q, k, v, o)} == {"fp16"} and binding.constexprs["GROUP"] == 4
    assert {descriptor(bind(problem(dtype=torch.bfloat16)), name).dtype for name in "qkvo"} == {"bf16"}


@pytest.mark.parametrize(
    ("dim", "columns", "parts"),
    [(8, 16, (16, 0)), (16, 16, (16, 0)), (24, 32, (32, 0)), (32, 32, (32, 0)), (40, 64, (32, 16)), (48, 64, (32, 16)),
     (56, 64, (64, 0)), (64, 64, (64, 0)),
     (72, 128, (64, 16)), (80, 128, (64, 16)), (88, 128, (64, 32)), (96, 128, (64, 32)), (104, 128, (128, 0)),
     (128, 128, (128, 0))],
)  # fmt: skip
def test_a_box_is_a_power_of_two_columns(dim: int, columns: int, parts: tuple[int, int]) -> None:
    binding = bind(problem(head_dim=dim))
    for name in "qkvo":
        found = descriptor(binding, name)
        assert found.shape[-1] == dim and found.box[-1] == columns  # what lies between is read as 0, and not written
    multiplied = [binding.constexprs[name] for name in ("D", "MORE_D", "DV", "MORE_DV")]
    parts_of_v = (columns, 0) if columns == 64 else parts
    assert multiplied == [*parts, *parts_of_v] and dim <= sum(parts) <= columns


def test_packed_sequences_of_which_most_are_short_are_looked_up() -> None:
    even = problem(batch=8, seqlen_q=256, packed=(8 * 200, 8 * 200))
    assert "sequences" not in bind(even).args and bind(even).grid == (4, 8, 8)
    short = problem(batch=100, seqlen_q=1024, packed=(1024 + 99 * 8, 5000))
    found = bind(short)
    assert found.grid == (1816 // 64 + 100, 8, 1) and found.args["sequences"].value == 100
    lengths = [1024, *[8] * 99]
    first = [sum(lengths[:i]) for i in range(100)]
    numbers = [row // 64 + i for i, row in enumerate(first)]
    room = [b - a for a, b in zip(numbers, [*numbers[1:], found.grid[0]], strict=True)]
    assert all(got >= -(-length // 64) for got, length in zip(room, lengths, strict=True))


@pytest.mark.parametrize(
    ("keys", "block_n", "width"),
    [(256, 64, 0), (257, 64, 16), (272, 64, 16), (273, 64, 32), (288, 64, 32), (289, 64, 0), (257, 128, 16),
     (320, 128, 64), (321, 128, 0), (50, 64, 0), (64, 64, 0), (65, 64, 16)],
)  # fmt: skip
def test_the_last_keys_get_a_tile_as_narrow_as_they_need(keys: int, block_n: int, width: int) -> None:
    asked = problem(seqlen_k=keys)
    assert tail_tile(asked, block_n) == width
    for dim in (32, 128):
        whole = block_n == 64 and keys > 64 and keys % 64 > 32  # no narrower one holds them
        other = dataclasses.replace(asked, head_dim=dim, head_dim_v=dim)
        assert tail_tile(other, block_n) == (64 if whole else width)
    assert tail_tile(dataclasses.replace(asked, window=(5, 5)), block_n) == 0
    half = block_n // 2 if keys > block_n else 0
    causal = dataclasses.replace(asked, is_causal=True)
    assert tail_tile(causal, block_n) == (64 if keys > block_n else 0), "those on the diagonal"
    lengths = dataclasses.replace(asked, seqused_k=True)
    assert tail_tile(lengths, block_n) == half, "those at the end that only the device knows"
    assert tail_tile(dataclasses.replace(lengths, is_causal=True), block_n) == 0
    assert tail_tile(dataclasses.replace(lengths, head_dim=96, head_dim_v=96), block_n) == 0


def accepted(found: Tma) -> bool:
    """Whether cuTensorMapEncodeTiled takes a descriptor: its documented limits, 2 bytes an element."""
    *outer, inner = found.strides
    return (
        inner == 1
        and all(0 < s < 2**39 and s % 8 == 0 for s in outer)
        and all(0 < size <= 2**32 for size in found.shape)
        and all(0 < size <= 256 for size in found.box)
    )


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("junk", [0, 1, 7, 2**40, -8])
def test_strides_of_a_dimension_of_size_1_are_replaced(layout: str, junk: int) -> None:
    plain = problem(1, 4, 256, heads_kv=1, layout=layout)
    (_, qh, qr), (_, _, kr) = plain.stride_q, plain.stride_k
    asked = dataclasses.replace(plain, stride_q=(junk, qh, qr), stride_k=(junk, junk, kr))
    assert not reasons("hopper", asked, H100)
    binding = bind(asked)
    assert all(accepted(descriptor(binding, name)) for name in "qkvo")
    assert descriptor(binding, "q").strides[1:] == (qh, qr, 1)
    assert descriptor(binding, "k").strides[2:] == (kr, 1)
    one_row = dataclasses.replace(problem(1, 1, 1, layout=layout), stride_q=(junk, junk, junk))
    assert accepted(descriptor(bind(one_row), "q"))


stride = st.one_of(st.integers(-1, 80), st.integers(1, 2**39 // 8).map(lambda n: n * 8 - 8))
size = st.sampled_from([1, 1, 2, 5])


@given(size, size, size, st.sampled_from([8, 40, 64, 128]), st.tuples(stride, stride, stride))
@example(1, 2, 1, 64, (0, 2**39 - 8, 3))
def test_whatever_is_served_has_descriptors_that_tma_takes(
    batch: int, heads: int, rows: int, head_dim: int, strides: Strides
) -> None:
    asked = problem(batch, heads, rows, head_dim, stride_q=strides)
    if not reasons("hopper", asked, H100):
        found = descriptor(bind(asked), "q")
        assert accepted(found)
        for n, wanted, passed in zip((batch, heads, rows), strides, found.strides, strict=False):
            assert n == 1 or wanted == passed


# -- what is compiled -------------------------------------------------------------------------------------------


def test_the_sign_of_the_scale_is_code_and_its_size_is_not() -> None:
    plain, negative = bind(problem(), scale=0.125), bind(problem(), scale=-0.125)
    assert not plain.constexprs["NEGATE"] and negative.constexprs["NEGATE"]
    assert scalars(plain)["qk_scale"] == scalars(negative)["qk_scale"] > 0
    assert compiled.identity(plain) != compiled.identity(negative)
    assert len({compiled.identity(bind(problem(), scale=scale)) for scale in (0.0, -0.0, 1e-9, 1e4)}) == 1
    assert scalars(bind(problem(), scale=0.0))["qk_scale"] > 0  # a hidden score is -inf, and -inf * 0 is no number


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "is_causal", "empty"),
    [(129, 128, True, True), (128, 128, True, False), (1, 128, True, False), (129, 128, False, False)],
)
def test_empty_rows(seqlen_q: int, seqlen_k: int, is_causal: bool, empty: bool) -> None:
    asked = problem(seqlen=seqlen_q, seqlen_k=seqlen_k, is_causal=is_causal)
    assert bind(asked).constexprs["EMPTY_ROWS"] == empty


@pytest.mark.parametrize(
    ("seqlen_k", "single", "even"),
    [(1, True, False), (127, True, False), (128, True, True), (129, False, False), (256, False, True)],
)
def test_tiles_of_keys(seqlen_k: int, single: bool, even: bool) -> None:
    found = bind(problem(seqlen_k=seqlen_k)).constexprs
    assert (found["SINGLE"], found["EVEN_N"]) == (single, even)


@pytest.mark.parametrize("config", [FLAT, STAYS])
def test_the_next_kernel_starts_late_where_blocks_queue(config: Config) -> None:
    def late(batch: int, seqlen: int, sms: int = 132) -> bool:
        return bind(problem(batch, 1, seqlen), config, target=dataclasses.replace(H100, sms=sms)).constexprs["LATE"]

    assert not late(264, 64) and late(265, 64)
    assert not late(132, 128) and late(132, 129)
    assert late(264, 64, sms=131)


@pytest.mark.parametrize(
    ("batch", "heads", "slots"),
    [(7, 4, 0), (8, 4, 32), (22, 4, 32), (23, 4, 0), (33, 2, 64), (65, 1, 128), (129, 1, 0)],
)
def test_the_longest_sequences_come_first_for_one_to_three_items_a_block(batch: int, heads: int, slots: int) -> None:
    five_an_sm = Config("hopper", 64, 64, 4, 1, "", 96)
    target = dataclasses.replace(H100, sms=18 if batch < 129 else 30)  # 90 or 150 blocks at once
    asked = problem(batch, heads, 192, seqused_k=True)  # three items for each head
    assert bind(asked, five_an_sm, target=target).constexprs["SORTED"] == slots
    assert bind(dataclasses.replace(asked, seqused_k=False), five_an_sm, target=target).constexprs["SORTED"] == 0


@pytest.mark.parametrize(("seqlen", "wide"), [(64, False), (65, True), (256, True), (257, False)])
def test_the_end_of_few_tiles_may_be_a_wide_one(seqlen: int, wide: bool) -> None:
    asked = problem(seqlen=seqlen, seqused_k=True)
    config = Config("hopper", 64, 64, 4, 1, "", 96)
    assert bind(asked, config).constexprs["ENDS"] == wide
    for change in ({"is_causal": True}, {"seqused_k": False}, {"head_dim": 96, "head_dim_v": 96}):
        assert not bind(dataclasses.replace(asked, **change), config).constexprs["ENDS"]


def test_many_tiles_are_computed_in_one_order_however_many() -> None:
    few, many = problem(seqlen=1024), problem(seqlen=1152)
    assert compiled.identity(bind(few, FLAT)) != compiled.identity(bind(many, FLAT))
    assert compiled.identity(bind(problem(seqlen=4096), FLAT)) == compiled.identity(bind(many, FLAT))


def test_lengths_and_addresses_are_no_part_of_the_code() -> None:
    asked = problem(8)
    for config, change in product(
        (FLAT, STAYS),
        (
            {"seqlen_q": 2048, "seqlen_k": 1024}, {"batch": 7}, {"heads_q": 16, "heads_kv": 16},
            {"stride_q": (8, 16, 24), "stride_o": (2**38, 2**38, 64)},
        ),
    ):  # fmt: skip
        other = dataclasses.replace(asked, **change)
        assert compiled.identity(bind(other, config, 0.5)) == compiled.identity(bind(asked, config)), change


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen_k": 500}, {"seqlen_k": 128}, {"head_dim": 32}, {"heads_kv": 4}, {"is_causal": True},
        {"return_lse": True}, {"dtype": torch.bfloat16}, {"batch": 65_535},
    ],
)  # fmt: skip
def test_what_the_code_depends_on(change: dict[str, Any]) -> None:
    identities = {compiled.identity(bind(p)) for p in (problem(), dataclasses.replace(problem(), **change))}
    assert len(identities) == 2


@pytest.mark.parametrize("config", [FLAT, STAYS])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen": 0}])
def test_an_empty_problem_has_an_empty_grid(empty: dict[str, int], config: Config) -> None:
    assert 0 in bind(problem(seqlen_k=512, **empty), config).grid  # as the portable kernel's


# -- arithmetic on indices --------------------------------------------------------------------------------------


class Word(int):
    """An integer as the GPU computes with it: `.to` cuts it to a type's width, products keep 64 bits."""

    def to(self, kind: Any) -> Word:
        bits = kind.primitive_bitwidth
        value = int(self) % 2**bits
        return Word(value - 2**bits if kind.is_int_signed() and value >= 2 ** (bits - 1) else value)

    def __mul__(self, other: int) -> Word:
        return Word(int(self) * int(other) % 2**64)

    def __rshift__(self, bits: int) -> Word:
        return Word(int(self) >> bits)


DEVICE_DIVIDE = attention.divide.fn  # the kernel's own lines, run by Python


def divide(x: int, reciprocal: int) -> int:
    return int(DEVICE_DIVIDE(Word(x), Word(reciprocal)))


def reciprocals(pairs: int, row_tiles: int) -> dict[int, int]:
    """Divisor -> what a binding passes for it; `pairs` heads of one sequence."""
    values = scalars(bind(problem(1, pairs, row_tiles * 64), STAYS))
    assert (values["pairs"], values["row_tiles"], values["items"]) == (pairs, row_tiles, pairs * row_tiles)
    return {values[name]: values[f"per_{name}"] for name in ("pairs", "heads", "row_tiles")}


class Sizes(NamedTuple):
    pairs: int
    row_tiles: int

    @property
    def counted(self) -> bool:
        return _counts(problem(1, self.pairs, self.row_tiles * 64), 64)


@st.composite
def extremes(draw: st.DrawFn) -> Sizes:
    """Sizes at which `_counts` just agrees: with one more of either it would not."""
    fixed, other = draw(st.integers(1, 63_519)), draw(st.booleans())

    def sizes(n: int) -> Sizes:
        return Sizes(n, fixed) if other else Sizes(fixed, n)

    low, high = 1, 2**32
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sizes(middle).counted else (low, middle - 1)
    return sizes(low)


@given(extremes(), st.floats(0, 1))
@example(Sizes(63_519, 1), 1.0)
@example(Sizes(1, 63_519), 1.0)
@example(Sizes(1624, 1624), 1.0)
def test_division_by_reciprocals_is_exact_as_far_as_items_are_counted(sizes: Sizes, share: float) -> None:
    assert sizes.counted
    end = sizes.pairs * sizes.row_tiles + 2**12  # the first index that no block ever computes
    for divisor, reciprocal in reciprocals(*sizes).items():
        near = int(share * (end - 1)) // divisor * divisor
        for x in (near - 1, near, near + divisor - 1, end - 1, 0):
            if 0 <= x < end:
                assert divide(x, reciprocal) == x // divisor, (x, divisor)


def test_division_by_reciprocals_is_wrong_beyond() -> None:
    assert divide(65_536, math.ceil(2**32 / 65_537)) == 1  # the control: 65,536 // 65,537 is 0


def test_items_are_counted_up_to_where_division_is_exact() -> None:
    for pairs, row_tiles, counted in (
        (63_519, 1, True), (63_520, 1, False), (1, 63_519, True), (1, 63_520, False), (2**20, 2**20, False)
    ):  # fmt: skip
        assert Sizes(pairs, row_tiles).counted == counted
        asked = problem(1, pairs, 64 * row_tiles, seqlen_k=512)
        if not reasons("hopper", asked, H100):
            stays = {c.schedule for c in hopper_configs(asked) if c.block_m == 64}
            assert stays == ({"", "persistent"} if counted else {""})


def test_a_step_is_what_counting_allows_for() -> None:
    for head_dim, seqlen, causal, target in product((8, 64, 128), (64, 512), (False, True), (H100, H200)):
        asked = problem(32, seqlen=seqlen, head_dim=head_dim, is_causal=causal)
        for config in hopper_configs(asked, target):
            assert target.sms * hopper.blocks_per_sm(asked, config, target) <= 2**12


@pytest.fixture
def item(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernel's own lines that turn an index into (row tile, head, batch), run by Python."""
    monkeypatch.setattr(attention, "divide", divide)
    yield attention._item.fn


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "seqlen"), [(1, 1, 1), (3, 1, 64), (1, 7, 300), (5, 3, 257), (40, 12, 130)]
)
def test_every_item_is_computed_once(item: Any, batch: int, heads: int, seqlen: int, is_causal: bool) -> None:
    binding = bind(problem(batch, heads, seqlen, is_causal=is_causal), STAYS)
    values, step = scalars(binding), binding.grid[0]
    names = ("row_tiles", "per_row_tiles", "heads", "per_heads", "pairs", "per_pairs")
    found = [
        item(index, *(values[name] for name in names), is_causal)
        for first in range(step) for index in range(first, values["items"], step)
    ]  # fmt: skip
    assert sorted(found) == list(product(range(values["row_tiles"]), range(heads), range(batch)))
    if is_causal:  # the rows that see the most keys start first
        rows = [item(index, *(values[name] for name in names), True)[0] for index in range(values["items"])]
        assert rows == sorted(rows, reverse=True)


# -- what it refuses --------------------------------------------------------------------------------------------

REFUSALS = [
    ({"dtype": torch.float32}, "float16, bfloat16, not float32"),
    ({"head_dim": 4}, "q and k is 4, not a multiple of 8 from 8 to 128"),
    ({"head_dim": 65}, "q and k is 65"),
    ({"head_dim": 136}, "q and k is 136"),
    ({"head_dim_v": 136}, "v is 136"),
    ({"aligned": False}, "16 bytes"),
    ({"stride_k": (0, 32_768, 64)}, "k has (0, 32768, 64)"),  # one sequence's keys for all
    ({"stride_v": (262_144, 0, 64)}, "v has (262144, 0, 64)"),
    ({"stride_q": (262_144, 32_768, 0)}, "q has (262144, 32768, 0)"),
    ({"stride_q": (262_144, 32_768, 65)}, "q has (262144, 32768, 65)"),
    ({"stride_o": (262_144, 32_772, 64)}, "out has (262144, 32772, 64)"),
    ({"stride_o": (2**39, 32_768, 64)}, "out has"),
    ({"stride_k": (262_144, 32_768, -64)}, "k has (262144, 32768, -64)"),
    ({"seqlen_k": 0}, "no keys"),
    ({"seqlen_k": 2**31 - 1}, "2,147,418,112 rows and keys"),
    ({"seqlen_q": 64 * 65_535 + 1}, "65,535 heads, sequences and tiles of 64 query rows"),
    ({"heads_q": 65_536}, "65,535 heads"),
    ({"batch": 65_536}, "65,535 heads, sequences"),
]


@pytest.mark.parametrize(("change", "says"), REFUSALS)
def test_refusals(change: dict[str, Any], says: str) -> None:
    asked = dataclasses.replace(problem(), **change)
    (reason,) = reasons("hopper", asked, H100)
    assert says in reason
    with pytest.raises(UnsupportedError) as refusal:
        select(asked, H100, backend="hopper")
    assert refusal.value.reasons == {"hopper": (reason,)} and says in str(refusal.value)


@pytest.mark.parametrize("target", [A100, L4, T4, B200], ids=lambda t: t.name)
def test_other_gpus(target: Target) -> None:
    (reason,) = reasons("hopper", problem(), target)
    major, minor = target.capability
    assert "9.0" in reason and f"{target.name} has {major}.{minor}" in reason
    with pytest.raises(UnsupportedError, match=rf"compute capability 9\.0, .* has {major}\.{minor}"):
        select(problem(), target, backend="hopper")


@pytest.mark.parametrize("release", ["3.5.1", "3.10.0", "3.60.0", "4.0.0", ""])
def test_releases_of_triton_that_were_not_tested(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(capability, "_triton", lambda: release)
    (reason,) = reasons("hopper", problem(), H100)
    assert "tested with Triton 3.6.x" in reason and (release or "none is installed") in reason
    with pytest.raises(UnsupportedError, match="tested with Triton"):
        select(problem(), H100, backend="hopper")


def test_portable_serves_under_an_untested_release(monkeypatch: pytest.MonkeyPatch, fresh_rows: None) -> None:
    monkeypatch.setattr(capability, "_triton", lambda: "3.10.0")
    assert select(problem(), H100).kernel == "portable"


@pytest.mark.parametrize("release", ["3.6.0", "3.7.1", "3.8.0.post1", "3.9.0"])
def test_releases_of_triton_that_were_tested(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(capability, "_triton", lambda: release)
    assert reasons("hopper", problem(), H100) == ()


def test_every_reason_is_given() -> None:
    wrong = dataclasses.replace(
        problem(head_dim=136), head_dim_v=4, aligned=False, dtype=torch.float32, seqlen_k=0, stride_q=(1, 1, 1)
    )
    assert len(reasons("hopper", wrong, A100)) == 7


@pytest.mark.parametrize(
    "asked",
    [
        problem(dtype=torch.bfloat16), problem(head_dim=8), problem(head_dim=96, head_dim_v=128),
        problem(layout="bshd"), problem(heads_kv=1), problem(1, 1, 1), problem(seqlen=197, is_causal=True),
        problem(seqlen=300, seqlen_k=1, is_causal=True, return_lse=True), problem(seqlen=64 * 65_535),
        problem(1, 4, 256, heads_kv=1, stride_k=(0, 0, 64)), problem(65_535), problem(1, 65_535, 64),
    ],
)  # fmt: skip
def test_what_it_serves(asked: Problem) -> None:
    assert reasons("hopper", asked, H100) == ()
    assert select(asked, H100, backend="hopper").kernel == "hopper"
