"""Each encoding, written by the library that it comes from and decoded by both: bit for bit the same."""

import json
import math
from importlib.metadata import version

import pytest
import torch
from encoded import COMPRESSED, FP8, compressed, fp8_blocks
from packaging.version import Version
from safetensors.torch import save_file

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.decoded import decoded
from lowbit.checkpoint.encodings import blocks
from lowbit.errors import InputError

SHAPES = [(256, 256), (130, 320), (1, 32), (128, 96)]


def correlated(*shape: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 weights whose rows and columns differ in size by orders of magnitude."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=rng) * torch.logspace(-2, 1, shape[-1])
    return (weight * torch.logspace(-1, 1, shape[-2]).unsqueeze(1)).bfloat16()


def opened(tmp_path, tensors: dict, quantization: dict, dtype: str = "bfloat16") -> CheckpointReader:
    """The checkpoint of these tensors, as one that is not quantized."""
    tmp_path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return decoded(CheckpointReader(tmp_path))


def decode(tmp_path, tensors: dict, quantization: dict, dtype: str = "bfloat16") -> torch.Tensor:
    """The only weight of that checkpoint."""
    reader = opened(tmp_path, tensors, quantization, dtype)
    assert list(reader.tensors) == ["x.weight"] and reader.quantization_config is None
    return reader.tensor("x.weight")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_fp8_with_cut_blocks(tmp_path, shape):
    weight, block = correlated(*shape), (128, 128)
    codes, scales = fp8_blocks(weight, block)
    got = decode(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales}, FP8)
    wide = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert torch.equal(got, (codes.float() * wide).bfloat16())
    assert (got - weight).norm() < 0.04 * weight.norm()


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "qscale_weight"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_block_fp8_is_what_transformers_decodes(tmp_path, name, scale_dtype, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = fp8_blocks(correlated(256, 384), (128, 128))
    scales = scales.to(scale_dtype)
    got = decode(tmp_path, {"x.weight": codes, f"x.{name}": scales, "x.activation_scale": torch.ones(1)}, FP8, dtype)
    assert torch.equal(got, Fp8Dequantize(None)._dequantize_one(codes, scales, getattr(torch, dtype)))


def test_packed_experts_of_block_fp8_are_what_transformers_decodes(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (3, 64, 48), dtype=torch.int8, generator=rng)
    scales = torch.randint(110, 130, (3, 64, 3), dtype=torch.uint8, generator=rng)
    tensors = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scales}
    got = opened(tmp_path, tensors, FP8).tensor("experts.gate_up_proj")
    assert torch.equal(got, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16))


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("shape", [(128, 256), (130, 320), (3, 32)], ids=str)
def test_floats_of_compressed_tensors_are_what_it_decodes(tmp_path, kind, shape):
    if kind == "block" and shape == (130, 320) and Version(version("compressed-tensors")) < Version("0.20"):
        pytest.skip("compressed-tensors before 0.20 does not decode cut blocks itself")
    weight = correlated(*shape)
    stored, read, config = compressed(weight, kind)
    got = decode(tmp_path, stored | {"x.input_scale": torch.ones(1)}, config)
    assert torch.equal(got, read.bfloat16())
    assert (got - weight).norm() < (0.04 if COMPRESSED[kind][1]["num_bits"] == 8 else 0.2) * weight.norm()


def test_nvfp4_of_modelopt_has_a_second_scale_that_multiplies(tmp_path):
    stored, read, _ = compressed(correlated(64, 128), "nvfp4")
    tensors = {
        "x.weight": stored["x.weight_packed"],
        "x.weight_scale": stored["x.weight_scale"],
        "x.weight_scale_2": 1 / stored["x.weight_global_scale"].view(()),
        "x.input_scale": torch.ones(()),
    }
    got = decode(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    # the reciprocal is rounded: within one unit of bfloat16
    torch.testing.assert_close(got, read.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("grid", [(), (130,), (2, 1, 3, 1)], ids=str)
def test_fp8_of_modelopt_by_tensor_row_and_block(tmp_path, grid):
    rng = torch.Generator().manual_seed(0)
    codes = correlated(130, 320).div(20).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=rng)
    got = decode(tmp_path, {"x.weight": codes, "x.weight_scale": scales}, {"quant_method": "modelopt"})
    wide = scales if not grid else scales.view(-1, 1)
    if len(grid) == 4:
        wide = scales[:, 0, :, 0].repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :320]
    assert torch.equal(got, (codes.float() * wide).bfloat16())


def test_modelopt_says_how_it_quantizes_in_a_file_of_its_own(tmp_path):
    save_file({"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale": torch.tensor(3.0)},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert torch.equal(decoded(CheckpointReader(tmp_path)).tensor("x.weight"), torch.full((4, 4), 3.0).bfloat16())


def test_mxfp4_experts_are_what_transformers_decodes(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 5, 16), dtype=torch.uint8, generator=rng)
    scales = torch.randint(100, 150, (3, 64, 5), dtype=torch.uint8, generator=rng)
    tensors = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales, "e.down_proj_bias": torch.zeros(3, 160)}
    reader = opened(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert set(reader.tensors) == {"e.down_proj", "e.down_proj_bias"}
    assert reader.tensors["e.down_proj"].shape == (3, 160, 64)
    assert torch.equal(reader.tensor("e.down_proj"), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(64, 96), (33, 130)], ids=str)
def test_four_bits_of_bitsandbytes_are_what_it_decodes(tmp_path, kind, nested, shape):
    """Without its kernel for CPUs: 0.50 takes the wrong scales where a row is no whole number of blocks."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    functional = bitsandbytes.functional
    weight = correlated(*shape)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
    tensors = {"x.weight": packed} | {f"x.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    got = decode(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    scales = state.absmax
    if nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    wanted = _dequantize_4bit_compute(packed.view(-1), scales, state.code, 64, shape, torch.bfloat16)
    assert torch.equal(got, wanted)
    assert (got - weight).norm() < 0.2 * weight.norm()


def test_eight_bits_of_bitsandbytes_are_what_it_decodes(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = correlated(64, 96)
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {"x.weight": codes, "x.SCB": largest, "x.weight_format": torch.zeros((), dtype=torch.uint8)}
    got = decode(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert torch.equal(got, functional.int8_vectorwise_dequant(codes, largest).bfloat16())


def damaged_scale(scales: torch.Tensor) -> torch.Tensor:
    scales = scales.clone()
    scales.view(-1)[-1] = 255 if scales.dtype == torch.uint8 else math.nan
    return scales


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stored: {k: damaged_scale(v) if k == "x.weight_scale" else v for k, v in stored.items()},
         "x.weight_scale holds 1 NaN or infinite scales"),
        (lambda stored: {k: v for k, v in stored.items() if k != "x.weight_scale"},
         "x.weight_scale, its scales, is not in the checkpoint"),
        (lambda stored: {k: torch.ones(7, 5) if k == "x.weight_scale" else v for k, v in stored.items()},
         r"x.weight_scale of shape \[7, 5\] is no grid of blocks over x.weight"),
    ],
    ids=["nan", "missing", "shape"],
)  # fmt: skip
def test_damage_is_refused_by_the_name_of_its_tensor(tmp_path, kind, damage, message):
    stored, _, config = compressed(correlated(128, 256), kind)
    with pytest.raises(InputError, match=message):
        decode(tmp_path, damage(stored), config)


def four_bits(**changes) -> dict[str, torch.Tensor]:
    """A weight [4, 64] as bitsandbytes stores it with double quantization, and what its state says otherwise."""
    said = {"shape": [4, 64], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5, "dtype": "bfloat16"}
    state = torch.tensor(list(json.dumps(said | changes).encode()), dtype=torch.uint8)
    return {
        "x.weight": torch.arange(128, dtype=torch.uint8).view(-1, 1),
        "x.weight.absmax": torch.arange(4, dtype=torch.uint8),
        "x.weight.quant_map": torch.linspace(-1, 1, 16),
        "x.weight.nested_absmax": torch.ones(1),
        "x.weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "x.weight.quant_state.bitsandbytes__nf4": state,
    }


def test_four_bits_by_their_definition(tmp_path):
    """Without bitsandbytes: the first code of a byte is in its high bits, and scales are double quantized."""
    stored = four_bits()
    scales = stored["x.weight.nested_quant_map"][:4] + 0.5
    codes = [nibble for byte in range(128) for nibble in (byte >> 4, byte & 15)]
    wanted = (stored["x.weight.quant_map"][codes].view(4, 64) * scales.view(4, 1)).bfloat16()
    assert torch.equal(decode(tmp_path, stored, {"quant_method": "bitsandbytes"}), wanted)


@pytest.mark.parametrize(
    "changes", [{"blocksize": 2**40}, {"nested_blocksize": 2**40}, {"blocksize": 63}, {"blocksize": 0},
                {"nested_blocksize": 0}, {"shape": [4, 2**40]}, {"shape": [256]}, {"shape": [-4, -64]}], ids=str
)  # fmt: skip
def test_sizes_that_no_weight_has_are_refused(tmp_path, changes):
    with pytest.raises(InputError, match=r"says shape|has \d+ numbers, expected"):
        opened(tmp_path, four_bits(**changes), {"quant_method": "bitsandbytes"})


def test_scales_of_scales_have_to_be_bytes(tmp_path):
    stored = four_bits() | {"x.weight.absmax": torch.full((4,), 1e9)}
    with pytest.raises(InputError, match=r"x\.weight\.absmax is float32, expected uint8"):
        opened(tmp_path, stored, {"quant_method": "bitsandbytes"})


def test_blocks_larger_than_the_weight_are_all_of_it(tmp_path):
    codes = correlated(6, 64).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0]])
    got = decode(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales}, FP8 | {"weight_block_size": [2**40, 32]})
    assert torch.equal(got, (codes.float() * scales.repeat_interleave(32, 1)).bfloat16())


@pytest.mark.parametrize("grid", [(), (3, 5), (37, 1), (1, 80)], ids=str)
def test_slices_of_rows_change_nothing(tmp_path, grid, monkeypatch):
    codes, scales = (
        correlated(37, 80).to(torch.float8_e4m3fn),
        torch.rand(grid, generator=torch.Generator().manual_seed(0)),
    )
    config = FP8 | {"weight_block_size": [16, 16] if grid == (3, 5) else None}
    tensors = {"x.weight": codes, "x.weight_scale_inv": scales}
    whole = decode(tmp_path / "whole", tensors, config)
    monkeypatch.setattr(blocks, "_AT_ONCE", 200)  # two rows
    assert torch.equal(decode(tmp_path / "sliced", tensors, config), whole)


def test_other_methods_and_plain_checkpoints_are_left_as_they_are(tmp_path):
    reader = opened(tmp_path, {"x.weight": torch.ones(2, 2)}, {"quant_method": "hqq"})
    assert reader.quantization_config == {"quant_method": "hqq"}
