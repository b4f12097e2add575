"""Faults to plant in the portable kernel: do the gates notice each of them?

A mutant replaces one fragment of the shipped source, kernel or binding, so that what is tested is the real code with
one thing wrong. Each is a mistake that somebody has made or nearly made: an edge off by one, a factor forgotten, a
precision lost, a row not written.
"""

from __future__ import annotations

import importlib.util
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
        """The file's text with the fault in it.

        Raises:
            ValueError: the fragment is not there exactly once: the source has moved on, and the mutant has to follow.
        """
        text = (_PACKAGE / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {text.count(self.old)} times in {self.file}: {self.old!r}")
        return text.replace(self.old, self.new)


def plant(mutant: Mutant) -> ModuleType:
    """Import the faulty copy under a name of its own; the shipped module stays as it is."""
    folder = tempfile.TemporaryDirectory(prefix="flashcore-mutant-")
    name = "flashcore_mutant_" + mutant.name.replace(" ", "_")
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
    Mutant("scores in fp16", KERNEL, "scores, LOG2E if BIAS", "scores.to(tl.float16).to(tl.float32), LOG2E if BIAS"),
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
