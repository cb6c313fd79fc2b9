"""Folders with integer activations, from quantizing to logits: against a float64 simulation of the same arithmetic,
against compressed-tensors in transformers, and through every command that reads them."""

import json
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from folders import edit_config, edit_tensors, save_chat_model, stored_tensors
from models import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.conversion.formats import convert, dequantize
from lowbit.errors import InputError, UsageError
from lowbit.numerics.activations import RangeObserver
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.calibrated.layer import Seen
from lowbit.quantizers import rtn
from lowbit.verification.checks import static_checks

pytestmark = pytest.mark.slow

NAMES = ("W8A8", "W8A8-STATIC", "W8A8-STATIC_SYM", "W8A8-DYNAMIC_ASYM", "W4A8-G32", "W4A8-CHANNEL-STATIC")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))
SAMPLES = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(8))
each_scheme = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    save_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    made = {}

    def folder(name, **options):
        key = (name, *options.items())
        if key not in made:
            target = tmp_path_factory.mktemp("quantized") / "model"
            data = {"dataset": SAMPLES} if "STATIC" in name or options.get("method") == "gptq" else {}
            lowbit.quantize(source, target, scheme=name, **data, **options)
            made[key] = target
        return made[key]

    return folder


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def far(first, second):
    return float((first.double() - second.double()).norm() / second.double().norm())


def simulated(source, folder):
    """The model in float64, its linears computed from the stored tensors in integers (float64 sums them exactly)."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    tensors = stored_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    bits, args = group["weights"]["num_bits"], group["input_activations"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight_scale" in tensors:
            of_module = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            module.forward = _integer_forward(module, of_module, bits, args)
    return model


def _integer_forward(module, tensors, bits, args):
    if "weight_packed" in tensors:
        bit = torch.arange(32)
        stream = (tensors["weight_packed"].long().unsqueeze(-1) >> bit & 1).flatten(1)
        codes = stream[:, : module.in_features * bits].view(module.out_features, module.in_features, bits)
        codes = (codes << torch.arange(bits)).sum(-1) - 2 ** (bits - 1)
    else:
        codes = tensors["weight"].long()
    scales = tensors["weight_scale"].double()
    weight = codes.view(len(codes), scales.shape[1], -1).double()

    def forward(x):
        wide = x.float()  # whose scales are found in float32
        if args["dynamic"]:
            low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
            scale = torch.maximum(-low, high) / 127.5 if args["symmetric"] else (high - low) / 255
            zero = torch.zeros(()) if args["symmetric"] else (-128 - low / scale).round().clamp(-128, 127)
        else:
            scale, zero = tensors["input_scale"].float(), tensors.get("input_zero_point", torch.zeros(1)).float()
        steps = ((wide / scale).round() + zero).clamp(-128, 127).double() - zero
        sums = torch.einsum("btgk,ngk->btng", steps.unflatten(-1, (scales.shape[1], -1)), weight)
        assert torch.equal(sums, sums.round())
        return (sums * scales).sum(-1) * scale.double()

    return forward


@each_scheme
def test_logits_are_those_of_integer_arithmetic(name, source, folders):
    """A code in a hundred thousand falls on the other side of a rounding: the streams differ in float32's last bit."""
    folder = folders(name)
    model = lowbit.load(folder)
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} <= {"native", "int8_cpu"}
    wanted = logits(simulated(source, folder))
    dense = logits(AutoModelForCausalLM.from_pretrained(source))
    assert far(logits(model), wanted) < 2e-3 < far(dense, wanted)
    assert far(logits(lowbit.load(folder, backend="reference")), wanted) < 2e-3


@each_scheme
def test_compressed_tensors_runs_the_same(name, folders):
    """Of symmetric tokens, the largest value lies half way between two codes: its last bit decides which."""
    folder, wanted = folders(name), 1e-2 if name == "W8A8" else 2e-3
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == ("int-quantized" if name.startswith("W8") else "pack-quantized")
    QuantizationConfig.model_validate(config)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert far(logits(lowbit.load(folder)), logits(theirs)) < wanted


@each_scheme
def test_nearer_to_the_model_than_chance(name, source, folders):
    dense = logits(AutoModelForCausalLM.from_pretrained(source))
    assert far(logits(lowbit.load(folders(name))), dense) < (0.05 if name.startswith("W8") else 0.35)


@each_scheme
def test_files_are_what_was_planned(name, folders, source):
    folder = folders(name)
    tensors = stored_tensors(folder)
    report = lowbit.quantize(source, folder / "none", scheme=name, dry_run=True)
    assert report.output_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    static, shifted = "STATIC" in name, name.endswith("STATIC")
    prefix = "model.layers.0.self_attn"
    assert (f"{prefix}.q_proj.input_scale" in tensors) == static
    assert (f"{prefix}.q_proj.input_zero_point" in tensors) == shifted
    if static:  # engines merge them into one
        for other in ("k_proj", "v_proj"):
            for suffix in ("input_scale", "input_zero_point") if shifted else ("input_scale",):
                assert torch.equal(tensors[f"{prefix}.q_proj.{suffix}"], tensors[f"{prefix}.{other}.{suffix}"])


@each_scheme
def test_saving_a_loaded_model_gives_the_same_tensors(name, folders, tmp_path):
    model = lowbit.load(folders(name))
    model.save_pretrained(tmp_path / "again")
    before, after = stored_tensors(folders(name)), stored_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(logits(lowbit.load(tmp_path / "again")), logits(model))


@each_scheme
def test_commands_read_it(name, folders, source, tmp_path):
    folder, scheme = folders(name), Scheme.parse(name).fitted(64)
    for check in static_checks(folder, source):
        assert check.ok is not False, check
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert shown.exit_code == 0 and scheme.name in shown.stdout
    convert(folder, tmp_path / "ct", format="compressed-tensors")
    assert all(torch.equal(t, stored_tensors(folder)[key]) for key, t in stored_tensors(tmp_path / "ct").items())
    for other in ("gptq", "awq", "mlx", "gguf"):
        with pytest.raises(InputError, match=r"has no quantized activations, which W\dA8"):
            convert(folder, tmp_path / other, format=other)
    dequantize(folder, tmp_path / "dense")
    weight = lowbit.load(folder).get_submodule("model.layers.1.mlp.down_proj").weight
    assert torch.equal(stored_tensors(tmp_path / "dense")["model.layers.1.mlp.down_proj.weight"], weight)


def test_gptq_finds_better_weights_for_the_same_activations(source, folders):
    dense = logits(AutoModelForCausalLM.from_pretrained(source), SAMPLES)
    errors = [far(logits(lowbit.load(folders("W4A8-G32", method=m)), SAMPLES), dense) for m in ("rtn", "gptq")]
    assert errors[1] < 0.9 * errors[0]


def test_ranges_are_of_the_inputs_in_the_calibration(source, folders):
    """Min-max of the first layer, whose inputs nothing that is quantized has touched."""
    model, seen = AutoModelForCausalLM.from_pretrained(source), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    logits(model, SAMPLES)
    low, high = float(seen[0].min()), float(seen[0].max())
    tensors = stored_tensors(folders("W8A8-STATIC", activation_range="minmax"))
    name = "model.layers.0.self_attn.q_proj"
    assert float(tensors[f"{name}.input_scale"]) == pytest.approx((high - low) / 255, rel=1e-5)
    assert int(tensors[f"{name}.input_zero_point"]) == round(-128 - low / float(tensors[f"{name}.input_scale"]))
    for method in ("percentile", "mse"):
        other = stored_tensors(folders("W8A8-STATIC", activation_range=method))
        assert float(other[f"{name}.input_scale"]) <= float(tensors[f"{name}.input_scale"]) * 1.001


def test_ranges_are_all_that_rounding_measures(source, tmp_path, monkeypatch):
    given, round_to_nearest = [], rtn.quantize

    def quantize(weight, stats, *rest):
        given.append(stats)
        return round_to_nearest(weight, stats, *rest)

    monkeypatch.setattr(rtn, "quantize", quantize)
    lowbit.quantize(source, tmp_path / "q", scheme="W8A8-STATIC", dataset=SAMPLES)
    assert given and all(moment is None for stats in given for moment in stats.values())


def test_a_mixed_model_names_the_format_of_each_group(source, folders, tmp_path):
    lowbit.quantize(source, tmp_path / "q", scheme="W8A8-DYNAMIC_ASYM", overrides=[(".*down_proj", "W4A16-G32")])
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert far(logits(lowbit.load(tmp_path / "q")), logits(theirs)) < 2e-3


UP = "model.layers.0.mlp.up_proj"


def test_inputs_of_experts_stay_in_floating_point(tmp_path):
    save_tiny(tmp_path / "source", "qwen3_moe")
    lowbit.quantize(tmp_path / "source", tmp_path / "q", scheme="W8A8-STATIC", dataset=SAMPLES)
    tensors = stored_tensors(tmp_path / "q")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    assert "model.layers.0.mlp.experts.3.down_proj.weight_packed" in tensors
    assert not any(".experts." in key and "input" in key for key in tensors)
    model = lowbit.load(tmp_path / "q")
    assert far(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))) < 0.1
    model.save_pretrained(tmp_path / "again")
    again = stored_tensors(tmp_path / "again")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in again)
    for check in static_checks(tmp_path / "q", tmp_path / "source"):
        assert check.ok is not False, check


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_transposed_and_fused_linears_take_static_inputs(name, tmp_path):
    """Weights that are stored transposed, and several linears in one."""
    save_tiny(tmp_path / "source", name)
    lowbit.quantize(tmp_path / "source", tmp_path / "q", scheme="W8A8-STATIC", dataset=SAMPLES, lm_head=name == "phi3")
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    assert far(logits(lowbit.load(tmp_path / "q")), dense) < 0.1


def _drop(suffix):
    return lambda tensors: tensors.pop(f"{UP}.{suffix}")


def _change(suffix, value):
    return lambda tensors: tensors.update({f"{UP}.{suffix}": value})


DAMAGE = {
    "no-scale": (_drop("input_scale"), r"up_proj\.input_scale is not in the checkpoint"),
    "no-zero-point": (_drop("input_zero_point"), r"up_proj\.input_zero_point is not in the checkpoint"),
    "nan": (_change("input_scale", torch.tensor([torch.nan])), r"up_proj\.input_scale is nan, expected a positive"),
    "zero": (_change("input_scale", torch.tensor([0.0])), r"up_proj\.input_scale is 0.0, expected a positive"),
    "two": (_change("input_scale", torch.ones(2)), r"up_proj\.input_scale has shape \[2\], expected \[1\]"),
    "wide": (_change("input_zero_point", torch.tensor([300])), r"input_zero_point is torch.int64, expected torch.int8"),
    "float": (_change("weight", torch.ones(96, 64)), r"up_proj\.weight is not in the checkpoint"),
    "cut": (_change("weight", torch.ones(96, 32, dtype=torch.int8)), r"up_proj\.weight_?\w* has shape|up_proj"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused_by_name(case, folders, tmp_path):
    change, message = DAMAGE[case]
    convert(folders("W8A8-STATIC"), tmp_path / "q", format="compressed-tensors")
    edit_tensors(tmp_path / "q", change)
    with pytest.raises(InputError, match=message) as error:
        lowbit.load(tmp_path / "q")
    assert "\n" not in str(error.value)
    failed = [check for check in static_checks(tmp_path / "q") if check.ok is False]
    assert failed and "up_proj" in failed[0].detail


def test_static_schemes_refuse_what_they_cannot_measure(source, tmp_path):
    with pytest.raises(UsageError, match="activation_range is of static schemes, such as W8A8-STATIC, not of W8A8"):
        lowbit.quantize(source, tmp_path / "q", scheme="W8A8", activation_range="mse")
    with pytest.raises(UsageError, match="activation_range is 'max'; allowed: mse, minmax, percentile"):
        lowbit.quantize(source, tmp_path / "q", scheme="W8A8-STATIC", activation_range="max")
    with pytest.raises(InputError, match="gptq has no quantized activations, which W8A8-CHANNEL asks for"):
        lowbit.quantize(source, tmp_path / "q", scheme="W8A8", format="gptq")
    assert not (tmp_path / "q").exists()


def test_inputs_that_calibration_never_sees(source, folders, tmp_path):
    target = SimpleNamespace(step=SimpleNamespace(scheme=Scheme.parse("W8A8-STATIC"), base="model.unused"))
    for seen in (Seen(None), Seen(None, RangeObserver())):
        with pytest.raises(InputError, match=r"no calibration token reached model\.unused, .*--ignore.*--override"):
            seen.input_grid(target, Recipe(target.step.scheme))
    broken = tmp_path / "nan"
    dequantize(folders("W8A8"), broken)
    edit_tensors(broken, lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(3e38))
    with pytest.raises(InputError, match=r"inputs of model\.layers\.0\..* in the calibration are values from .*finite"):
        lowbit.quantize(broken, tmp_path / "q", scheme="W8A8-STATIC", dataset=SAMPLES)
    assert not (tmp_path / "q").exists()


def test_the_command_line(source, tmp_path):
    arguments = ["quantize", str(source), "-o", str(tmp_path / "q"), "--scheme", "W8A8-STATIC", "--activation-range"]
    torch.save(SAMPLES, tmp_path / "ids.pt")
    (tmp_path / "text.txt").write_text("hello there " * 400)
    more = ["mse", "--dataset", str(tmp_path / "text.txt"), "--num-samples", "4", "--seqlen", "16", "--json"]
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "q" / "lowbit_report.json").read_text())
    assert report["recipe"]["activation_range"] == "mse"
    assert report["recipe"]["scheme"]["activations"] == {"bits": 8, "sym": False, "strategy": "tensor"}


def test_edited_configs_are_refused(folders, tmp_path):
    convert(folders("W8A8"), tmp_path / "q", format="compressed-tensors")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] = None
    edit_config(tmp_path / "q", quantization_config=config)
    with pytest.raises(InputError, match=r"W8A16-CHANNEL is stored as 'int-quantized'.*expected 'pack-quantized'"):
        lowbit.load(tmp_path / "q")
