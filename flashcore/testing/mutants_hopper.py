"""Faults to plant in the Hopper kernel, as mutants.py has them for the portable one; each with the trial that shows it.

None of them touches a barrier or the bytes it waits for: a kernel that hangs shows nothing but that it hangs.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.testing.mutants import Mutant

KERNEL = "kernels/hopper/attention.py"
SOFTMAX = "kernels/hopper/softmax.py"
SPECIALIZED = "kernels/hopper/specialized.py"
WORK = "kernels/hopper/work.py"
BINDING = "launch/hopper.py"


@dataclass(frozen=True, slots=True)
class HopperMutant(Mutant):
    """A mutant, and the name of the trial that has to catch it (tests/kernels/hopper_mutants.py has them)."""

    trial: str = "plain"


def _kernel(name: str, old: str, new: str, trial: str = "plain") -> HopperMutant:
    return HopperMutant(name, KERNEL, old, new, trial)


def _softmax(name: str, old: str, new: str, trial: str = "plain") -> HopperMutant:
    return HopperMutant(name, SOFTMAX, old, new, trial)


def _specialized(name: str, old: str, new: str, trial: str = "shared") -> HopperMutant:
    return HopperMutant(f"specialized: {name}", SPECIALIZED, old, new, trial)


def _work(name: str, old: str, new: str, trial: str = "shared") -> HopperMutant:
    return HopperMutant(f"specialized: {name}", WORK, old, new, trial)


def _binding(name: str, old: str, new: str, trial: str = "plain") -> HopperMutant:
    return HopperMutant(name, BINDING, old, new, trial)


_FIRST = "batch, head // GROUP, first_k, length, longest_k, key, {0}_full, {0}_box, exists"

_PLANTED = (
    # -- softmax
    _softmax("maximum of this tile alone", "new_m = gl.maximum(m, new_m)", "new_m = new_m", "large logits"),
    _softmax("maximum not scaled", "top * qk_scale", "top"),
    _softmax("the least of four maxima", "gl.max(few, 1)", "gl.min(few, 1)", "large logits"),
    _softmax("rescale upside down", "else m - base)", "else base - m)"),
    _softmax("rescale beside a bias in base 2", "gl.exp2((m - base) * LOG2E if", "gl.exp2((m - base) if", "fp32 bias"),
    _kernel("scores beside a bias in base 2", "if cap is None and not BIAS else LOG2E", "if cap is None else LOG2E",
            "bias"),
    _kernel("sum of weights beside a bias not rescaled", "weight = times(weight, alpha)", "weight = weight", "bias"),
    _kernel("NaN where a bias hides", "p = hide_pairs(p, mask_parts[nth])", "p = p", "hidden NaN"),
    _kernel("sum not rescaled", "times(l, alpha) + sums", "l + sums"),
    _kernel("sum of the last slices left out", "l += sums", "l += 0.0 * sums"),
    _kernel("scores of the first slice twice", "weights(s_parts[nth]", "weights(s_parts[0]"),
    _kernel("values of the first slice twice", "v_tile.slice(nth * p.shape[1]", "v_tile.slice(0 * p.shape[1]"),
    _kernel("bias of the first slice twice", "mask_parts[nth]", "mask_parts[0]", "hidden NaN"),
    _kernel("values of the tile before", "longest_k, key, v_full, v_box, loads > 0)",
            "longest_k, key - BLOCK_N, v_full, v_box, loads > 0)", "columns"),
    _kernel("values of this tile again", "longest_k, load_key, v_full, v_box, refill)",
            "longest_k, load_key - BLOCK_N, v_full, v_box, refill)"),
    _kernel("accumulator not rescaled", " acc = times(acc, alpha)", " acc = acc"),
    _kernel("accumulator of the second part not rescaled", "more_acc = times(more_acc, alpha)", "more_acc = more_acc",
            "columns"),
    _softmax("base e for base 2", "p = gl.exp2((s", "p = gl.exp((s"),
    # -- precision
    _kernel("weights with 8 bits", "p = p.to(dtype)",
            "p = ((p * 256.0 + 0.5).to(gl.int32).to(gl.float32) / 256.0).to(dtype)"),
    _kernel("accumulator in fp16", "acc = warpgroup_mma_wait(0, deps=(acc,) + operands)[0]",
            "acc = warpgroup_mma_wait(0, deps=(acc,) + operands)[0].to(gl.float16).to(gl.float32)",
            "many keys"),
    _kernel("scores in fp16", "s = warpgroup_mma_wait(0, deps=(scores,))",
            "s = warpgroup_mma_wait(0, deps=(scores,)).to(gl.float16).to(gl.float32)", "wide"),
    _kernel("result 0.1% too large", "reciprocal(divisor)", "reciprocal(divisor) * 1.001"),
    _binding("scale 0.3% too large", "block_m)\n    args |= score_scalars(p, scale)",
             "block_m)\n    args |= score_scalars(p, 1.003 * scale)"),
    _kernel("sign of scale lost", "s = -s", "s = s", "negative scale"),
    _binding("scale counts as positive", '"NEGATE": scale < 0, "PERS', '"NEGATE": False, "PERS', "negative scale"),
    # -- lse
    _kernel("lse in base 2", "else m * LN2", "else m"),
    _kernel("lse of every batch in the first", "(batch.to(gl.int64) * heads + head)",
            "(batch.to(gl.int64) * 0 + head)"),
    _kernel("lse of the last row unwritten", "mask=rows < seqlen_q)", "mask=rows < seqlen_q - 1)"),
    # -- masks and tiles
    _softmax("one key beyond the end", "end = seqlen_k - key ", "end = seqlen_k - key + 1 "),
    _softmax("last key hidden", "end = seqlen_k - key ", "end = seqlen_k - key - 1 "),
    _binding("keys beyond the end", '"EVEN_N": p.seqlen_k % config.block_n == 0 and not p.ragged', '"EVEN_N": True'),
    _kernel("keys beyond the end of a narrow tile", "if (SINGLE and MASKED) or part:", "if SINGLE and MASKED:",
            "narrow tile"),
    _binding("a narrow tile too narrow", '"TAIL": tail_tile(p, config.block_n)',
             '"TAIL": tail_tile(p, config.block_n) // 2',
             "narrow tile, persistent"),
    _kernel("columns of the second part left out", "    if MORE_D:\n", "    if MORE_D > 999:\n", "columns"),
    _softmax("diagonal hidden", "end = row + shift + 1 - key", "end = row + shift - key",
             "causal"),
    _softmax("one key beyond the diagonal", "end = row + shift + 1 - key", "end = row + shift + 2 - key", "causal"),
    _kernel("diagonal from the top left", "    shift = seqlen_k - seqlen_q\n    begin = 0",
            "    shift = 0\n    begin = 0", "causal"),
    _kernel("diagonal tile skipped", "row + shift + ROWS) if CAUSAL", "row + shift) if CAUSAL", "causal"),
    _kernel("diagonal tile skipped where lengths are the device's", "row + BLOCK_M + shift)\n", "row + shift)\n",
            "causal lengths"),
    _kernel("narrow tiles all in one place", "+ (tile - wide) * TAIL if part", "+ (tile - wide) * 0 if part",
            "causal"),
    _kernel("a narrow tile's keys twice", "key + TAIL if part", "key if part", "causal"),
    _kernel("diagonal tile without its mask", "visible = gl.minimum(visible, row + shift + 1)",
            "visible = gl.minimum(visible, row + shift + BLOCK_M)", "causal"),
    _softmax("blind rows keep what they multiplied", "out = gl.where(empty[:, None], 0.0, out)", "out = out", "blind"),
    _binding("no row counts as blind", '"EMPTY_ROWS": _empty_rows(p)', '"EMPTY_ROWS": False', "blind"),
    _softmax("hidden scores finite", 'gl.where(eight >= end - column, -float("inf"), eights)',
             "gl.where(eight >= end - column, -1e9, eights)", "blind"),
    _softmax("window one key too wide", "eight < diagonal - left - column", "eight < diagonal - left - 1 - column",
             "window"),
    _softmax("window one key too narrow", "end = gl.minimum(end, diagonal + right + 1)",
             "end = gl.minimum(end, diagonal + right)", "window"),
    _kernel("window's first tile without its mask", "hidden = row + BLOCK_M - 1 + shift - left",
            "hidden = row + shift - left - BLOCK_N", "window"),
    _kernel("half of the cap", "s = cap - 2.0 * cap /", "s = cap - cap /", "soft cap"),
    _softmax("scores beside a bias not scaled", "s * scale + bias", "s + bias", "bias"),
    _softmax("mask turned round", "gl.where(mask == 0,", "gl.where(mask != 0,", "mask"),
    _binding("mask of the first head", "int(p.mask is not None and p.mask.strides[1] != 0)", "0", "mask"),
    _kernel("lengths ignored", "seqlen_k = _used(seqused_k, batch, longest_k)", "seqlen_k = longest_k", "lengths"),
    _kernel("a sequence's last narrow tile skipped", "if CAUSAL else seqlen_k\n", "if CAUSAL else seqlen_k - TAIL\n",
            "lengths"),
    _kernel("a narrow tile for a wide end", "whole * BLOCK_N > TAIL)", "whole * BLOCK_N > BLOCK_N)", "few lengths"),
    _kernel("turns of two sequences the same", "gl.associative_scan(one, 0, _add) - one",
            "gl.associative_scan(one, 0, _add) - 1", "sorted"),
    _kernel("turns of each quarter from the first on", "gl.sum(one, 0) * 0x01010100", "gl.sum(one, 0) * 0", "sorted"),
    _kernel("next sequence not by its turn", "next_batch = _whose(turns, next_batch, SORTED, WARPS)",
            "next_batch = next_batch", "sorted, persistent"),
    _kernel("keys of the first sequence", "first_k, seqlen_k = _rows_of(cu_seqlens_k, batch, total_k, longest_k)",
            "first_k, seqlen_k = _rows_of(cu_seqlens_k, batch, total_k, longest_k)\n        first_k = first_k * 0",
            "packed"),
    _kernel("tiles of a short sequence counted from the rows alone", "gl.where(reached, row // BLOCK_M + batch, -1)",
            "gl.where(reached, row // BLOCK_M, -1)", "packed, short"),
    # -- addresses
    _kernel("key heads in turn", f"_load(k_desc, {_FIRST.format('k')}",
            f"_load(k_desc, {_FIRST.format('k').replace('head // GROUP', 'head % (heads // GROUP)')}"),
    _kernel("value heads in turn", f"_load(v_desc, {_FIRST.format('v')}",
            f"_load(v_desc, {_FIRST.format('v').replace('head // GROUP', 'head % (heads // GROUP)')}"),
    _kernel("next item's keys of this batch", "load_batch = gl.where(last, next_batch, batch)", "load_batch = batch",
            "persistent"),
    _kernel("next item's keys of this head", "load_head = gl.where(last, next_head, head) // GROUP",
            "load_head = head // GROUP", "persistent"),
    _kernel("next item's mask of this head", "gl.where(last, next_head, head) * MASK_H", "head * MASK_H",
            "bias, persistent"),
    _kernel("next item's mask of these rows", "gl.where(last, next_row_tile, row_tile)", "row_tile",
            "bias, persistent"),
    _binding("strides of v for k", 'descriptor("k", keys, p.head_dim, p.stride_k',
             'descriptor("k", keys, p.head_dim, p.stride_v', "strides"),
    _binding("strides of q for the output", "p.head_dim_v, p.stride_o", "p.head_dim_v, p.stride_q", "strides"),
    _binding("last rows unwritten", "row_tiles = -(-p.seqlen_q // rows)\n    pairs",
             "row_tiles = p.seqlen_q // rows\n    pairs"),
    _kernel("heads of the first group of them alone", "gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)",
            "gl.program_id(0)", "causal"),
    # -- query heads of a key head in one block
    _softmax("diagonal by rows where they are of several heads", "- key + place // PACK_GQA", "- key + place",
             "causal, heads in one block"),
    _kernel("lse of the heads of a block mixed up", "+ place % PACK_GQA)", "+ (place + 1) % PACK_GQA)",
            "heads in one block"),
    _kernel("lse of other positions of a block", "rows = row + place // PACK_GQA", "rows = row + place % ROWS",
            "heads in one block"),
    _binding("rows of the next position for the next head", "(sb, sh * pack, sr, sh, 1)", "(sb, sh * pack, sr, sr, 1)",
             "heads in one block"),
    # -- warpgroups that share K and V
    _specialized("accumulator not rescaled", "acc = _rescaled(acc, alpha, values)\n                if", "if"),
    _specialized("accumulator of the second part not rescaled", "times(acc[1], alpha)", "acc[1]", "shared, columns"),
    _specialized("values of the first columns twice", "product(p, tile.slice(values.COLUMNS, values",
                 "product(p, tile.slice(0, values", "shared, columns"),
    _specialized("sum not rescaled", "if SUMS else times(l, alpha) + sums", "if SUMS else l + sums"),
    _specialized("sum by products not rescaled", "l = times(l, alpha) if SUMS", "l = l if SUMS", "shared, ones"),
    _specialized("sum by products of the first slice alone", "if SUMS:\n                l, again",
                 "if SUMS and nth == 0:\n                l, again", "shared, ones"),
    _specialized("sum by products of all columns", "gl.max(l, 1) if SUMS", "gl.sum(l, 1) if SUMS", "shared, ones"),
    _specialized("sum not rescaled where products overlap", "if FIRST else times(l, alpha) + sums",
                 "if FIRST else l + sums", "shared, causal"),
    _specialized("sum of the last slices left out", "l += sums", "l += 0.0 * sums"),
    _specialized("q of the next item too early", "keys.wait_free(loads - 1, loads > 0)", "keys.wait_free(loads, False)",
                 "shared, many"),
    _specialized("weights of the first slice twice", "weights(s_parts[nth]", "weights(s_parts[0]"),
    _specialized("values of the first slice twice", "tile(place).slice(nth * KEYS", "tile(place).slice(0 * KEYS"),
    _specialized("accumulator not rescaled where products overlap",
                 "acc = _rescaled(acc, alpha, values)\n        loads += 1", "loads += 1", "shared, causal"),
    _specialized("weights of the tile before", "p = next_p.to(dtype)  #", "#", "shared, causal"),
    _specialized("first tile's maximum forgotten", "_softmax(s, m, l, qk_scale, True)",
                 "_softmax(s, m, l, qk_scale, True)\n    m = m - 3.0", "shared, causal"),
    _specialized("keys and values of the head beside, loaded by those who compute",
                 "k_desc, v_desc, batch, head, row)\n    load", "k_desc, v_desc, batch, head ^ 1, row)\n    load",
                 "shared by four"),
    _specialized("the first tile for all, loaded by those who compute",
                 "k_desc, v_desc, batch, head, row)\n    load", "k_desc, v_desc, batch, head, row * 0)\n    load",
                 "shared by four"),
    _specialized("values of another row than keys, loaded by those who compute",
                 "v_desc, [batch, head, row, 0], full,", "v_desc, [batch, head, row + 1, 0], full,",
                 "shared by four"),
    _specialized("each item's first tile for all who go on to it", "row -= end", "row = end * 0", "shared by four"),
    _specialized("keys and values of the item before, loaded by those who compute",
                 "batch = work.item(turn)\n    load", "batch = work.item(turn - 1)\n    load", "shared by four"),
    _specialized("key heads in turn, loaded by those who compute", "head // work.GROUP, batch, work.end(row_tile)\n",
                 "head % (work.heads // work.GROUP), batch, work.end(row_tile)\n", "shared by four, causal"),
    _specialized("q of the first warpgroup for all, loaded by those who compute",
                 "row = (row_tile * q_box.shape[0] + WHICH) * ROWS\n    mbarrier",
                 "row = row_tile * q_box.shape[0] * ROWS\n    mbarrier", "shared by four"),
    _specialized("q of the item before, loaded by those who compute",
                 "row_tile, head, batch = item\n    exists",
                 "row_tile, head, batch = work.item(gl.maximum(turn - 1, 0))\n    exists", "shared by four"),
    _specialized("rows of the first warpgroup for all", "batch, head, row + i * ROWS, 0]", "batch, head, row, 0]"),
    _specialized("key heads in turn", "head_k = head // work.GROUP", "head_k = head % (work.heads // work.GROUP)"),
    _specialized("first keys of the head beside", "k_desc, batch, head_k, 0)", "k_desc, batch, head_k ^ 1, 0)"),
    _specialized("first values of the head beside", "v_desc, batch, head_k, 0)", "v_desc, batch, head_k ^ 1, 0)"),
    _specialized("values of the first tile", "v_desc, batch, head_k, tile * work.BLOCK_N)",
                 "v_desc, batch, head_k, 0)"),
    _work("items of the block beside", "return turn * self.step + gl.where(there, place,",
          "return turn * self.step + gl.where(there, place // 2,", "shared, many"),
    _work("a turn's last item for nobody", "self.step - 1 - place", "self.step - place",
          "shared, causal, many"),
    _work("items that move on past the last block", "divide(place, self.per_step) * self.step", "0", "shared, many"),
    _work("row tiles by twos", "return row_tile, pair", "return row_tile // 2, pair"),
    _work("heads of the first cohort for all", "pair = pair * self.together + place", "pair = place",
          "shared, causal, many"),
    _work("batches mixed up", "batch = divide(pair, self.per_heads)", "batch = divide(pair, self.per_heads) * 0"),
    _work("diagonal tile skipped", "seen, end + self.seqlen_k", "seen, end - 64 + self.seqlen_k", "shared, causal"),
    _specialized("rows that are there left out", "row < work.seqlen_q, tiles", "row + ROWS <= work.seqlen_q, tiles"),
    _specialized("diagonal tile without its mask", "visible = gl.minimum(visible, row + shift + 1)",
                 "visible = gl.minimum(visible, row + shift + 128)", "shared, causal, many"),
    _specialized("sign of scale lost", "s = -s", "s = s", "shared, negative"),
    _specialized("result 0.1% too large", "reciprocal(total)", "reciprocal(total) * 1.001"),
    _specialized("lse in base 2", "m * LN2 +", "m +"),
    _specialized("lse of every batch in the first", "(batch.to(gl.int64) * work.heads", "(batch.to(gl.int64) * 0"),
    _specialized("lse of the last row unwritten", "mask=rows < work.seqlen_q)", "mask=rows < work.seqlen_q - 1)"),
    _binding("specialized: keys beyond the end", '"EVEN_N": p.seqlen_k % config.block_n == 0, "NEG',
             '"EVEN_N": True, "NEG', "shared, negative"),
    _binding("specialized: last rows unwritten", "p.seqlen_q // config.block_m)\n    items = row_tiles * p.heads_q",
             "(p.seqlen_q - 16) // config.block_m)\n    items = row_tiles * p.heads_q", "shared"),
)  # fmt: skip
MUTANTS: dict[str, HopperMutant] = {mutant.name: mutant for mutant in _PLANTED}
