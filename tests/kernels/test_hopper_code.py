"""The Hopper kernel's machine code, compiled without a GPU: what its configurations promise holds in PTX and SASS."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.core.config import Config
from flashcore.core.problem import Mask, Problem
from flashcore.core.target import H100
from flashcore.launch import capability, compiled, hopper
from flashcore.launch.binding import tail_tile
from flashcore.launch.compile_check import resources
from flashcore.launch.select import candidates

NEWEST, OLDEST = (capability._triton().startswith(release) for release in ("3.9.", "3.6."))
pytestmark = pytest.mark.skipif(
    not capability._triton().startswith(capability.TRITON_RELEASES), reason="not offered under this release of Triton"
)


def problem(seqlen: int = 512, head_dim: int = 64, *, batch: int = 32, **change: Any) -> Problem:
    strides = (8 * seqlen * head_dim, seqlen * head_dim, head_dim)
    plain = Problem(
        torch.float16, batch, 8, 8, seqlen, seqlen, head_dim, head_dim, strides, strides, strides, strides
    )  # fmt: skip
    return dataclasses.replace(plain, **change)


def configs(asked: Problem) -> list[Config]:
    return [c for c in candidates(asked, H100) if c.kernel == "hopper"]


@cache
def code(asked: Problem, config: Config) -> compiled.Compiled:
    return compiled.compile_for(hopper.bind(asked, config, 0.125, H100), 90)


@cache
def sass(asked: Problem, config: Config) -> tuple[str, ...]:
    """The instructions in the order of their addresses, predicates in front."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code(asked, config).cubin)
        text = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    return tuple(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE))


def places(instructions: tuple[str, ...], pattern: str) -> list[int]:
    """Where the instructions are whose name, without predicate, matches."""
    return [i for i, line in enumerate(instructions) if re.match(rf"(@!?U?P\w+ +)?(?:{pattern})(?![A-Z0-9])", line)]


def ptxas(ptx: str) -> str:
    """What the assembler that Triton takes for sm_90 says of this code."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file, "-o", file.with_suffix(".cubin")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def variant(name: str, m: int, n: int, registers: int, schedule: str = "", **asked: Any) -> Any:
    return pytest.param(problem(**asked), Config("hopper", m, n, m // 16, 1, schedule, registers), id=name)


VARIANTS = pytest.mark.parametrize(
    ("asked", "config"),
    [
        variant("plain", 64, 128, 128),
        variant("plain-early", 64, 128, 128, batch=2),
        variant("persistent", 64, 128, 128, "persistent"),
        variant("single", 64, 128, 128, seqlen=128),
        variant("bf16-persistent", 64, 64, 96, "persistent", dtype=torch.bfloat16),
        variant("causal", 64, 64, 128, is_causal=True),
        variant("causal-gqa-lse", 64, 64, 128, is_causal=True, heads_kv=2, return_lse=True),
        variant("causal-uneven-lse", 64, 128, 168, seqlen=197, is_causal=True, return_lse=True),
        variant("causal-empty-rows-persistent", 64, 128, 168, "persistent", is_causal=True, seqlen_k=256),
        variant("uneven-gqa", 128, 64, 128, seqlen=500, heads_kv=2),
        variant("one-pass-uneven-lse", 64, 256, 255, seqlen=197, return_lse=True),
        variant("dim-16", 64, 128, 128, head_dim=16),
        variant("dim-40-128-rows", 128, 64, 128, head_dim=40),
        variant("dim-128-lse", 64, 128, 255, head_dim=128, return_lse=True),
        variant("dim-128-64-persistent", 128, 128, 255, "persistent", head_dim=128, head_dim_v=64),
    ],
)


@VARIANTS
def test_is_on_the_allow_list(asked: Problem, config: Config) -> None:
    assert config in configs(asked)


@VARIANTS
def test_products(asked: Problem, config: Config) -> None:
    text = sass(asked, config)
    d, dv = sum(hopper.columns(asked.head_dim, 32)), hopper.block_of(asked.head_dim_v)
    bf16 = ".BF16" if asked.dtype == torch.bfloat16 else ""
    products = [text[i] for i in places(text, r"\w*MMA[.\w]*")]
    keys = [width for width in (config.block_n, tail_tile(asked, config.block_n)) if width]  # of a tile, in each part
    shared = [p for p in products if re.match(rf"HGMMA\.64x({'|'.join(map(str, keys))})x16\.F32{bf16} R\d+, gdesc", p)]
    in_registers = [p for p in products if re.match(rf"HGMMA\.64x{dv}x16\.F32{bf16} R\d+, R\d+, gdesc", p)]
    assert len(shared) == len(keys) * d // 16, "q and k from shared memory, 16 columns each, accumulated in fp32"
    assert len(in_registers) == sum(keys) // 16, "the weights from registers, 16 keys each, accumulated in fp32"
    assert len(products) == len(shared) + len(in_registers), "no other matrix product"


def shapes(asked: Problem, config: Config) -> Counter[str]:
    """How many products there are of each shape, those with weights from registers as "64x64x16 R"."""
    text = sass(asked, config)
    found = (re.match(r"HGMMA\.(\w+)\.F32(?:\.BF16)? R\d+, (R?)", text[i]) for i in places(text, r"HGMMA[.\w]*"))
    return Counter(f"{match[1]} {match[2]}".strip() for match in found if match)


def test_a_narrow_last_tile_is_multiplied_as_far_as_it_has_keys() -> None:
    config = Config("hopper", 64, 64, 4, 1, "persistent", 96)
    whole = {"64x64x16": 4, "64x64x16 R": 4}
    assert shapes(problem(256), config) == whole
    assert shapes(problem(257), config) == {**whole, "64x16x16": 4, "64x64x16 R": 5}
    assert shapes(problem(280), config) == {**whole, "64x32x16": 4, "64x64x16 R": 6}


def test_tiles_on_the_diagonal_are_narrow_and_the_others_have_no_mask() -> None:
    config = Config("hopper", 64, 128, 4, 1, "", 128)
    causal = problem(is_causal=True)
    assert shapes(causal, config) == {"64x128x16": 4, "64x64x16": 4, "64x64x16 R": 12}
    text = sass(causal, config)
    narrow = next(i for i in places(text, r"HGMMA[.\w]*") if text[i].startswith("HGMMA.64x64x16.F32 R") and "gdesc" in
                  text[i].split(",")[1])  # fmt: skip
    hidden = places(text, r"FSEL")
    assert hidden and min(hidden) > narrow


def test_columns_are_multiplied_in_two_parts() -> None:
    config = Config("hopper", 128, 64, 8, 1, "", 128)
    assert shapes(problem(head_dim=72), config) == {"64x64x16": 5, "64x64x16 R": 4, "64x16x16 R": 4}
    assert shapes(problem(head_dim=96), config) == {"64x64x16": 6, "64x64x16 R": 4, "64x32x16 R": 4}
    for head_dim, of_k in ((40, 3), (48, 3), (56, 4)):
        assert shapes(problem(head_dim=head_dim), config) == {"64x64x16": of_k, "64x64x16 R": 4}


@VARIANTS
def test_tensors_go_through_tma_alone(asked: Problem, config: Config) -> None:
    text = sass(asked, config)
    tiles = asked.seqlen_k > config.block_n
    refills = 3 if config.schedule == "persistent" else 2 if tiles else 0
    refills += 2 if tail_tile(asked, config.block_n) else 0  # q's behind the last tile, which then is a narrow one
    loads, stores = places(text, r"UTMALDG[.\w]*"), places(text, r"UTMASTG[.\w]*")
    assert len(loads) == 3 + refills and len(stores) == 1
    packed = hopper.bind(asked, config, 0.125, H100).constexprs["PACK_GQA"] > 1
    dimensions = Counter(re.search(r"\.(\dD)", text[i])[1] for i in (*loads, *stores))
    assert dimensions == {"4D": 2 + refills, "5D": 2} if packed else {"4D": 4 + refills}
    assert not places(text, r"(LDG|LD|LDGSTS|LDL|STL|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED)(\.\S+)?")
    written = places(text, r"STG(\.\S+)?")
    assert len(written) == (2 if asked.return_lse else 0), "the lse of the two rows that a thread shares"


@VARIANTS
def test_resources(asked: Problem, config: Config) -> None:
    compiled_ = code(asked, config)
    registers, stack = resources(compiled_.cubin)
    assert config.maxnreg is not None
    assert stack == 0
    assert 0 < registers <= config.maxnreg
    counted = hopper.smem(asked, config)
    assert counted - 64 < compiled_.shared <= counted <= H100.smem_per_block
    by_registers = 65_536 // (-(-registers // 8) * 8 * compiled_.threads)  # registers come in eights
    by_memory = H100.smem_per_sm // (compiled_.shared + 1024)
    assert hopper.blocks_per_sm(asked, config, H100) <= min(by_registers, by_memory, 2048 // compiled_.threads)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(problem(), id="plain"),
        pytest.param(problem(return_lse=True), id="lse"),
        pytest.param(problem(128), id="single"),
        pytest.param(problem(100), id="single-uneven"),
        pytest.param(problem(64, batch=2, is_causal=True, return_lse=True), id="single-causal-lse"),
        pytest.param(problem(197, is_causal=True, return_lse=True), id="causal-uneven-lse"),
        pytest.param(problem(500, return_lse=True), id="uneven-lse"),
        pytest.param(problem(577, return_lse=True), id="odd-lse"),
        pytest.param(problem(577, head_dim=32, is_causal=True, return_lse=True), id="dim-32-odd-causal-lse"),
        pytest.param(problem(577, head_dim=32, return_lse=True), id="dim-32-odd-lse"),
        pytest.param(problem(577, head_dim=128), id="dim-128-odd"),
        pytest.param(problem(257), id="16-keys-more"),
        pytest.param(problem(224), id="32-keys-more"),
        pytest.param(problem(290, return_lse=True), id="64-keys-more-lse"),
        pytest.param(problem(head_dim=80, is_causal=True, return_lse=True), id="dim-80-causal-lse"),
        pytest.param(problem(500, head_dim=96, is_causal=True, return_lse=True), id="dim-96-causal-uneven-lse"),
        pytest.param(problem(257, head_dim=96), id="dim-96-16-keys-more"),
        pytest.param(problem(head_dim=32, return_lse=True), id="dim-32-lse"),
        pytest.param(problem(100, head_dim=32, is_causal=True, return_lse=True), id="dim-32-single-causal-lse"),
        pytest.param(problem(head_dim=128, return_lse=True), id="dim-128-lse"),
        pytest.param(problem(128, head_dim=128), id="dim-128-single"),
        pytest.param(problem(500, head_dim=24, return_lse=True), id="dim-24-uneven-lse"),
        pytest.param(problem(577, head_dim=40, is_causal=True, return_lse=True), id="dim-40-odd-causal-lse"),
        pytest.param(problem(224, head_dim=56, return_lse=True), id="dim-56-32-keys-more-lse"),
        pytest.param(problem(256, head_dim=88, return_lse=True), id="dim-88-lse"),
        pytest.param(problem(500, head_dim=104), id="dim-104-uneven"),
        pytest.param(problem(128, head_dim=128, is_causal=True), id="dim-128-single-causal"),
    ],
)
def test_nothing_that_may_be_chosen_spills(asked: Problem) -> None:
    found = {config: resources(code(asked, config).cubin) for config in configs(asked)}
    assert found
    most = 16 if NEWEST and asked.head_dim == 96 and asked.return_lse else 0  # of a causal block that stays
    most = 8 if asked == problem(100) and not NEWEST else most  # PV in four slices
    limits = {config: may_spill(asked, config) if config.schedule == "specialized" else most for config in found}
    spilling = {config: stack for config, (_, stack) in found.items() if stack > limits[config]}
    assert not spilling, "bytes of stack a thread"


def packed(**change: Any) -> Problem:
    asked = problem(**change)
    rows = (0, asked.head_dim, 8 * asked.head_dim)
    return dataclasses.replace(asked, packed=(1000, 1000), stride_q=rows, stride_k=rows, stride_v=rows, stride_o=rows)


BIAS = Mask(torch.float16, (0, 512 * 512, 512, 1))


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(problem(window=(128, 16)), id="window"),
        pytest.param(problem(window=(128, -1), is_causal=True, return_lse=True), id="window-causal-lse"),
        pytest.param(problem(500, window=(128, 16), head_dim=32, return_lse=True), id="window-dim-32-uneven-lse"),
        pytest.param(problem(window=(128, -1), head_dim=96, is_causal=True), id="window-dim-96-causal"),
        pytest.param(problem(500, window=(128, 16), head_dim=128, return_lse=True), id="window-dim-128-uneven-lse"),
        pytest.param(problem(softcap=30.0), id="softcap"),
        pytest.param(problem(softcap=30.0, head_dim=32, is_causal=True), id="softcap-dim-32-causal"),
        pytest.param(problem(500, softcap=30.0, head_dim=96, is_causal=True), id="softcap-dim-96-causal-uneven"),
        pytest.param(problem(500, softcap=30.0, head_dim=128, is_causal=True), id="softcap-dim-128-causal-uneven"),
        pytest.param(problem(window=(128, 16), softcap=30.0, head_dim=32), id="window-softcap-dim-32"),
        pytest.param(problem(window=(128, 16), softcap=30.0, head_dim=96), id="window-softcap-dim-96"),
        pytest.param(problem(window=(128, 16), softcap=30.0, head_dim=128), id="window-softcap-dim-128"),
        pytest.param(problem(mask=BIAS), id="bias"),
        pytest.param(problem(mask=BIAS, head_dim=32), id="bias-dim-32"),
        pytest.param(problem(mask=Mask(torch.float32, BIAS.strides)), id="fp32-bias"),
        pytest.param(problem(mask=Mask(torch.bool, (512 * 512, 0, 512, 1))), id="bool-mask"),
        pytest.param(problem(seqused_k=True), id="seqused_k"),
        pytest.param(problem(seqused_k=True, return_lse=True), id="seqused_k-lse"),
        pytest.param(problem(seqused_k=True, is_causal=True, return_lse=True), id="seqused_k-causal-lse"),
        pytest.param(problem(seqused_k=True, head_dim=128), id="seqused_k-dim-128"),
        pytest.param(packed(), id="packed"),
        pytest.param(packed(is_causal=True, return_lse=True), id="packed-causal-lse"),
        pytest.param(packed(head_dim=96), id="packed-dim-96"),
        pytest.param(packed(head_dim=128, is_causal=True, return_lse=True), id="packed-dim-128-causal-lse"),
        pytest.param(problem(mask=BIAS, head_dim=40, return_lse=True), id="bias-dim-40-lse"),
        pytest.param(problem(mask=BIAS, head_dim=104), id="bias-dim-104"),
        pytest.param(problem(window=(128, 16), head_dim=72), id="window-dim-72"),
        pytest.param(problem(seqused_k=True, head_dim=104, is_causal=True, return_lse=True), id="lengths-dim-104-lse"),
        pytest.param(packed(head_dim=40, is_causal=True, return_lse=True), id="packed-dim-40-causal-lse"),
    ],
)
def test_nothing_that_an_option_may_choose_spills(asked: Problem) -> None:
    found = {config: resources(code(asked, config).cubin)[1] for config in configs(asked)}
    assert found
    # 3.9 spills 16 bytes with a bias and 24 with seqused_k, 3.6 packed 8, causal with lse in 96 registers.
    assert max(found.values()) <= (24 if NEWEST else 8 if OLDEST and asked.packed else 0), found


@VARIANTS
def test_products_are_not_serialised(asked: Problem, config: Config) -> None:
    assert not re.findall(r"C75\d\d", ptxas(code(asked, config).ptx))


def test_the_assembler_says_when_it_changes_the_order_of_products() -> None:
    asked = problem()
    ptx = code(asked, configs(asked)[0]).ptx
    assert len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+0;", ptx)) == 2
    without = "\n".join(line for line in ptx.splitlines() if "wgmma.wait_group" not in line)
    assert re.search(r"C75\d\d", ptxas(without))


@VARIANTS
def test_the_set_up_overlaps_with_the_kernel_before(asked: Problem, config: Config) -> None:
    ptx = code(asked, config).ptx
    waits, launches, ready, loads = (
        [found.start() for found in re.finditer(pattern, ptx)]
        for pattern in (
            r"griddepcontrol\.wait", r"griddepcontrol\.launch_dependents", r"mbarrier\.init", r"cp\.async\.bulk\.tensor"
        )
    )  # fmt: skip
    assert (len(waits), len(launches), len(ready)) == (1, 1, 3)
    assert max(ready) < waits[0] < min(loads)
    text = sass(asked, config)
    (waits,), (launches,) = places(text, "ACQBULK"), places(text, "PREEXIT")
    loads, products = places(text, r"UTMALDG[.\w]*"), places(text, r"HGMMA[.\w]*")
    assert waits < loads[0]
    if hopper.bind(asked, config, 0.125, H100).constexprs["LATE"]:
        assert products[-1] < launches
    else:
        assert loads[2] < launches < products[0]


def slices(asked: Problem, config: Config) -> int:
    return int(hopper.bind(asked, config, 0.125, H100).constexprs["SLICES"])


def test_products_are_in_more_slices_where_tiles_are_few() -> None:
    small, stays = Config("hopper", 64, 64, 4, 1, "", 128), Config("hopper", 64, 128, 4, 1, "persistent", 128)
    assert [slices(problem(n), small) for n in (1024, 2048)] == [4, 4]
    assert [slices(problem(n, 32), small) for n in (1024, 2048)] == [4, 1]
    assert slices(problem(2048), stays) == slices(problem(2000), small) == 2, "what takes registers"
    assert [slices(problem(2048, dim, is_causal=True), small) for dim in (32, 64, 128)] == [4, 4, 2]
    with_lse = problem(2048, 128, is_causal=True, return_lse=True)
    assert [slices(with_lse, config) for config in (small, dataclasses.replace(small, block_n=128))] == [2, 1]
    assert slices(problem(64, is_causal=True), small) == 1
    one_pass_or_mask = problem(64), problem(64, 32), problem(512, 32, mask=BIAS)
    assert [slices(asked, small) for asked in one_pass_or_mask] == ([1, 1, 1] if NEWEST else [4, 2, 2])


@VARIANTS
def test_softmax_lies_between_the_products(asked: Problem, config: Config) -> None:
    text = sass(asked, config)
    products = places(text, r"HGMMA[.\w]*")
    first = sum(hopper.columns(asked.head_dim, 32)) // 16
    last = first + config.block_n // 16 - 1  # of the tile, in front of what narrow tiles have
    begin, end = products[first - 1], products[first]
    waits = places(text, r"WARPGROUP\.DEPBAR[.\w]*")
    exponentials = [i for i in places(text, r"MUFU\.EX2") if i < products[last]]
    assert len(waits) == (4 if tail_tile(asked, config.block_n) else 2)
    assert begin < waits[0] < exponentials[0] < exponentials[-1] and products[last] < waits[1]
    scores, outputs = (
        config.block_m * columns // code(asked, config).threads
        for columns in (config.block_n, hopper.block_of(asked.head_dim_v))
    )
    tiles = asked.seqlen_k > config.block_n
    assert len(exponentials) == scores + 2 * tiles, "one a score, and one for each of a thread's two rows"
    under_way = len([i for i in exponentials if i > end])
    behind = scores - scores // slices(asked, config)
    assert behind // 2 <= under_way <= behind, "those of slices behind the first, most of them under its products"
    if behind:
        end = products[last]

    def count(name: str) -> int:
        return len([i for i in places(text, rf"{name}[.\w]*") if begin < i < end])

    assert scores <= count("FFMA") <= scores + 4, "scale and maximum are one instruction a score"
    assert scores <= count("FMNMX") <= scores + 4
    assert count("FADD") <= scores
    assert count("FMUL") <= outputs * tiles + 2, "the rescale, and none with a single tile of keys"
    assert count("F2FP") == scores // 2


@VARIANTS
def test_all_warps_are_done_with_a_buffer_that_is_filled_again(asked: Problem, config: Config) -> None:
    text = sass(asked, config)
    barriers = places(text, r"BAR\.SYNC[.\w]*")
    waits = places(text, r"WARPGROUP\.DEPBAR[.\w]*")
    products, arrived = places(text, r"HGMMA[.\w]*"), places(text, r"SYNCS\.PHASECHK[.\w]*")
    loads = places(text, r"UTMALDG[.\w]*")
    kinds = set()
    for refill in loads[3:]:
        read = max((i for i in waits if i < refill), default=0)
        scores = next((i for i in products if read < i < refill), None)
        kinds.add("k" if scores is None else "v")
        if scores is not None:  # v's, with QK under way: the barrier is in front of that, behind the wait for k
            read, refill = max(i for i in arrived if i < scores), scores
        assert any(read < i < refill for i in barriers)
    short = config.block_n <= 64 and hopper.block_of(asked.head_dim) <= 64  # v's behind PV
    assert kinds == (set() if len(loads) == 3 else {"k"} if short else {"k", "v"})
    (leaves,) = places(text, r"UTMASTG[.\w]*")
    staged = max(places(text, r"STSM?(\.\S+)?"))
    (fence,) = (i for i in places(text, r"FENCE\.VIEW\.ASYNC[.\w]*") if staged < i < leaves)
    assert any(fence < i < leaves for i in barriers), "TMA sees what every warp wrote"
    first = min(i for i in places(text, r"STSM?(\.\S+)?") if i > waits[0])
    assert any(waits[0] < i < first for i in barriers), "the output's buffer may be q's"


# -- warpgroups that share K and V ------------------------------------------------------------------------------

THREE = Config("hopper", 192, 128, 12, 2, "specialized", 160)
TWO = Config("hopper", 128, 128, 8, 2, "specialized", 240)
FOUR = Config("hopper", 256, 128, 16, 5, "specialized", 128)
SPECIALIZED = pytest.mark.parametrize(
    ("asked", "config"),
    [
        pytest.param(problem(2048, 128), THREE, id="three"),
        pytest.param(problem(2048, 128), TWO, id="two"),
        pytest.param(problem(2000, 128, is_causal=True, return_lse=True), TWO, id="two-causal-uneven-lse"),
        pytest.param(problem(2048, 128, dtype=torch.bfloat16, heads_kv=2, is_causal=True), TWO, id="two-bf16-gqa"),
        pytest.param(problem(2048, 128, return_lse=True), THREE, id="three-lse"),
        pytest.param(problem(2000, 128, return_lse=True), THREE, id="three-uneven-lse"),
        pytest.param(problem(2048, 104, head_dim_v=64), THREE, id="three-104-64"),
        pytest.param(problem(2048, 64, head_dim_v=128), THREE, id="three-64-128"),
        pytest.param(problem(2000, 96, return_lse=True), THREE, id="three-96-uneven-lse"),
        pytest.param(problem(2048, 72, return_lse=True), TWO, id="two-72-lse"),
        pytest.param(problem(2000, 40, is_causal=True, return_lse=True), THREE, id="three-40-causal-uneven-lse"),
        pytest.param(problem(2048, 128, is_causal=True), THREE, id="three-causal"),
        pytest.param(problem(2000, 128, is_causal=True, return_lse=True), THREE, id="three-causal-uneven-lse"),
        pytest.param(problem(2000, 96, is_causal=True, return_lse=True), THREE, id="three-96-causal-uneven-lse"),
        pytest.param(problem(2048), FOUR, id="four"),
        pytest.param(problem(2048, return_lse=True, heads_kv=2), FOUR, id="four-gqa-lse"),
        pytest.param(problem(2048, 48, head_dim_v=40, dtype=torch.bfloat16), FOUR, id="four-48-40-bf16"),
        pytest.param(problem(4096, 40), FOUR, id="four-40"),
        pytest.param(problem(2000, 24, return_lse=True), FOUR, id="four-24-tail-lse"),
        pytest.param(problem(1500), FOUR, id="four-tail"),
        pytest.param(problem(8192, is_causal=True), FOUR, id="four-causal"),
        pytest.param(problem(8192, is_causal=True, return_lse=True, heads_kv=2), FOUR, id="four-causal-gqa-lse"),
        pytest.param(problem(2000, 40, is_causal=True), FOUR, id="four-40-causal-tail"),
        pytest.param(problem(2000, 56, is_causal=True, return_lse=True), FOUR, id="four-56-causal-tail-lse"),
    ],
)


@SPECIALIZED
def test_warpgroups_are_on_the_allow_list(asked: Problem, config: Config) -> None:
    assert config in configs(asked)


@pytest.mark.parametrize(
    "asked",
    [
        problem(2048, 64, is_causal=True), problem(1920, 64), problem(1100, 48), problem(2048, 16),
        problem(2048, 64, batch=5), problem(128, 128), problem(128, 96),
        problem(2048, 128, window=(5, 5)), problem(2048, 128, softcap=5.0),
        problem(2048, 128, seqlen_k=1024, is_causal=True),
    ],
    ids=["causal-dim-64", "short-dim-64", "uneven-dim-48", "dim-16", "blocks-with-little-to-do", "one-tile",
         "one-tile-dim-96", "window", "softcap", "rows-without-keys"],
)
def test_warpgroups_are_not_for(asked: Problem) -> None:
    assert not {config.schedule for config in configs(asked)} & {"specialized"}


def test_how_many_warpgroups() -> None:
    for change, expected in (
        ({"return_lse": True}, [THREE, TWO]), ({"seqlen": 2000}, [THREE, TWO]), ({"is_causal": True}, [THREE, TWO]),
        ({"is_causal": True, "head_dim": 96}, [THREE]), ({"head_dim": 40, "is_causal": True}, [FOUR, THREE]),
        ({"head_dim": 24}, [FOUR, THREE]), ({"head_dim": 40, "seqlen": 2000}, [FOUR, THREE]),
        ({"head_dim": 40, "seqlen": 1100}, [THREE]), ({"head_dim": 32, "seqlen": 1024}, [FOUR]),
        ({"head_dim": 64}, [FOUR]), ({"head_dim": 64, "seqlen": 16_384}, [FOUR]),
        ({"head_dim": 48, "head_dim_v": 64}, [FOUR]),
    ):  # fmt: skip
        found = configs(problem(**{"seqlen": 2048, "head_dim": 128, **change}))
        assert [c for c in found if c.schedule == "specialized"] == expected


def may_spill(asked: Problem, config: Config) -> int:
    """Bytes: of three what a thread's place in the mask is, without one its warp's number under Triton 3.6; of four
    what it needs once an item, or once a tile that it loads.
    """
    if config == FOUR:
        return 32
    wide = max(asked.head_dim, asked.head_dim_v) > 96
    return (24 if asked.is_causal else 8) if config == THREE and wide else 0


@SPECIALIZED
def test_warpgroups_fit(asked: Problem, config: Config) -> None:
    compiled_ = code(asked, config)
    _, stack = resources(compiled_.cubin)
    assert stack <= may_spill(asked, config)
    loading = 0 if config is FOUR else 4  # a warp, which comes with three more
    assert compiled_.threads == 32 * (config.num_warps + loading)
    assert compiled_.shared <= hopper.smem(asked, config) <= H100.smem_per_block
    assert config.maxnreg is not None
    assert (config.maxnreg * config.num_warps + 24 * loading) * 32 <= 65_536


def branches(text: tuple[str, ...]) -> list[tuple[int, int]]:
    """From where to where."""
    found = ((i, re.search(r"\bBRA\b.* 0x([0-9a-f]+)$", line)) for i, line in enumerate(text))
    return [(i, int(to[1], 16) // 16) for i, to in found if to]


def loops_over_keys(text: tuple[str, ...], groups: int, around: int = 0) -> list[tuple[int, int]]:
    """First and last instruction of each warpgroup's loop, where all its products are in there, or of the loop around
    that, which is over items.
    """
    products, back = places(text, r"HGMMA[.\w]*"), [(to, i) for i, to in branches(text) if to <= i]
    found = []
    for group in range(groups):
        mine = products[group * len(products) // groups : (group + 1) * len(products) // groups]
        loops = (loop for loop in back if loop[0] <= mine[0] and mine[-1] <= loop[1])
        found.append(sorted(loops, key=lambda loop: loop[1] - loop[0])[around])
    return found


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_three_spill_is_stored_once_and_loaded_outside_of_loops_over_keys(
    is_causal: bool, return_lse: bool
) -> None:
    text = sass(problem(2000, 128, is_causal=is_causal, return_lse=return_lse), THREE)
    assert len(places(text, r"HGMMA[.\w]*")) == 3 * 16
    for operation, loops in (("LDL", loops_over_keys(text, 3)), ("STL", loops_over_keys(text, 3, around=1))):
        found = places(text, rf"{operation}[.\w]*")
        assert not [i for i in found if any(first <= i <= last for first, last in loops)], operation


@pytest.mark.parametrize(
    ("seqlen", "head_dim", "change"),
    [(2048, 64, {}), (2000, 64, {}), (2048, 64, {"return_lse": True}), (2000, 64, {"return_lse": True}), (2048, 48, {}),
     (2048, 32, {"return_lse": True}), (8192, 64, {"is_causal": True}), (8000, 64, {"is_causal": True}),
     (8192, 64, {"is_causal": True, "return_lse": True}), (2000, 40, {"is_causal": True})],
)  # fmt: skip
def test_what_four_spill_is_no_tile_s_but_one_s_that_is_loaded(
    seqlen: int, head_dim: int, change: dict[str, bool]
) -> None:
    return_lse = change.get("return_lse", False)
    text = sass(problem(seqlen, head_dim, **change), FOUR)
    products = 8 + sum(hopper.columns(head_dim, 32)) // 16 + (0 if return_lse else 8)  # PV, QK, sums of weights
    assert len(places(text, r"HGMMA[.\w]*")) == 4 * products
    loads, spills = places(text, r"UTMALDG[.\w]*"), places(text, r"(LDL|STL)[.\w]*")
    for first, last in loops_over_keys(text, 4):
        around = [(i, to) for i, to in branches(text) if first <= i < to <= last and any(i < j < to for j in loads)]
        skipped, back = min(around)
        assert len([j for j in loads if skipped < j < back]) == 2, "keys and values"
        of_each_tile = [i for i in spills if first <= i <= last and not skipped < i < back]
        assert len(of_each_tile) <= (NEWEST and return_lse), "a register of one warpgroup, with 3.9 and lse"


@SPECIALIZED
def test_products_of_warpgroups(asked: Problem, config: Config) -> None:
    d, parts = sum(hopper.columns(asked.head_dim, 32)), filter(None, hopper.columns(asked.head_dim_v, 64))
    times = config.num_warps // 4 * (2 if config is TWO else 1)  # the first tile's QK and the last one's PV apart
    values = {f"64x{dv}x16 R": times * config.block_n // 16 for dv in parts}
    if config is not TWO and not asked.return_lse and max(asked.head_dim, asked.head_dim_v) <= 64:
        values["64x8x16 R"] = times * config.block_n // 16  # ones, which add up the weights
    assert shapes(asked, config) == {"64x128x16": times * d // 16, **values}
    assert not re.findall(r"C75\d\d", ptxas(code(asked, config).ptx))


@SPECIALIZED
def test_one_warp_loads_for_all_or_each_in_turn(asked: Problem, config: Config) -> None:
    text = sass(asked, config)
    groups = config.num_warps // 4
    boxes = 2 if hopper.block_of(asked.head_dim) > 64 else 1  # TMA's swizzled rows are 128 bytes
    boxes_v = 2 if hopper.block_of(asked.head_dim_v) > 64 else 1
    loads, stores = places(text, r"UTMALDG[.\w]*"), places(text, r"UTMASTG[.\w]*")
    if config is FOUR:
        assert len(loads) == 4 * groups + 4 + 6 * asked.is_causal, (
            "the first item's q and every next one's, a tile, two ahead of all, and what later rows alone see"
        )
    else:
        assert len(loads) == (groups + 2) * boxes + 2 * boxes_v, "the first keys apart, around q"
    assert len(stores) == groups
    if not may_spill(asked, config):
        assert not places(text, r"(LDL|STL)(\.\S+)?")
    assert not places(text, r"(LDG|LD|LDGSTS|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED)(\.\S+)?")
    assert len(places(text, r"LDS[.\w]*")) == 1, "what a warp is to do"
    assert len(places(text, r"STG(\.\S+)?")) == (2 * groups if asked.return_lse else 0)


@SPECIALIZED
def test_softmax_runs_under_products_or_in_turn(asked: Problem, config: Config) -> None:
    text = sass(asked, config)
    kinds = {"H": r"HGMMA[.\w]*", "W": r"WARPGROUP\.DEPBAR[.\w]*", "E": r"MUFU\.EX2"}
    order = sorted((i, kind) for kind, pattern in kinds.items() for i in places(text, pattern))
    line = re.sub(r"(.)\1+", r"\1", "".join(kind for _, kind in order))
    groups = config.num_warps // 4
    if config is not TWO:
        turns = rf"(HWE(HE)+HW){{{groups}}}"
        assert re.fullmatch(turns, line), "QK, its wait, half a softmax, the rest with PV under way, its wait"
    else:
        assert line == "HWEHWEWHW" * groups, "in the loop both products, QK's wait, softmax, PV's wait"


def test_warp_specialised_code_has_a_key_to_be_kept_under() -> None:
    from flashcore.kernels.hopper.specialized import attention_forward_specialized

    assert re.fullmatch(r"[0-9a-f]{64}", attention_forward_specialized.cache_key)
