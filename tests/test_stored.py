"""What a quantized folder holds, found from its tensors where its config is silent or wrong."""

import re

import pytest
import torch
from folders import edit_config, edit_tensors, read_json
from models import save_tiny
from weights import assert_same

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.errors import InputError
from lowbit.folders.stored import StoredWeights
from lowbit.numerics.scheme import Scheme

UP = "model.layers.0.mlp.up_proj"


def stored(folder):
    return StoredWeights(CheckpointReader(folder))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def quantize(dense, tmp_path):
    def run(scheme, format, **options):
        lowbit.quantize(dense, tmp_path / "q", scheme=scheme, format=format, **options)
        return tmp_path / "q"

    return run


def edit_quantization(folder, **changes):
    edit_config(folder, quantization_config={**read_json(folder / "config.json")["quantization_config"], **changes})


@pytest.mark.parametrize("sym", (True, False))
@pytest.mark.parametrize("format", ("compressed-tensors", "gptq", "awq"))
def test_every_format_gives_the_same_weights(format, sym, dense, quantize, tmp_path):
    scheme = Scheme(4, 32, sym)
    found = stored(quantize(scheme, format))
    lowbit.quantize(dense, tmp_path / "ct", scheme=scheme)
    expected = stored(tmp_path / "ct")
    assert found.format == format and list(found.weights) == list(expected.weights)
    assert {t.name for t in found.plain} == {t.name for t in expected.plain}
    for base, weight in found.weights.items():
        assert weight.scheme == scheme and weight.shape == expected.weights[base].shape
        assert_same(found.quantized(weight)[0], expected.quantized(expected.weights[base])[0])


def test_plain_folder(dense):
    found = stored(dense)
    assert found.format is None and not found.weights and len(found.plain) == len(CheckpointReader(dense).tensors)


def test_symmetric_config_over_other_zeros(quantize):
    """Zeros win: one of them is not the middle, so the module is not symmetric, whatever the config says."""
    folder = quantize("W4A16-G32", "gptq")
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.qzeros"][0, 0].sub_(1))
    found = stored(folder)
    weight = found.weights[UP]
    assert not weight.scheme.sym
    (qweight,) = found.quantized(weight)
    assert qweight.zeros[0, 0] == 7 and (qweight.zeros.flatten()[1:] == 8).sum() == qweight.zeros.numel() - 1
    assert all(other.scheme.sym for base, other in found.weights.items() if base != UP)


def test_awq_is_symmetric_if_all_of_it_is(quantize):
    folder = quantize("W4A16-G32", "awq")
    assert all(weight.scheme.sym for weight in stored(folder).weights.values())
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.qzeros"][0, 0].sub_(1))
    assert not any(weight.scheme.sym for weight in stored(folder).weights.values())


def test_order_is_that_of_g_idx(quantize):
    """desc_act is false in the config, and is wrong."""
    folder = quantize("W4A16-G32", "gptq")
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int() // 32
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.g_idx"].copy_(shuffled))
    found = stored(folder)
    assert [base for base, weight in found.weights.items() if weight.act_order] == [UP]
    (qweight,) = found.quantized(found.weights[UP])
    assert torch.equal(qweight.g_idx, shuffled)


def test_files_without_g_idx(quantize):
    folder = quantize("W4A16-G32", "gptq")
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")])
    found = stored(folder)
    assert not any(weight.act_order for weight in found.weights.values())


DAMAGED = {
    "group too large": (lambda t: t[f"{UP}.g_idx"].zero_(), "does not put 32 inputs into each of 2 groups"),
    "negative group": (lambda t: t[f"{UP}.g_idx"][0].fill_(-1), "does not put 32 inputs into each of 2 groups"),
    "group beyond": (lambda t: t[f"{UP}.g_idx"][0].fill_(2**30), "does not put 32 inputs into each of 2 groups"),
    "short g_idx": (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][:-1].clone()}), "expected [64]"),
    "no zeros": (lambda t: t.pop(f"{UP}.qzeros"), f"{UP}.qzeros is not in the checkpoint"),
    "no scales": (lambda t: t.pop(f"{UP}.scales"), f"{UP}.scales is not in the checkpoint"),
    "odd inputs": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()}), "32 does not divide"),
    "one dimension": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].flatten()}), "not stored as a matrix"),
    "three": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][None].clone()}), "not stored as a matrix"),
    "few scales": (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}), "scales"),
    "few zeros": (lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:1].clone()}), "qzeros"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(damage, quantize):
    change, message = DAMAGED[damage]
    folder = quantize("W4A16-G32", "gptq")
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=re.escape(message)):
        stored(folder)
    with pytest.raises(InputError):
        lowbit.load(folder)


def test_module_that_the_config_leaves_out(quantize):
    folder = quantize("W4A16-G32", "gptq")
    edit_quantization(folder, dynamic={"-:.*up_proj": {}})
    with pytest.raises(InputError, match=f"{UP} is stored quantized, but the quantization_config leaves it out"):
        stored(folder)


def test_config_of_other_bits(quantize):
    folder = quantize("W4A16-G32", "gptq")
    edit_quantization(folder, bits=8)
    with pytest.raises(InputError):
        stored(folder)


def retyped(suffix: str, make):
    def change(tensors):
        tensors[f"{UP}.{suffix}"] = make(tensors[f"{UP}.{suffix}"])

    return change


@pytest.mark.parametrize(
    ("format", "suffix", "make", "says"),
    [
        ("compressed-tensors", "weight_scale", lambda t: t.int(), "weight_scale is torch.int32, expected a floating"),
        ("gptq", "scales", lambda t: t.int(), "scales is torch.int32, expected a floating"),
        ("awq", "scales", lambda t: t.to(torch.float8_e5m2), "scales is torch.float8_e5m2, expected a floating"),
        ("gptq", "qweight", lambda t: t.float(), "qweight is torch.float32, expected integers"),
        ("gptq", "qzeros", lambda t: t.long(), "qzeros is torch.int64, expected torch.int32"),
        ("compressed-tensors", "weight_packed", lambda t: t.long(), "weight_packed is torch.int64"),
        ("compressed-tensors", "weight_shape", lambda t: t.double(), "weight_shape is torch.float64"),
        ("compressed-tensors", "weight_shape", lambda t: t.to(torch.uint64), "weight_shape is torch.uint64"),
        ("compressed-tensors", "weight_shape", lambda t: torch.full_like(t, 2**62), "weight_shape holds"),
        ("compressed-tensors", "weight_shape", lambda t: -t, "weight_shape holds"),
        ("compressed-tensors", "weight_shape", lambda t: t * torch.tensor([1, 99]), "weight_shape holds"),
    ],
)
def test_tensors_of_another_kind_are_refused(format, suffix, make, says, quantize):
    folder = quantize("W4A16_ASYM-G32", format)
    edit_tensors(folder, retyped(suffix, make))
    with pytest.raises(InputError, match=f"{re.escape(UP)}.{says}") as caught:
        stored(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize(
    ("format", "suffix"), [("compressed-tensors", "weight_scale"), ("gptq", "scales"), ("awq", "scales")]
)
def test_scales_that_are_not_finite_are_damage_in_every_command(format, suffix, value, quantize, dense, tmp_path):
    folder = quantize("W4A16_ASYM-G32", format)
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.{suffix}"][1].fill_(value))
    other = "gptq" if format == "compressed-tensors" else "compressed-tensors"
    for call in (
        lambda: lowbit.load(folder),
        lambda: lowbit.dequantize(folder, tmp_path / "out"),
        lambda: lowbit.dequantize(folder, tmp_path / "out", dtype="bfloat16"),
        lambda: lowbit.convert(folder, tmp_path / "out", format=other),
    ):
        with pytest.raises(InputError, match=f"{re.escape(UP)}.*NaN or infinite"):
            call()
    assert not (tmp_path / "out").exists()
    failures = lowbit.verify(folder, dense, run=False).failures
    assert any("NaN or infinite" in failure for failure in failures)
