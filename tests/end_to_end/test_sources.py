"""Models that others have quantized, from their files to ours: quantized again, verified, loaded, the same logits."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from encoded_models import ENCODERS, INT4, in_mxfp4_of_gpt_oss, rewritten
from folders import edit_config, stored_tensors
from models import relative_error, save_tiny, token_ids
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import InputError
from lowbit.folders.opened import summarize
from lowbit.hf import loading_config
from lowbit.layers.linear import LowbitLinear
from lowbit.verification.checks import static_checks

# All experts are used: which are chosen would change with the smallest error
SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts_per_tok": 4}


def encoded_model(kind: str, architecture: str, tmp_path: Path) -> Path:
    layers = {"qwen3_moe": {"num_hidden_layers": 1}, "gpt_oss": {"num_hidden_layers": 2}}.get(architecture, {})
    folder = save_tiny(tmp_path / "plain", architecture, torch.bfloat16, **SIZES, **layers)
    if architecture == "gpt_oss":
        return in_mxfp4_of_gpt_oss(folder, folder.with_name("encoded"))
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    return rewritten(folder, folder.with_name("encoded"), *ENCODERS[kind])


CASES = [("fp8", "llama"), ("mixed", "llama"), ("mixed", "qwen3_moe"), ("mxfp4", "gpt_oss")]
# Of the same code as those above, each dense and with experts
OTHERS = [(kind, architecture) for kind in (*ENCODERS,) for architecture in ("llama", "qwen3_moe")
          if (kind, architecture) not in CASES]  # fmt: skip


@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_quantize_verify_load(kind, architecture, tmp_path, caplog):
    source, plain, made = encoded_model(kind, architecture, tmp_path), tmp_path / "dense", tmp_path / "made"
    done = lowbit.dequantize(source, plain)
    assert done.weights > 0 and done.source_bytes < done.output_bytes
    original = AutoModelForCausalLM.from_pretrained(plain)
    report = lowbit.quantize(source, made, scheme="W8A16-G32")
    assert "is quantized already" in caplog.text
    assert report.source_bytes == done.source_bytes
    assert lowbit.verify(made, reference=source).ok
    wanted = original(token_ids()).logits
    assert relative_error(lowbit.load(made)(token_ids()).logits, wanted) < 0.05
    # integers run as they are, in float32; all else is decoded
    limit = 0.02 if kind == "mixed" else 0
    assert relative_error(lowbit.load(source)(token_ids()).logits, wanted) <= limit
    preview = lowbit.plan(source, scheme="W8A16-G32")
    assert preview.output_bytes == report.output_bytes and preview.source_bytes == report.source_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "architecture"), OTHERS)
def test_quantized_as_the_decoded_model_is(kind, architecture, tmp_path):
    """Tensor for tensor: all that is shown of models in bfloat16 holds."""
    source, plain, made = encoded_model(kind, architecture, tmp_path), tmp_path / "dense", tmp_path / "made"
    lowbit.dequantize(source, plain)
    lowbit.quantize(source, made, scheme="W8A16-G32")
    lowbit.quantize(plain, tmp_path / "expected", scheme="W8A16-G32")
    first, second = stored_tensors(made), stored_tensors(tmp_path / "expected")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [check for check in static_checks(made, source) if check.ok is False] == []
    wanted = AutoModelForCausalLM.from_pretrained(plain)(token_ids()).logits
    assert torch.equal(lowbit.load(source)(token_ids()).logits, wanted)


def test_groups_of_both_kinds(tmp_path):
    """Floating point in attention is decoded, integers elsewhere stay: converted exactly, and run packed."""
    source = encoded_model("mixed", "llama", tmp_path)
    parts = {part["name"]: part["tensors"] for part in summarize(source)["parts"]}
    assert parts == {"FP8 E4M3": 8, "W4A16-G32": 6, "bfloat16": 7}
    model = lowbit.load(source)
    packed = {name for name, module in model.named_modules() if isinstance(module, LowbitLinear)}
    assert len(packed) == 6 and all("mlp" in name for name in packed)
    assert lowbit.quantize(source, tmp_path / "made", scheme="W4A16-G32").converted == 6
    before, after = stored_tensors(source), stored_tensors(tmp_path / "made")
    assert all(torch.equal(before[f"{name}.weight_packed"], after[f"{name}.weight_packed"]) for name in packed)
    lowbit.dequantize(source, tmp_path / "dense")
    assert lowbit.verify(source, reference=tmp_path / "dense").ok
    # compressed-tensors itself decompresses them to the same numbers
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**INT4), format="pack-quantized")
    compressor, dense = BaseCompressor.get_value_from_registry("pack-quantized"), stored_tensors(tmp_path / "dense")
    for name in packed:
        state = {key.removeprefix(f"{name}."): value for key, value in before.items() if key.startswith(f"{name}.")}
        assert torch.equal(compressor.decompress(state, scheme)["weight"], dense[f"{name}.weight"]), name


def test_from_pretrained_is_not_handed_what_it_does_not_decode(tmp_path):
    with pytest.raises(InputError, match=r"is stored as FP8 E4M3, which from_pretrained does not decode: load it with"):
        loading_config(encoded_model("fp8", "llama", tmp_path))


@pytest.mark.parametrize(("kind", "architecture"), [("fp8", "llama"), ("fp8", "qwen3_moe"), ("mxfp4", "gpt_oss")])
def test_what_transformers_decodes_itself_is_the_same(kind, architecture, tmp_path):
    """On CPUs it decodes block FP8 and MXFP4 while it loads them."""
    source = encoded_model(kind, architecture, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    ours = lowbit.load(source).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_integers_on_the_grid_that_is_asked_for_are_kept(tmp_path, caplog):
    source = save_tiny(tmp_path / "plain", dtype=torch.bfloat16)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    assert lowbit.quantize(source, first, scheme="W4A16-G32").converted == 0
    assert lowbit.plan(first, scheme="W4A16-G32").converted == 14
    assert lowbit.quantize(first, again, scheme="W4A16-G32").converted == 14
    assert "14 of 14 weights are integers that their schemes hold: they are converted exactly" in caplog.text
    assert all(torch.equal(tensor, stored_tensors(again)[name]) for name, tensor in stored_tensors(first).items())
    assert lowbit.quantize(first, other, scheme="W2A16-G32").converted == 0


EXACT = [("W4A16-G32", "W8A16-G32"), ("W4A16-G32", "W4A16_ASYM-G16"), ("W3A16_ASYM-G32", "W4A16-G32"),
         ("W4A16-CHANNEL", "W4A8-G32"), ("W2A16_ASYM-G32", "W2A16_ASYM-G16")]  # fmt: skip


@pytest.mark.parametrize(("stored", "asked"), EXACT)
def test_grids_that_hold_the_numbers_of_others(stored, asked, tmp_path):
    lowbit.quantize(save_tiny(tmp_path / "plain", num_hidden_layers=1), tmp_path / "first", scheme=stored)
    report = lowbit.quantize(tmp_path / "first", tmp_path / "made", scheme=asked)
    assert report.converted == 7 and report.mean_error == 0
    for name in ("first", "made"):
        lowbit.dequantize(tmp_path / name, tmp_path / f"{name} dense")
    first, made = stored_tensors(tmp_path / "first dense"), stored_tensors(tmp_path / "made dense")
    assert first.keys() == made.keys() and all(torch.equal(first[name], made[name]) for name in first)
    assert lowbit.verify(tmp_path / "made", reference=tmp_path / "first").ok


@pytest.mark.parametrize(("stored", "asked"), [("W4A16_ASYM-G32", "W4A16-G32"), ("W4A16-G16", "W4A16-G32"),
                                               ("W8A16-G32", "W4A16-G32")])  # fmt: skip
def test_grids_that_do_not(stored, asked, tmp_path):
    lowbit.quantize(save_tiny(tmp_path / "plain"), tmp_path / "first", scheme=stored)
    report = lowbit.quantize(tmp_path / "first", tmp_path / "made", scheme=asked)
    assert report.converted == 0 and report.mean_error > 0


def test_integers_that_are_rounded_again(tmp_path):
    lowbit.quantize(save_tiny(tmp_path / "plain"), tmp_path / "first", scheme="W8A16_ASYM-G32")
    other = tmp_path / "other"
    assert lowbit.quantize(tmp_path / "first", other, scheme="W8A16-G32").converted == 0
    assert lowbit.verify(other, reference=tmp_path / "first").ok
    wanted = lowbit.load(tmp_path / "first")(token_ids()).logits
    assert relative_error(lowbit.load(other)(token_ids()).logits, wanted) < 0.05


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_integers_of_other_formats(tmp_path, format):
    lowbit.quantize(save_tiny(tmp_path / "plain", num_hidden_layers=1), tmp_path / "first", scheme="W4A16_ASYM-G32")
    source = tmp_path / format
    lowbit.convert(tmp_path / "first", source, format=format)
    lowbit.quantize(source, tmp_path / "made", scheme="W8A16-G32")
    assert lowbit.verify(tmp_path / "made", reference=source).ok
    wanted = lowbit.load(source)(token_ids()).logits
    assert relative_error(lowbit.load(tmp_path / "made")(token_ids()).logits, wanted) < 0.05


def test_what_is_stored_is_shown_and_verified(tmp_path):
    source = encoded_model("fp8", "llama", tmp_path)
    shown = summarize(source)
    parts = {part["name"]: part for part in shown["parts"]}
    assert shown["format"] == "fp8" and len(shown["encoded"]) == parts["FP8 E4M3"]["tensors"] == 14
    assert 8 < parts["FP8 E4M3"]["bits_per_weight"] < 8.1 and not shown["layers"]
    assert shown["bytes"] == sum(tensor.nbytes for tensor in stored_tensors(source).values())
    checks = {check.name: check for check in lowbit.verify(source, reference=tmp_path / "plain").checks}
    assert all(check.ok is not False for check in checks.values()) and checks["generates"].ok
    assert "14 weights in fp8 decode" in checks["codes"].detail and "14 in fp8 are not" in checks["source"].detail


_SCALES = "model.layers.1.mlp.down_proj.weight_scale_inv"
_EXPERT = "model.layers.0.mlp.experts.2.up_proj"
DAMAGES = {
    "no scales": ("fp8", "llama", _SCALES, lambda tensor: None, "its scales, is not in the checkpoint"),
    "other blocks": ("fp8", "llama", _SCALES, lambda tensor: tensor[:, :3].repeat(1, 2), "is no grid of blocks"),
    "NaN": ("fp8", "llama", _SCALES, lambda tensor: tensor.fill_(torch.nan), "NaN or infinite scales"),
    "an expert's scales": ("nvfp4", "qwen3_moe", f"{_EXPERT}.weight_scale", lambda tensor: None, "its scales, is not"),
    "an expert's blocks": ("nvfp4", "qwen3_moe", f"{_EXPERT}.weight_scale", lambda tensor: tensor[:, :3], "no grid of"),
    "rows": ("int8", "llama", "model.layers.0.self_attn.q_proj.SCB", lambda tensor: tensor[1:], "expected one number"),
    "fused experts": ("mxfp4", "gpt_oss", "model.layers.0.mlp.experts.down_proj_scales",
                      lambda tensor: tensor.fill_(255), "NaN or infinite scales"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_the_name_of_the_tensor(damage, tmp_path):
    kind, architecture, name, change, said = DAMAGES[damage]
    source = encoded_model(kind, architecture, tmp_path)
    tensors = stored_tensors(source)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, source / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(InputError) as error:
        lowbit.quantize(source, tmp_path / "made", scheme="W8A16-G32")
    assert name in str(error.value) and said in str(error.value)
    assert not (tmp_path / "made").exists()
    assert any(name in failure for failure in lowbit.verify(source).failures)


def test_a_calibrated_run_takes_them_too(tmp_path):
    source = encoded_model("fp8", "llama", tmp_path)
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    lowbit.quantize(source, tmp_path / "made", scheme="W4A16-G32", method="gptq", dataset=ids)
    assert lowbit.verify(tmp_path / "made", reference=source).ok


def test_unknown_methods_and_conversions_are_refused_by_name(tmp_path):
    source = encoded_model("fp8", "llama", tmp_path)
    with pytest.raises(InputError, match=r"is stored in fp8 .* which no format here holds"):
        lowbit.convert(source, tmp_path / "out", format="gptq")
    edit_config(source, quantization_config={"quant_method": "hqq"})
    with pytest.raises(InputError, match=r"is quantized already \(hqq\)"):
        lowbit.quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
