"""A model with FlashCore in it through torch's compilers: compile, export and ahead-of-time Inductor."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the integrations extra")

from flashcore.integrations import transformers as fcore  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.skipif(
        shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch's compiler needs a C++ compiler"
    ),
]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Encoder(torch.nn.Module):
    """Tokens and their padding mask, [B, S] each, to [B, S, C]."""

    def __init__(self, device):
        super().__init__()
        fcore.register()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
        )
        self.model = transformers.BertModel(config, add_pooling_layer=False).eval()
        self.model.set_attn_implementation("fcore")
        self.to(device, torch.float16 if device == "cuda" else torch.float32).requires_grad_(False)

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask)[0]


def batch(device, size=3, length=13):
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return torch.randint(3, 99, (size, length), generator=generator).to(device), mask.to(device)


def same(got, want):
    tolerance = 4e-3 if want.dtype == torch.float16 else 3e-6
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


SIZES = [(3, 13), (3, 17), (2, 32), (5, 29)]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_compile_with_dynamic_shapes(device):
    torch._dynamo.reset()
    model = Encoder(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in SIZES:
        same(compiled(*batch(device, *size)), model(*batch(device, *size)))


ONE_LAYER = """
import sys, torch
layer, x = torch.nn.Linear(8, 8, device="cuda"), torch.ones(2, 8, device="cuda")
program = torch.export.export(layer, (x,))
torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1]))(x)
"""


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_export_and_ahead_of_time(device, tmp_path):
    if device == "cuda":  # torch 2.11's loader was seen to end the process, whatever the package holds
        alone = [sys.executable, "-c", ONE_LAYER, str(tmp_path / "layer.pt2")]
        try:
            status: int | str = subprocess.run(alone, capture_output=True, timeout=100).returncode
        except subprocess.TimeoutExpired:
            status = "none after 100 s"
        if status:
            pytest.skip(f"torch's own loader does not load a package of one Linear layer here: exit status {status}")
    model = Encoder(device)
    size, length = torch.export.Dim("size", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    shapes = {0: size, 1: length}
    program = torch.export.export(model, batch(device), dynamic_shapes=(shapes, shapes))
    assert sum("flashcore" in str(node.target) for node in program.graph.nodes) == 1
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    for run in (program.module(), torch._inductor.aoti_load_package(package)):
        for size in SIZES:
            same(run(*batch(device, *size)), model(*batch(device, *size)))


def test_a_decoder_compiles():
    """Whatever transformers' own code does around it: no graph break, and a mask without a look at its values."""
    torch._dynamo.reset()
    fcore.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("fcore")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ids, mask = batch("cpu")
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        same(got, model(ids, attention_mask=mask, use_cache=False).logits)
