"""explain() and warmup(), as far as they need no GPU, and on one."""

from __future__ import annotations

import pytest
import torch

from flashcore.core.target import A100, H100, L4
from flashcore.fast import planning
from flashcore.fast.attention_production import attention
from flashcore.fast.planning import explain, warmup


def make(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", [H100, A100, L4])
def test_a_served_call_gets_a_kernel_and_every_other_a_reason(target):
    q = make(8, 8, 128, 64)
    told = explain(q, q, q, target=target)
    assert told.config is not None and told.target is target
    assert set(told.refused) == set(planning.KERNELS) - {told.config.kernel}
    assert all(told.refused.values())
    text = str(told)
    assert "B=8 H=8 S=128 D=64 float16" in text and target.name in text
    assert f"{told.config.kernel}: tile {told.config.block_m} x {told.config.block_n}" in text


def test_a_call_that_nothing_serves_is_an_answer():
    q = make(1, 2, 16, 7, dtype=torch.float32)
    told = explain(q, q, q, target=H100)
    assert told.config is None and set(told.refused) == set(planning.KERNELS)
    assert "no kernel serves it" in str(told) and "float32" in str(told)


def test_choices_by_hand_are_kept():
    q = make(8, 8, 128, 64)
    told = explain(q, q, q, 64, 64, backend="portable", target=H100)
    assert told.config is not None and (told.config.kernel, told.config.block_m, told.config.block_n) == (
        "portable", 64, 64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="block_m"):
        explain(q, q, q, 48, target=H100)
    assert explain(q, q, q, backend="reference", target=H100).config.kernel == "reference"
    with pytest.raises(ValueError, match="k: expected"):
        explain(q, make(8, 8, 128, 32), q, target=H100)


def test_every_option_is_part_of_the_answer():
    q, mask, used = make(2, 4, 64, 64), make(64, 64, dtype=torch.bool), make(2, dtype=torch.int32)
    told = explain(q, q, q, window=(8, 0), softcap=2.0, attn_mask=mask, seqused_k=used, target=A100)
    assert told.problem.options == ("window", "softcap", "attn_mask", "seqused_k")
    assert "float16 causal window softcap attn_mask seqused_k on" in str(told)
    for options in ({"window": (8,)}, {"attn_mask": mask[:3]}, {"seqused_k": used[:1]}):
        with pytest.raises(ValueError, match=next(iter(options))):
            explain(q, q, q, target=A100, **options)
    rows, cu = make(100, 4, 64), make(9, dtype=torch.int32)
    told = explain(rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=30, max_seqlen_k=30, target=A100)
    assert told.problem.packed == (100, 100) and "B=8 H=4 S=30 D=64 float16 cu_seqlens" in str(told)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        explain(rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu[1:], max_seqlen_q=30, max_seqlen_k=30)


def test_cpu_tensors_are_the_reference_path_s():
    q = torch.zeros(2, 4, 16, 8)
    told = explain(q, q[:, :2], q[:, :2], is_causal=True)
    assert told.config.kernel == "reference" and told.target is None
    assert "H=4 over 2" in str(told) and "causal" in str(told) and "CPU" in str(told)


def test_warming_up_for_a_gpu_that_is_elsewhere_compiles_and_loads_nothing():
    done = warmup([(2, 4, 128, 64), ((2, 4, 64, 64), (2, 2, 200, 64))], target=A100, progress=False)
    assert [each.config.kernel for each in done] == ["portable", "portable"]
    assert all(each.kernels == 1 and each.seconds > 0 for each in done)
    mask = make(1, 1, 128, 128)
    (masked,) = warmup([(2, 4, 128, 64)], target=A100, attn_mask=mask, seqused_k=True, window=(9, 9), progress=False)
    assert masked.config.kernel == "portable"
    with pytest.raises(ValueError, match="block_m"):
        warmup([(2, 4, 128, 64)], target=A100, block_m=48, progress=False)


def test_a_progress_bar_only_where_somebody_looks(capsys, monkeypatch):
    assert list(planning._with_bar([(1,), (2,)], True)) == [(1,), (2,)]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(planning._with_bar([(1,), (2,)], True)) == [(1,), (2,)]
    assert "2/2" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_warmed_shape_with_a_mask_loads_nothing_at_its_first_call():
    mask = torch.zeros(96, 96, dtype=torch.bool, device="cuda")
    warmup([(2, 4, 96, 64)], attn_mask=mask, seqused_k=True, progress=False)
    before = planning.packet.loaded_kernels()
    q = torch.randn(2, 4, 96, 64, device="cuda").half()
    attention(q, q, q, attn_mask=~mask, seqused_k=torch.tensor([96, 3], dtype=torch.int32, device="cuda"))
    assert planning.packet.loaded_kernels() == before


@pytest.mark.gpu
def test_a_warmed_shape_loads_nothing_at_its_first_call():
    shapes = [(3, 4, 160, 64), ((3, 4, 96, 64), (3, 2, 224, 64))]
    done = warmup(shapes, dtype=torch.bfloat16, is_causal=True, progress=False)
    assert len(done) == 2
    before = planning.packet.loaded_kernels()
    q, k = (torch.randn(s, device="cuda").bfloat16() for s in ((3, 4, 96, 64), (3, 2, 224, 64)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(q, k, k, is_causal=True)
    assert planning.packet.loaded_kernels() == before
    told = explain(q, k, k, is_causal=True)
    assert told.config == done[1].config and told.target is not None
