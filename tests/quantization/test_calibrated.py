"""Calibrated quantization: closer to the original, measured where and when it says, the file is what was measured."""

from itertools import pairwise

import pytest
import spy_quantizer
import torch
from covering import slow_but
from folders import contents, edit_tensors, same_bits, stored_tensors
from models import ARCHITECTURES, relative_error, save_tiny, tiny_model, token_ids
from runs import IDS, dense_model, dense_tensors, gptq, logits, names
from transformers import LlamaForCausalLM

import lowbit
from lowbit.errors import UsageError
from lowbit.quantization.calibrated import computing
from lowbit.quantization.calibrated.layer_run import LayerRun
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantizers import QUANTIZERS

MANY = token_ids(8 * 64).view(8, 64)  # few enough for some experts of every model to be cold


def routed_tokens(model, ids) -> dict[str, list[int]]:
    """experts module -> how many tokens its router sent to each expert."""
    counts, hooks = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "num_experts") and hasattr(module, "is_transposed"):

            def hook(module, args, kwargs, name=name):
                index = next(a for a in (*args, *kwargs.values()) if not a.is_floating_point())
                counts[name] = torch.bincount(index.flatten(), minlength=module.num_experts).tolist()

            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.fixture
def computed(monkeypatch):
    """layer -> the parameters of that layer of the quantized model, as they were when the run left it."""
    kept, unload = {}, LayeredModel.unload

    def keep(self, number):
        # the quantized one is unloaded first, the original last
        parameters, prefix = self.model.named_parameters(), self._prefix_of(number)
        kept.setdefault(number, {n: p.detach().cpu().clone() for n, p in parameters if n.startswith(prefix)})
        unload(self, number)

    monkeypatch.setattr(LayeredModel, "unload", keep)
    return kept


@pytest.mark.parametrize("architecture", slow_but(("llama", "mixtral"), ARCHITECTURES))
def test_every_architecture(architecture, tmp_path, computed):
    source = save_tiny(tmp_path / "source", architecture)
    report = gptq(source, tmp_path / "out", dataset=MANY)
    assert names(tmp_path) == ["out", "source"]
    lowbit.quantize(source, tmp_path / "rtn", group_size=16, options={"scale_search": "mse"})
    wanted = logits(tiny_model(architecture), MANY)
    loaded = logits(lowbit.load(tmp_path / "out"), MANY)
    error = relative_error(loaded, wanted)
    assert error < 0.7 * relative_error(logits(lowbit.load(tmp_path / "rtn"), MANY), wanted)

    # the file holds what the run computed with
    dense = dense_model(source, tmp_path / "out", report, tmp_path / "dense")
    assert relative_error(logits(dense, MANY), loaded) < 1e-5
    parameters = dict(dense.named_parameters())
    assert sorted(computed) == [0, 1]
    for layer in computed.values():
        assert len(layer) >= 6 and all(torch.equal(parameters[name], p) for name, p in layer.items())

    # the report names every matrix that is quantized, and every expert of it
    tensors = stored_tensors(source)
    packed = {n for n in tensors if n not in stored_tensors(tmp_path / "out")}
    entries = [(layer["name"], layer.get("expert")) for layer in report.layers]
    fused = {n for n in packed if tensors[n].ndim == 3}
    assert {n for n, _ in entries} == packed and len(packed) == report.quantized_tensors
    assert len(set(entries)) == len(entries) == len(packed - fused) + sum(len(tensors[n]) for n in fused)
    for layer in report.layers:
        # phi3's o_proj and the like see all tokens; experts, those routed there
        assert layer["tokens"] == MANY.numel() or layer.get("expert") is not None
        assert layer["tokens"] >= 256 and layer["seconds"] > 0 and layer["damping"] == 0.03
        assert 0 < layer["output_error"] < 0.5 and 0 < layer["output_error_to_original"] < 0.5
        stages = list(layer["objective"].values())
        assert stages and all(0 < after <= before * (1 + 1e-5) for before, after in pairwise(stages))
    assert [entry["layer"] for entry in report.decoder_layers] == [0, 1]
    assert report.calibration == {"source": "token ids", "samples": 8, "tokens": MANY.numel()}
    assert report.peak_memory > 0 and report.expected_peak > 0

    # cold experts are said to be cold, with the tokens that their router sent there
    routed = routed_tokens(dense, MANY)
    assert not routed or any(count < 256 for counts in routed.values() for count in counts)
    for experts, counts in routed.items():
        number = experts.split("layers.")[1].split(".")[0]
        inside = [x for x in report.layers if x.get("expert") is not None and f"layers.{number}." in x["name"]]
        assert {x["expert"] for x in inside} == set(range(len(counts)))
        for entry in inside:
            count = counts[entry["expert"]]
            assert entry["tokens"] == max(count, 256)
            assert entry["note"] == (f"cold expert: {count} tokens of its own, topped up" if count < 256 else "")


def test_an_expert_that_no_token_reaches(tmp_path):
    """One token, over and over: two of four experts are never chosen, in the first layer at least."""
    source = save_tiny(tmp_path / "source", "mixtral")
    ids = torch.full((4, 80), 9)
    report = gptq(source, tmp_path / "out", dataset=ids)
    (counts,) = (c for name, c in routed_tokens(tiny_model("mixtral"), ids).items() if ".0." in name)
    assert sorted(counts)[:2] == [0, 0]
    for entry in report.layers:
        if ".layers.0." in entry["name"] and entry.get("expert") is not None and not counts[entry["expert"]]:
            assert entry["note"].startswith("cold expert: 0 tokens") and entry["tokens"] == 256
    assert logits(lowbit.load(tmp_path / "out"), ids).isfinite().all()


# The report is the truth


def observed_errors(source_tensors, quantized, original, ids, used) -> dict[str, tuple[float, float]]:
    """Weight name -> relative output errors of the quantized linear on its own input, and on what it should get."""
    inputs, outputs, hooks = {}, {}, []
    for key, model in (("quantized", quantized), ("original", original)):
        for name, module in model.named_modules():
            if f"{name}.weight" in used:

                def hook(module, args, output, at=(key, f"{name}.weight")):
                    inputs[at], outputs[at] = args[0].double().flatten(0, 1), output.double().flatten(0, 1)

                hooks.append(module.register_forward_hook(hook))
        logits(model, ids)
    found = {}
    for name in used:
        weight = source_tensors[name].double()
        x, f, got = inputs["quantized", name], inputs["original", name], outputs["quantized", name]
        found[name] = (relative_error(got, x @ weight.T), relative_error(got, f @ weight.T))
    return found


@pytest.mark.parametrize("all_tokens", [True, False], ids=["all tokens", "a sample"])
def test_errors_of_the_report_are_those_of_the_loaded_model(tmp_path, monkeypatch, all_tokens):
    """Batches of eight tokens are kept whole; of longer ones the report looks at some of the tokens."""
    monkeypatch.setattr(computing, "_BATCH_TOKENS", 8 if all_tokens else 64)
    ids = token_ids(256).view(32, 8) if all_tokens else token_ids(2048).view(32, 64)
    source = save_tiny(tmp_path / "source")
    report = gptq(source, tmp_path / "out", dataset=ids, lm_head=True)
    used = {layer["name"]: layer for layer in report.layers}
    assert len(used) == 15
    models = lowbit.load(tmp_path / "out"), tiny_model()
    errors = observed_errors(stored_tensors(source), *models, ids, used)
    for name, layer in used.items():
        reported = layer["output_error"], layer["output_error_to_original"]
        assert reported == pytest.approx(errors[name], rel=1e-3 if all_tokens else 0.15), name


def test_report_tells_rounding_error_from_drift_correction(tmp_path, monkeypatch):
    """Without drift and damping nothing is moved, and both errors are the same; with drift, what joins the residual
    stream is moved for what the stream has lost, which is no error of rounding."""
    monkeypatch.setattr(computing, "_BATCH_TOKENS", 8)  # all tokens are looked at
    source, ids = save_tiny(tmp_path / "source"), token_ids(256).view(32, 8)
    still = gptq(source, tmp_path / "still", dataset=ids, options={"drift": 0, "damping": 0})
    for layer in still.layers:
        assert layer["rounding_error"] == pytest.approx(layer["output_error"], rel=1e-3), layer["name"]
    moved = gptq(source, tmp_path / "moved", dataset=ids, options={"drift": 1, "damping": 0})
    joining = [layer for layer in moved.layers if layer["kind"] in ("o_proj", "down_proj")][1:]
    assert all(layer["rounding_error"] < 0.9 * layer["output_error"] for layer in joining)


def test_error_of_a_decoder_layer(tmp_path):
    source = save_tiny(tmp_path / "source")
    report = gptq(source, tmp_path / "out")
    hidden = []
    for model in (lowbit.load(tmp_path / "out"), tiny_model()):
        with torch.no_grad():  # the last of hidden_states is behind the norm
            hidden.append(model.model.layers[0](model.model.embed_tokens(IDS), **position_of(model, IDS)))
    assert report.decoder_layers[0]["output_error"] == pytest.approx(relative_error(*hidden), rel=1e-3)
    assert report.decoder_layers[1]["output_error"] > report.decoder_layers[0]["output_error"] / 2


def position_of(model, ids) -> dict:
    positions = torch.arange(ids.shape[1])[None]
    embedded = model.model.embed_tokens(ids)
    return {"position_embeddings": model.model.rotary_emb(embedded, positions), "position_ids": positions}


# True sequential: every linear is measured behind the quantized ones before it

PAIRS = ["gate_up_proj", "down_proj"]
# architecture -> the modules of a layer that share an input, in the order of their use
ORDER = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"], *[[f"experts.{e}.{p}"] for e in range(4) for p in PAIRS]],
}


# Linears whose output is added to the residual stream -> the norm of the layer that reads this stream before
JOINING = {"o_proj": 0, "attn.c_proj": 0, "down_proj": 1, "mlp.c_proj": 1}


def residual(model, layer: int, norm: int, ids) -> torch.Tensor:
    """float64 [tokens, hidden]: what the norms of a layer read."""
    (module,) = (m for name, m in model.named_modules() if name.endswith(f".{layer}") and len(list(m.children())) > 2)
    norms = [child for name, child in module.named_children() if "norm" in name or "ln_" in name]
    seen = []
    hook = norms[norm].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, ids)
    hook.remove()
    return seen[0].flatten(0, -2).double()


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "spy", None)  # gone again after the test
    return spy_quantizer.install()


def linear_inputs(model, architecture: str, layer: int, part: str, ids, routing) -> torch.Tensor:
    """float64 [tokens, K]: what a weight of `model` is multiplied with. routing: token -> its experts, of the quantized
    model; the experts' own arithmetic is written down here again."""
    seen = []
    modules = [(name, m) for name, m in model.named_modules() if f".{layer}." in name]
    wanted = "experts" if part.startswith("experts") else part
    (module,) = (m for name, m in modules if name.endswith(wanted))
    hook = module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args), with_kwargs=True)
    logits(model, ids)
    hook.remove()
    x = seen[0][0].flatten(0, -2)
    if wanted != "experts":
        return x.double()
    if routing is None:
        routing = seen[0][1]
    _, expert, matrix = part.split(".")
    x = x[(routing == int(expert)).any(-1)]
    if matrix == "down_proj":
        gate, up = (x @ module.gate_up_proj.data[int(expert)].T).chunk(2, dim=-1)
        x = torch.nn.functional.silu(gate) * up
    return x.double()


def routing_of(model, layer: int, ids):
    seen = []
    for name, module in model.named_modules():
        if f".{layer}." in name and name.endswith("experts"):
            hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
            logits(model, ids)
            hook.remove()
    return seen[0] if seen else None


def weight_of(model, layer: int, part: str) -> torch.Tensor:
    """The parameter data [N, K] of a part, to be read and replaced."""
    if part.startswith("experts"):
        _, expert, matrix = part.split(".")
        (found,) = (p for n, p in model.named_parameters() if f".{layer}." in n and n.endswith(f"experts.{matrix}"))
        return found.data[int(expert)]
    (found,) = (p for n, p in model.named_parameters() if f".{layer}." in n and n.endswith(f"{part}.weight"))
    return found.data.T if "c_" in part else found.data


@pytest.mark.parametrize("architecture", slow_but(("mixtral",), ORDER))
def test_moments_are_measured_behind_the_quantized_weights(architecture, tmp_path, spy):
    """Against hooks on whole models in which the weights that come earlier are replaced by the written ones."""
    ids = token_ids(32 * 64).view(32, 64)  # every expert has tokens enough of its own
    source = save_tiny(tmp_path / "source", architecture)
    report = gptq(source, tmp_path / "out", dataset=ids, **spy)
    final = dense_model(source, tmp_path / "out", report, tmp_path / "dense")
    original, partly = tiny_model(architecture), tiny_model(architecture)
    assert not any(layer["note"] for layer in report.layers)
    moved, seen = [], spy_quantizer.SEEN
    for layer in range(2):
        for stage in ORDER[architecture]:
            whole = torch.cat([weight_of(original, layer, part) for part in stage])
            matching = [i for i, r in enumerate(seen) if r[0].shape == whole.shape and torch.equal(r[0], whole)]
            assert len(matching) == 1
            _, hessian, missing = seen.pop(matching[0])
            routing = routing_of(partly, layer, ids)
            lacking = missing.split([len(weight_of(original, layer, part)) for part in stage])
            for part, part_lacking in zip(stage, lacking, strict=True):
                x = linear_inputs(partly, architecture, layer, part, ids, routing)
                f = linear_inputs(original, architecture, layer, part, ids, routing)
                weight = weight_of(original, layer, part).double()
                expected, outputs = x.T @ x / len(x), (f - x) @ weight.T
                if (norm := JOINING.get(part)) is not None:
                    outputs += residual(original, layer, norm, ids) - residual(partly, layer, norm, ids)
                assert relative_error(hessian, expected) < 1e-5, (layer, part)
                # relative to all of the output: where nothing is quantized before it, nothing is missing
                scale = (weight @ expected).norm()
                assert float((part_lacking - outputs.T @ x / len(x)).norm() / scale) < 1e-5, (layer, part)
                moved.append((relative_error(f.T @ f / len(f), expected), float(part_lacking.norm() / scale)))
            for part in stage:
                weight_of(partly, layer, part).copy_(weight_of(final, layer, part))
    assert seen == []
    # the check above tells one order from another: all but the first input are far from the original ones
    first = len(ORDER[architecture][0])
    assert all(max(m) < 1e-6 for m in moved[:first]) and all(min(m) > 1e-2 for m in moved[first:]), moved


def test_inputs_that_are_always_zero(tmp_path):
    """A gate of zeros closes the MLP: what its last linear receives is nothing."""
    source = save_tiny(tmp_path / "source")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.gate_proj.weight"].zero_())
    report = gptq(source, tmp_path / "out")
    dense = dense_tensors(source, tmp_path / "out", report)
    assert dense["model.layers.1.mlp.gate_proj.weight"].abs().max() == 0
    assert all(value.isfinite().all() for value in dense.values())
    (entry,) = (layer for layer in report.layers if layer["name"] == "model.layers.1.mlp.down_proj.weight")
    assert entry["output_error"] == 0 and entry["tokens"] == IDS.numel()
    assert logits(lowbit.load(tmp_path / "out")).isfinite().all()


# How it is computed does not matter


@pytest.mark.parametrize("architecture", slow_but(("llama",), ["llama", "mixtral", "gpt2"]))
def test_passes_started_again_give_the_same_as_passes_held(architecture, tmp_path, monkeypatch, no_threads):
    kept, init = [], LayerRun.__init__
    monkeypatch.setattr(computing, "_BATCH_TOKENS", 64)
    monkeypatch.setattr(LayerRun, "__init__", lambda self, *args: (kept.append(args[-1]), init(self, *args))[1])
    source = save_tiny(tmp_path / "source", architecture)
    held = gptq(source, tmp_path / "held", max_memory="100GB")
    again = gptq(source, tmp_path / "again", max_memory="1MB")
    assert kept == [True, True, False, False]
    no_threads("lowbit-staged-pass")
    assert contents(tmp_path / "held") == contents(tmp_path / "again")
    errors = [[layer["output_error"] for layer in report.layers] for report in (held, again)]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("architecture", slow_but(("llama",), ["llama", "mixtral"]))
def test_batches_do_not_matter(architecture, tmp_path, monkeypatch, spy):
    source = save_tiny(tmp_path / "source", architecture)
    ids = token_ids(24 * 64).view(24, 64)
    gptq(source, tmp_path / "one", dataset=ids, **spy)
    expected = spy_quantizer.SEEN.copy()
    spy_quantizer.SEEN.clear()
    monkeypatch.setattr(computing, "_BATCH_TOKENS", 5 * 64)  # and the last one is shorter
    gptq(source, tmp_path / "many", dataset=ids, **spy)
    assert len(spy_quantizer.SEEN) == len(expected) > 6
    for (weight, *moments), (same, *others) in zip(spy_quantizer.SEEN, expected, strict=True):
        assert torch.equal(weight, same)
        assert all(float((a - b).norm() / others[0].norm()) < 1e-5 for a, b in zip(moments, others, strict=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_the_same_call_gives_the_same_bytes(tmp_path):
    source = save_tiny(tmp_path / "source")
    for name in ("first", "second"):
        gptq(source, tmp_path / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("architecture", slow_but(("llama",), ["llama", "mixtral"]))
def test_stored_in_bfloat16(architecture, tmp_path):
    source = save_tiny(tmp_path / "source", architecture, dtype=torch.bfloat16)
    report = gptq(source, tmp_path / "out")
    stored = stored_tensors(tmp_path / "out")
    assert all(stored[k].dtype == torch.bfloat16 for k in stored if k.endswith("_scale"))
    lowbit.quantize(source, tmp_path / "rtn", group_size=16, options={"scale_search": "mse"})
    wanted = logits(tiny_model(architecture, torch.bfloat16).float())
    errors = [relative_error(logits(lowbit.load(tmp_path / n, dtype=torch.float32)), wanted) for n in ("out", "rtn")]
    assert errors[0] < 0.75 * errors[1] and report.mean_rounding_error < 0.2


def test_tensors_that_no_module_has(tmp_path, monkeypatch):
    """Whatever their names: rotary frequencies of old checkpoints, further layers (multi-token prediction) where
    transformers knows of them, and what nobody knows."""
    source = save_tiny(tmp_path / "source")
    copied = {
        "model.layers.7.self_attn.q_proj.weight": torch.randn(64, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8),
        "model.layers.1.extra.weight": torch.randn(3, 3),
        "counts": torch.arange(5),
    }
    edit_tensors(source, lambda tensors: tensors.update(copied))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.7\."])
    gptq(source, tmp_path / "out")
    stored = stored_tensors(tmp_path / "out")
    assert all(same_bits(stored[name], tensor) for name, tensor in copied.items())


# The output embedding


@pytest.mark.parametrize("architecture", slow_but(("llama",), ["llama", "gpt_neox", "gemma3"]))
def test_output_embedding(architecture, tmp_path):
    source = save_tiny(tmp_path / "source", architecture, tie_word_embeddings=False)
    without = gptq(source, tmp_path / "without")
    report = gptq(source, tmp_path / "out", lm_head=True)
    entry = report.layers[-1]
    assert len(report.layers) == len(without.layers) + 1 and entry["name"] in without.left_alone
    assert entry["name"] in ("lm_head.weight", "embed_out.weight") and entry["tokens"] == IDS.numel()
    assert 0 < entry["output_error"] < 0.2 and entry["objective"] and entry["name"] not in report.left_alone
    assert entry["name"] not in stored_tensors(tmp_path / "out")
    wanted = logits(tiny_model(architecture, tie_word_embeddings=False))
    lowbit.quantize(source, tmp_path / "rtn", group_size=16, lm_head=True, options={"scale_search": "mse"})
    errors = [relative_error(logits(lowbit.load(tmp_path / name)), wanted) for name in ("out", "rtn")]
    assert errors[0] < 0.7 * errors[1]
    # the layers before it are the same
    first, second = stored_tensors(tmp_path / "without"), stored_tensors(tmp_path / "out")
    assert all(same_bits(second[k], first[k]) for k in first if k.endswith("_packed"))


def test_tied_output_embedding(tmp_path):
    source = save_tiny(tmp_path / "source", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="tied"):
        gptq(source, tmp_path / "out", lm_head=True)
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("wider", slow_but(("down_proj",), ["down_proj", "o_proj"]))
def test_a_mixed_folder_is_near_its_source(wider, tmp_path):
    """Weights of 8 bits make up for those of 2 bits before them: they are moved much further than 8 bits round."""
    source = save_tiny(tmp_path / "source")
    report = gptq(source, tmp_path / "out", dataset=MANY, scheme="W2A16-G16", overrides=[(wider, "W8A16-G16")])
    assert max(layer["moved"] for layer in report.layers if layer["scheme"].startswith("W8")) > 0.02
    assert not [line for line in lowbit.verify(tmp_path / "out", source, run=False).failures if "source" in line]


def test_without_drift_correction_nothing_is_moved(tmp_path):
    report = gptq(save_tiny(tmp_path / "source"), tmp_path / "out", dataset=MANY, options={"drift": 0})
    assert {layer["moved"] for layer in report.layers} == {0.0}
