"""The controls of the audit: the shipped kernels with a branch on data planted in them.

- "rescale": skipped where no row's maximum moved by more than 8 in units of log2, as FlashAttention-4 does. Here the
  result would be wrong, since the factor is dropped with the multiplication; what counts is the branch.
- "mask": a step that is taken only where a tile of the mask holds a number above 0, as block-sparse kernels do.
- "length": a number of keys mixed with a number that is no length.
- "pointer": a number of keys read from where the data may be.

The audit must find each wherever it is compiled.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import ModuleType

from flashcore.launch.binding import Binding
from flashcore.testing.mutants import Mutant, plant

_PORTABLE = "kernels/portable/attention.py"
_HOPPER = "kernels/hopper/attention.py"
_SPECIALIZED = "kernels/hopper/specialized.py"
CONTROLS: dict[str, dict[str, Mutant]] = {
    "portable": {
        "rescale": Mutant(
            "conditional rescale, portable",
            _PORTABLE,
            "acc = multiply(weights, v_tile, acc * rescale[:, None], EMULATED)",
            """if tl.min(rescale, 0) < 0.00390625:
            acc = acc * rescale[:, None]
        acc = multiply(weights, v_tile, acc, EMULATED)""",
        ),
        "mask": Mutant(
            "skipped mask, portable",
            _PORTABLE,
            "        bias = values.to(tl.float32)\n",
            """        bias = values.to(tl.float32)
        if tl.max(tl.max(bias, 1), 0) > 0:
            scores = tl.math.exp2(scores)
""",
        ),
        "length": Mutant(
            "length of data, portable",
            _PORTABLE,
            "tl.load(seqused_k + batch)",
            "tl.load(seqused_k + batch) + tl.load(q).to(tl.int32)",
        ),
        "pointer": Mutant(
            "length from data, portable",
            _PORTABLE,
            "tl.load(seqused_k + batch)",
            "tl.load(tl.where(batch > 1, seqused_k, q.to(tl.pointer_type(tl.int32), bitcast=True)) + batch)",
        ),
    },
    "hopper": {
        "rescale": Mutant(
            "conditional rescale, hopper",
            _HOPPER,
            "                            acc = times(acc, alpha)\n",
            """                            if gl.min(alpha, 0) < 0.00390625:
                                acc = times(acc, alpha)
""",
        ),
        "specialized rescale": Mutant(
            "conditional rescale, specialized",
            _SPECIALIZED,
            "        acc = _rescaled(acc, alpha, values)\n        loads += 1\n",
            """        if gl.min(alpha, 0) < 0.00390625:
            acc = _rescaled(acc, alpha, values)
        loads += 1
""",
        ),
        "mask": Mutant(
            "skipped mask, hopper",
            _HOPPER,
            "                    s = apply_mask(s, mask, qk_scale if cap is None else 1.0, not HIDE_PAIRS)",
            """                    if gl.max(gl.max(mask.to(gl.float32), 1), 0) > 0:
                        s = gl.exp2(s)
                    s = apply_mask(s, mask, qk_scale if cap is None else 1.0, not HIDE_PAIRS)""",
        ),
        "length": Mutant(
            "length of data, hopper",
            _HOPPER,
            "seqlen_k = _used(seqused_k, batch, longest_k)",
            "seqlen_k = gl.minimum(_used(seqused_k, batch, longest_k), gl.load(lse).to(gl.int32))",
        ),
        "pointer": Mutant(
            "length from data, hopper",
            _HOPPER,
            "seqlen_k = _used(seqused_k, batch, longest_k)",
            """numbers = lse.to(gl.pointer_type(gl.int32), bitcast=True)
        seqlen_k = _used(gl.where(batch > 1, seqused_k, numbers), batch, longest_k)""",
        ),
    },
}


def planted(binding: Binding, kernel: str, control: str) -> Binding:
    """`binding` with a control of its kernel, both by name, in place of the kernel."""
    return replace(binding, fn=getattr(_module(kernel, control), binding.fn.__name__))


@cache
def _module(kernel: str, control: str) -> ModuleType:
    return plant(CONTROLS[kernel][control])
