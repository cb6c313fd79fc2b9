"""mlx-lm loads what `export_mlx` writes. Skipped without mlx: pip install -r tests/interop/requirements-mlx.txt"""

import numpy as np
import pytest
import torch
from export_sources import dense_model, quantized_source
from models import relative_error, token_ids
from weights import BITS, matrix, random_quantized

from lowbit.conversion.mlx import export_mlx
from lowbit.formats import mlx as ours
from lowbit.numerics.scheme import Scheme

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm.utils")
mx.set_default_device(mx.cpu)

# (architecture, scheme, dtype): tied and untied heads, biases, fused projections, experts under two namings
CASES = [
    ("llama", "W4A16-G32", torch.bfloat16), ("llama", "W2A16-G128", torch.float16),
    ("qwen2", "W4A16_ASYM-G128", torch.bfloat16), ("qwen3", "W3A16-G64", torch.bfloat16),
    ("gemma2", "W8A16-G32", torch.bfloat16), ("phi3", "W3A16_ASYM-G32", torch.float16),
    ("qwen2_moe", "W8A16_ASYM-G64", torch.float16), ("qwen3_moe", "W4A16-G32", torch.bfloat16),
    ("mixtral", "W4A16_ASYM-G64", torch.bfloat16),
]  # fmt: skip


def to_mlx(tensor: torch.Tensor):
    return mx.array(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())


def logits_error(name: str, scheme: str, dtype: torch.dtype, folder, **options) -> float:
    """Relative error of mlx-lm's logits of an exported tiny model to transformers' of the dequantized one, float32."""
    options = {"overrides": [(".*0.*down_proj", "W8A16-G32")], **options}
    source = quantized_source(folder, name, scheme, dtype, options=options)
    export_mlx(source, folder / "mlx")
    model, _ = mlx_lm.load_model(folder / "mlx")
    model.set_dtype(mx.float32)
    actual = torch.from_numpy(np.array(model(mx.array(token_ids().numpy()))))
    with torch.no_grad():
        return relative_error(actual, dense_model(source, folder / "reference")(token_ids()).logits)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_mlx_lm_computes_the_dequantized_model(case, tmp_path):
    assert logits_error(*case, tmp_path) < 2e-6


@pytest.mark.parametrize(("name", "embeddings"), [("llama", "W8A16-G64"), ("qwen3", "W4A16_ASYM-G32")])
def test_mlx_lm_looks_up_quantized_embeddings(name, embeddings, tmp_path):
    assert logits_error(name, "W4A16-G32", torch.bfloat16, tmp_path, embeddings=embeddings) < 2e-6


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", ours.GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_our_numbers(bits, group, sym):
    """Bit for bit in float32, for scales of 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        qweight = random_quantized(Scheme(bits, group, sym), 7, 384, dtype)
        tensors = {name: to_mlx(tensor) for name, tensor in ours.pack(qweight).items()}
        actual = mx.dequantize(*tensors.values(), group_size=group, bits=bits)
        assert torch.equal(torch.from_numpy(np.array(actual)).double(), matrix(qweight))


@pytest.mark.parametrize("bits", BITS)
def test_mlx_packs_the_same_words(bits):
    """Its own quantizer's codes, scales and biases, packed by us from the codes that it unpacks to."""
    packed, scales, _ = mx.quantize(mx.random.normal((5, 128)), 32, bits)
    codes = mx.dequantize(packed, mx.ones_like(scales), mx.zeros_like(scales), 32, bits)
    codes = torch.from_numpy(np.array(codes)).to(torch.uint8)
    qweight = random_quantized(Scheme(bits, 32), 5, 128)
    again = ours.pack(type(qweight)(codes, qweight.scales, qweight.scheme))["weight"]
    assert np.array_equal(again.numpy(), np.array(packed))
