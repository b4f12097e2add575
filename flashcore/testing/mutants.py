"""Faults to plant in the portable kernel: do the gates notice each of them?

A mutant replaces one fragment of the shipped source, kernel or binding, so that what is tested is the real code with
one thing wrong. Each is a mistake that somebody has made or nearly made: an edge off by one, a factor forgotten, a
precision lost, a row not written.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parents[1]
KERNEL = "kernels/portable/attention.py"
BINDING = "launch/portable.py"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fragment of one source file, and what stands there instead."""

    name: str
    file: str  # below flashcore/
    old: str  # occurs exactly once in the file
    new: str

    def source(self) -> str:
        """The file's text with the fault in it; the copy's neighbours are where the shipped module's are.

        Raises:
            ValueError: the fragment is not there exactly once: the source has moved on, and the mutant has to follow.
        """
        text = (_PACKAGE / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {text.count(self.old)} times in {self.file}: {self.old!r}")
        package = self.file.rsplit("/", 1)[0].replace("/", ".")
        return text.replace(self.old, self.new).replace("from .", f"from flashcore.{package}.")


def plant(mutant: Mutant) -> ModuleType:
    """Import the faulty copy under a name of its own; the shipped module stays as it is."""
    folder = tempfile.TemporaryDirectory(prefix="flashcore-mutant-")
    name = "flashcore_mutant_" + re.sub(r"\W", "_", mutant.name)
    path = Path(folder.name) / f"{name}.py"
    path.write_text(mutant.source())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["_folder"] = folder  # Triton reads the source again when a kernel first runs
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_PLANTED = (
    # -- softmax
    Mutant("maximum of this tile alone", KERNEL, "tl.maximum(row_max, tl.max(scores, 1) * qk_scale)",
           "tl.max(scores, 1) * qk_scale"),
    Mutant("maximum never raised", KERNEL, "new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)",
           "new_max = tl.where(row_max == LOWEST, tl.max(scores, 1) * qk_scale, row_max)"),
    Mutant("maximum not scaled", KERNEL, "tl.max(scores, 1) * qk_scale", "tl.max(scores, 1)"),
    Mutant("stale maximum in the weights", KERNEL, "scores * qk_scale - new_max[:, None]",
           "scores * qk_scale - tl.where(row_max == LOWEST, new_max, row_max)[:, None]"),
    Mutant("rescale upside down", KERNEL, "tl.math.exp2(row_max - new_max)", "tl.math.exp2(new_max - row_max)"),
    Mutant("sum not rescaled", KERNEL, "row_sum * rescale + tl.sum(weights, 1)", "row_sum + tl.sum(weights, 1)"),
    Mutant("sum of the last tile alone", KERNEL, "row_sum * rescale + tl.sum(weights, 1)", "tl.sum(weights, 1)"),
    Mutant("accumulator not rescaled", KERNEL, "acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED)",
           "acc = multiply(weights, v_tile, acc, EMULATED)"),
    Mutant("second accumulator not rescaled", KERNEL, "acc_rest * rescale[:, None]", "acc_rest"),
    Mutant("base e for base 2", KERNEL, "tl.math.exp2(scores * qk_scale - new", "tl.exp(scores * qk_scale - new"),
    Mutant("maximum starts at 0", KERNEL, "tl.constexpr(-3.4028234663852886e38)", "tl.constexpr(0.0)"),
    Mutant("maximum starts at a small sentinel", KERNEL, "tl.constexpr(-3.4028234663852886e38)",
           "tl.constexpr(-1000.0)"),
    Mutant("sum starts above 0", KERNEL, "row_sum = tl.zeros([BLOCK_M], tl.float32)",
           "row_sum = tl.full([BLOCK_M], 1e-3, tl.float32)"),
    # -- precision
    Mutant("weights with 8 bits", KERNEL, "weights = narrow(weights, v_tile.dtype, EMULATED)",
           "weights = narrow((weights * 256.0 + 0.5).to(tl.int32).to(tl.float32) / 256.0, v_tile.dtype, EMULATED)"),
    Mutant("weights cut instead of rounded", KERNEL, "bits + 0x7FFF + ((bits >> 16) & 1)", "bits & -65536"),
    Mutant("accumulator in fp16", KERNEL, "acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED)",
           "acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED).to(tl.float16).to(tl.float32)"),
    Mutant("sum in fp16", KERNEL, "row_sum * rescale + tl.sum(weights, 1)",
           "(row_sum * rescale + tl.sum(weights, 1)).to(tl.float16).to(tl.float32)"),
    Mutant("scores in fp16", KERNEL, "scores, qk_scale if cap is None else LOG2E, row",
           "scores.to(tl.float16).to(tl.float32), qk_scale if cap is None else LOG2E, row"),
    Mutant("result 0.1% too large", KERNEL, "acc * (1.0 / row_sum)[:, None]", "acc * (1.001 / row_sum)[:, None]"),
    # -- scale and lse
    Mutant("scale without log2 e", BINDING, "score_scalars(p, scale)", "score_scalars(p, scale * 0.6931471805599453)"),
    Mutant("scale 0.3% too large", BINDING, "score_scalars(p, scale)", "score_scalars(p, 1.003 * scale)"),
    Mutant("sign of scale lost", BINDING, "scale < 0", "False"),
    Mutant("scale of 0 kept", BINDING, "score_scalars(p, scale)",
           "score_scalars(p, scale) | ({} if scale else {'qk_scale': Scalar('fp32', 0.0)})"),
    Mutant("lse in base 2", KERNEL, "(row_max + tl.math.log2(row_sum)) * LN2", "row_max + tl.math.log2(row_sum)"),
    Mutant("lse without the maximum", KERNEL, "(row_max + tl.math.log2(row_sum)) * LN2", "tl.math.log2(row_sum) * LN2"),
    Mutant("ln 2 with 4 digits", KERNEL, "0.6931471805599453", "0.6931"),
    Mutant("lse of a blind row finite", KERNEL, "log_sum = tl.where(saw_nothing, NEGATIVE_INFINITY, ",
           "log_sum = tl.where(saw_nothing, LOWEST, "),
    Mutant("lse of every batch in the first", KERNEL, " * heads + head) * seqlen_q", " * 0 + head) * seqlen_q"),
    Mutant("lse of the last row unwritten", KERNEL, "log_sum, mask=rows < seqlen_q",
           "log_sum, mask=rows < seqlen_q - 1"),
    # -- masks and tiles
    Mutant("diagonal hidden", KERNEL, "keys[None, :] <= rows[:, None] + last_key",
           "keys[None, :] < rows[:, None] + last_key"),
    Mutant("one key beyond the diagonal", KERNEL, "keys[None, :] <= rows[:, None] + last_key",
           "keys[None, :] <= rows[:, None] + last_key + 1"),
    Mutant("diagonal from the top left", KERNEL, "keys[None, :] <= rows[:, None] + last_key",
           "keys[None, :] <= rows[:, None]"),
    Mutant("one key beyond the end", KERNEL, "else:\n        visible = (keys < seqlen_k)",
           "else:\n        visible = (keys <= seqlen_k)"),
    Mutant("last key hidden", KERNEL, "else:\n        visible = (keys < seqlen_k)",
           "else:\n        visible = (keys < seqlen_k - 1)"),
    Mutant("hidden scores finite", KERNEL, "tl.where(visible, scores, NEGATIVE_INFINITY)",
           "tl.where(visible, scores, -1e9)"),
    Mutant("diagonal tile skipped", KERNEL, "start_m + BLOCK_M + last_key))", "start_m + last_key))"),
    Mutant("diagonal tile without its mask", KERNEL, "start_m + 1 + last_key", "start_m + BLOCK_M + last_key"),
    Mutant("last tile without its mask", KERNEL, "whole = whole // BLOCK_N * BLOCK_N",
           "whole = (whole + BLOCK_N - 1) // BLOCK_N * BLOCK_N"),
    Mutant("last tile skipped", KERNEL, "    end = seqlen_k\n", "    end = seqlen_k - BLOCK_N\n"),
    Mutant("first tile skipped", KERNEL, "    begin = 0\n", "    begin = BLOCK_N\n"),
    Mutant("blind rows divide by 0", KERNEL, "row_sum = tl.where(saw_nothing, 1.0, row_sum)", "row_sum = row_sum"),
    Mutant("blind rows keep what they multiplied", KERNEL, "tl.where(saw_nothing[:, None], 0.0, result)", "result"),
    Mutant("left edge one key too far", KERNEL, "keys[None, :] >= diagonal - left)",
           "keys[None, :] >= diagonal - left - 1)"),
    Mutant("left edge one key too near", KERNEL, "keys[None, :] >= diagonal - left)",
           "keys[None, :] > diagonal - left)"),
    Mutant("right edge one key too far", KERNEL, "keys[None, :] <= diagonal + right)",
           "keys[None, :] <= diagonal + right + 1)"),
    Mutant("right edge one key too near", KERNEL, "keys[None, :] <= diagonal + right)",
           "keys[None, :] < diagonal + right)"),
    Mutant("window's first tile skipped", KERNEL, "(0, start_m + last_key - left) // BLOCK_N * BLOCK_N",
           "(0, start_m + last_key - left + BLOCK_N - 1) // BLOCK_N * BLOCK_N"),
    Mutant("window begins where its last row does", KERNEL, "(0, start_m + last_key - left)",
           "(0, start_m + BLOCK_M + last_key - left)"),
    Mutant("window ends with its first row", KERNEL, "start_m + BLOCK_M + last_key + right",
           "start_m + last_key + right"),
    Mutant("window's diagonal from the top left", KERNEL, "diagonal = rows[:, None] + last_key",
           "diagonal = rows[:, None]"),
    Mutant("window without the end of the keys", KERNEL,
           "        visible = (keys < seqlen_k)[None, :]\n        visible &= (",
           "        visible = (keys >= 0)[None, :]\n        visible &= ("),
    Mutant("window's sides swapped", BINDING, "    args |= score_scalars(p, scale)\n",
           "    args |= score_scalars(p, scale)\n    if p.window != (-1, -1):\n"
           "        args['left'], args['right'] = args['right'], args['left']\n"),
    # -- masks and caps that the caller gives
    Mutant("bool mask upside down", KERNEL, "tl.where(values != 0, scores, NEG", "tl.where(values == 0, scores, NEG"),
    Mutant("bool mask hides with a finite score", KERNEL, "tl.where(values != 0, scores, NEGATIVE_INFINITY)",
           "tl.where(values != 0, scores, -1e9)"),
    Mutant("hidden NaN stays", KERNEL, "tl.where(bias == NEGATIVE_INFINITY, NEGATIVE_INFINITY, scores * scale + bias)",
           "scores * scale + bias"),
    Mutant("bias scaled too", KERNEL, "scores * scale + bias)", "(scores + bias) * scale)"),
    Mutant("bias in units of log2", KERNEL, "scores * scale + bias)", "scores * scale + bias * LN2)"),
    Mutant("bias not added", KERNEL, "scores * scale + bias)", "scores * scale)"),
    Mutant("bias through fp16", KERNEL, "bias = values.to(tl.float32)", "bias = values.to(tl.float16).to(tl.float32)"),
    Mutant("low bias times log2 e", KERNEL, "tl.math.exp2((scores - new_max[:, None]) * LOG2E)",
           "tl.math.exp2(scores * LOG2E - new_max[:, None] * LOG2E)"),
    Mutant("rescale of a bias in the wrong base", KERNEL, "tl.math.exp2((row_max - new_max) * LOG2E)",
           "tl.math.exp2(row_max - new_max)"),
    Mutant("lse of a bias in base 2", KERNEL, "row_max + tl.math.log2(row_sum) * LN2",
           "row_max + tl.math.log2(row_sum)"),
    Mutant("rows of the mask forgotten", KERNEL, "offsets += rows[:, None] * stride_mm",
           "offsets += rows[:, None] * 0"),
    Mutant("rows of the mask from the first tile on", KERNEL, " * MASK_UNIT + start_m.to(tl.int64) * stride_mm",
           " * MASK_UNIT"),
    Mutant("keys of the mask from the first tile on", KERNEL, "            mask += start_n\n",
           "            mask += 0\n"),
    Mutant("strided keys of the mask from the first tile on", KERNEL, "mask += tl.cast(start_n, tl.int64) * stride_mn",
           "mask += 0"),
    Mutant("keys of the mask side by side", KERNEL, "offsets += keys[None, :] * stride_mn", "offsets += keys[None, :]"),
    Mutant("mask of the next key", KERNEL, "            offsets += keys[None, :]\n",
           "            offsets += keys[None, :] + 1\n"),
    Mutant("mask of the first batch for all", KERNEL, "mask += (batch * stride_mb + head * stride_mh) * MASK_UNIT",
           "mask += (head * stride_mh) * MASK_UNIT"),
    Mutant("mask of the first head for all", KERNEL, "mask += (batch * stride_mb + head * stride_mh) * MASK_UNIT",
           "mask += (batch * stride_mb) * MASK_UNIT"),
    Mutant("mask of the key head", KERNEL, "mask += (batch * stride_mb + head * stride_mh) * MASK_UNIT",
           "mask += (batch * stride_mb + head // GROUP * stride_mh) * MASK_UNIT"),
    Mutant("unit of the mask's strides forgotten", KERNEL, "stride_mm = stride_mm.to(MASK_OFFSET) * MASK_UNIT",
           "stride_mm = stride_mm.to(MASK_OFFSET)"),
    Mutant("strides of the mask reversed", BINDING, 'zip("bhm", outer', 'zip("bmh", outer'),
    Mutant("one row of a mask for all", BINDING, "int(row != 0)", "0"),
    Mutant("one key of a mask for all", BINDING, "min(key, 2)", "0"),
    Mutant("strided mask read side by side", BINDING, "min(key, 2)", "min(key, 1)"),
    Mutant("bias capped, too", KERNEL,
           "        if cap is not None:  # tanh by exp2: the hardware's own is right to 11 bits only\n",
           "        if mask is not None:\n            scores = apply_mask(\n"
           "                scores, 1.0, mask, stride_mm, stride_mn, start_n, n_rows, seqlen_k, BLOCK_M, BLOCK_N,\n"
           "                MASK_M, MASK_N, not EVEN_M, BOUND)\n"
           "        if cap is not None:\n"),
    Mutant("cap without its factor", KERNEL, "cap - 2.0 * cap / (1.0 +", "1.0 - 2.0 / (1.0 +"),
    Mutant("half the cap", KERNEL, "cap - 2.0 * cap / (1.0 +", "cap - 1.0 * cap / (1.0 +"),
    Mutant("cap by a curve half as steep", BINDING, "score_scalars(p, scale)",
           "score_scalars(p, scale * (0.5 if p.softcap else 1.0))"),
    Mutant("scale applied once more after the cap", KERNEL, "scores, qk_scale if cap is None else 1.0, mask",
           "scores, qk_scale, mask"),
    Mutant("logits of a cap in base 2", KERNEL, "scores, qk_scale if cap is None else LOG2E, row",
           "scores, qk_scale if cap is None else 1.0, row"),
    # -- lengths on the device
    Mutant("lengths beyond the keys believed", KERNEL,
           "tl.minimum(tl.maximum(tl.load(seqused_k + batch), 0), seqlen_k)",
           "tl.maximum(tl.load(seqused_k + batch), 0)"),
    Mutant("lengths below 0 believed", KERNEL, "tl.minimum(tl.maximum(tl.load(seqused_k + batch), 0), seqlen_k)",
           "tl.minimum(tl.load(seqused_k + batch) & 0x7FFFFFFF, seqlen_k)"),
    Mutant("length of the first sequence for all", KERNEL, "tl.load(seqused_k + batch)", "tl.load(seqused_k)"),
    Mutant("one key more than are used", KERNEL, "tl.load(seqused_k + batch)", "tl.load(seqused_k + batch) + 1"),
    Mutant("diagonal within the padding", KERNEL, "    last_key = seqlen_k - seqlen_q\n",
           "    last_key = seqlen_k - seqlen_q + (0 if seqused_k is None else 2)\n"),
    Mutant("padding read as keys that count", BINDING, "p.seqlen_k % config.block_n == 0 and not p.ragged",
           "p.seqlen_k % config.block_n == 0"),
    Mutant("cu_seqlens_k off by one", KERNEL, "length_of(cu_seqlens_k, batch, total_k, seqlen_k)",
           "length_of(cu_seqlens_k + 1, batch, total_k, seqlen_k)"),
    Mutant("keys by the rows' cu_seqlens", KERNEL, "length_of(cu_seqlens_k, batch, total_k, seqlen_k)",
           "length_of(cu_seqlens_q, batch, total_k, seqlen_k)"),
    Mutant("cu_seqlens beyond the tensor believed", KERNEL,
           "tl.minimum(tl.maximum(tl.load(cu_seqlens + batch + 1), first), total)",
           "tl.maximum(tl.load(cu_seqlens + batch + 1), first)"),
    Mutant("cu_seqlens that fall give a length", KERNEL, "tl.maximum(tl.load(cu_seqlens + batch + 1), first)",
           "tl.abs(tl.load(cu_seqlens + batch + 1) - first) + first"),
    Mutant("cu_seqlens below 0 believed", KERNEL, "first = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0)",
           "first = tl.minimum(tl.load(cu_seqlens + batch)"),
    Mutant("tiles of a short sequence counted from the rows alone", KERNEL,
           "where(reached, row // BLOCK_M + batch, -1)", "where(reached, row // BLOCK_M, -1)"),
    Mutant("a sequence's first tile to the one before", KERNEL, "+ batch <= number)", "+ batch < number)"),
    Mutant("longest sequence not held to", KERNEL, "tl.minimum(end - first, longest)", "end - first"),
    Mutant("first row of a sequence forgotten", KERNEL, "q += first_row.to(tl.int64) * stride_qm", "q += 0"),
    Mutant("rows written from the first on", KERNEL, "o += first_row.to(tl.int64) * stride_om", "o += 0"),
    Mutant("values of another sequence", KERNEL, "v += first_key.to(tl.int64) * stride_vn",
           "v += first_row.to(tl.int64) * stride_vn"),
    Mutant("lse of a sequence in the first rows", KERNEL, "first = head * total_q + first_row",
           "first = head * total_q"),
    Mutant("packed rows beyond the end written", BINDING, "p.seqlen_q % config.block_m == 0 and not p.packed",
           "p.seqlen_q % config.block_m == 0"),
    # -- addresses
    Mutant("key heads in turn", KERNEL, "batch * stride_kb + head // GROUP * stride_kh",
           "batch * stride_kb + head % (heads // GROUP) * stride_kh"),
    Mutant("value head of the next group", KERNEL, "batch * stride_vb + head // GROUP * stride_vh",
           "batch * stride_vb + (heads - 1 - head) // GROUP * stride_vh"),
    Mutant("batch of k forgotten", KERNEL, "batch * stride_kb + head", "head"),
    Mutant("strides of q for the output", KERNEL, "batch * stride_ob + head * stride_oh",
           "batch * stride_qb + head * stride_qh"),
    Mutant("strides of k and v swapped", BINDING, '"k": p.stride_k, "v": p.stride_v',
           '"k": p.stride_v, "v": p.stride_k'),
    Mutant("row of v in the wrong unit", KERNEL, "load_rows(v, start_n, keys, stride_vn, seqlen_k, 0,",
           "load_rows(v, start_n, keys, stride_vn // 8, seqlen_k, 0,"),
    Mutant("causal tiles one further", KERNEL, "tl.num_programs(1) - 1 - slow", "tl.num_programs(1) - slow"),
    Mutant("one column beyond the row", KERNEL, "tl.load(tile, mask=(cols < DIM)[None, :], other=0.0)",
           "tl.load(tile, mask=(cols <= DIM)[None, :], other=0.0)"),
    Mutant("rows beyond the end", BINDING, "p.seqlen_k % config.block_n == 0", "True"),
    Mutant("second columns of k forgotten", KERNEL, "scores = multiply(q_rest, k_rest.T, scores, EMULATED)",
           "scores = scores"),
    # -- writing
    Mutant("last row unwritten", KERNEL, "tl.store(tile, result, mask=(first + rows < n_rows)[:, None])",
           "tl.store(tile, result, mask=(first + rows < n_rows - 1)[:, None])"),
    Mutant("a row too many written", KERNEL, "tl.store(tile, result, mask=(first + rows < n_rows)[:, None])",
           "tl.store(tile, result, mask=(first + rows <= n_rows)[:, None])"),
    Mutant("a column too many written", KERNEL, "mask=(first + rows < n_rows)[:, None] & (cols < DIM)[None, :])",
           "mask=(first + rows < n_rows)[:, None] & (cols <= DIM)[None, :])"),
    Mutant("whole tiles written", BINDING, "p.seqlen_q % config.block_m == 0", "True"),
    Mutant("second columns unwritten", KERNEL, "    if REST_DV:\n        store_rows(",
           "    if REST_DV > 64:\n        store_rows("),
)  # fmt: skip
MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutant in _PLANTED}
