"""What lowbit uses of transformers beyond its documentation: that it is there, and what happens when it goes.

Run alone under a new release, this file says by name what the release has taken away.
"""

import inspect
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
import transformers
from models import save_tiny, tiny_model, token_ids
from packaging.version import Version

import lowbit
from lowbit import transformers_api
from lowbit.checkpoint.gguf.rules import rules_of
from lowbit.conversion.gguf_vocabulary import add_vocabulary
from lowbit.generation import Decoder, Draft
from lowbit.generation.steps.cache import static_cache
from lowbit.generation.steps.notices import say_once
from lowbit.transformers_api import ATTRIBUTES, IMPORTED, expert_parallel_plan
from lowbit.upstream import MissingNameError, UpstreamName

RELEASE = Version(transformers.__version__)
# Names that the oldest supported release does not have yet
SINCE = {"GGUF_PRE_TOKENIZER_SPLITS": Version("5.23")}


@pytest.fixture
def gone(monkeypatch):
    """gone(name): transformers no longer has it."""

    def take_away(name: str) -> None:
        names = ATTRIBUTES if name in ATTRIBUTES else IMPORTED
        path = names[name].path
        monkeypatch.setitem(names, name, replace(names[name], path=path.removesuffix(name) + f"gone_{name}"))

    transformers_api._merge_class.cache_clear()
    say_once.cache_clear()
    yield take_away
    transformers_api._merge_class.cache_clear()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    save_tiny(folder / "dense", "mixtral")
    lowbit.quantize(folder / "dense", folder / "packed", group_size=16)
    return folder / "packed"


@pytest.mark.parametrize("name", IMPORTED)
def test_each_imported_name_is_there(name):
    if SINCE.get(name, RELEASE) > RELEASE:
        pytest.skip(f"transformers has it from {SINCE[name]} on")
    assert getattr(transformers_api, name) is transformers_api.use(name)


def owners():
    """An object that has it, for each attribute."""
    model, mixtral = tiny_model(), tiny_model("mixtral")
    renaming = transformers_api.WeightRenaming("a", "b")
    converter = transformers.WeightConverter("a.weight", "b.weight", [transformers_api.MergeModulelist(0)])
    experts = next(module for module in mixtral.modules() if transformers_api.experts_have_gate(module) is not None)
    layer = transformers.StaticCache(model.config, 8).layers[0]
    owner_of = {"PreTrainedConfig": [model.config], "PreTrainedModel": [model], "StaticLayer": [layer]}
    owner_of |= {"WeightConverter": [renaming, converter], "experts": [experts]}
    return {name: owner_of[found.path.split(".")[1]] for name, found in ATTRIBUTES.items()}


def test_each_attribute_is_there():
    missing = [
        ATTRIBUTES[name].path for name, objects in owners().items() for each in objects if not hasattr(each, name)
    ]
    assert not missing


def test_documented_names_are_there():
    """What lowbit imports from the top level, and the hooks of a quantizer."""
    for name in ("CacheLayerMixin", "ConversionOps", "Conv1D", "ROPE_INIT_FUNCTIONS", "StaticSlidingWindowLayer"):
        assert hasattr(transformers, name)
    hooks = (
        "get_quantize_ops", "update_weight_conversions", "param_needs_quantization", "get_state_dict_and_metadata",
        "_process_model_before_weight_loading", "_process_model_after_weight_loading", "_dequantize",
    )  # fmt: skip
    assert [hook for hook in hooks if not hasattr(transformers.quantizers.HfQuantizer, hook)] == []


def test_the_cache_goes_by_the_name_of_the_release():
    name = "cache" if Version("5.24") <= RELEASE else "past_key_values"
    model = tiny_model()
    assert transformers_api.cache_argument(model) == name

    class Wrapper(torch.nn.Module):
        def forward(self, input_ids=None, **kwargs):
            return model(input_ids, **kwargs)

    assert transformers_api.cache_argument(Wrapper()) == name

    class Older(torch.nn.Module):
        def forward(self, input_ids=None, past_key_values=None):
            """As remote code spells it."""

    assert transformers_api.cache_argument(Older()) == "past_key_values"
    assert transformers_api.cache_argument(torch.nn.Linear(2, 2)) is None


def test_a_merge_that_keeps_dimensions_is_still_a_merge():
    """Saving asks after loading has replaced its operation."""
    merge = transformers.WeightConverter("a.*.weight", "b", [transformers_api.MergeModulelist(0)])
    assert transformers_api.merges_matrices(merge)
    transformers_api.keep_dimensions([merge])
    assert type(merge.operations[0]) is not transformers_api.MergeModulelist
    assert transformers_api.merges_matrices(merge)


def test_every_way_to_load_a_model_goes_through(quantized, tmp_path):
    """Renamings, merged experts and saving, in the installed release."""
    model = lowbit.load(quantized)
    model.save_pretrained(tmp_path / "again")
    again = lowbit.load(tmp_path / "again")
    assert torch.equal(model(token_ids()).logits, again(token_ids()).logits)


def the_loop_runs(model, caplog) -> str:
    """The warnings of a run in the loop that gives the tokens of `model.generate`."""
    ids = token_ids(9)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 9:]
    result = Decoder(model).generate(ids, max_new_tokens=5, eos_token_id=())
    assert torch.equal(result.tokens, expected) and result.stats.path != "model.generate"
    return "\n".join(record.message for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("name", ["_attn_implementation", "_can_compile_fullgraph"])
def test_without_a_word_of_the_model_the_loop_is_tried(name, gone, caplog):
    gone(name)
    assert f"gone_{name}" in the_loop_runs(tiny_model(), caplog)


def test_the_trial_finds_a_model_that_the_cache_changes(gone, caplog):
    """Its mask is forgotten where a cache is given."""
    gone("_can_compile_fullgraph")
    model = tiny_model()
    real = model.forward

    def forward(*args, **kwargs):
        if kwargs[transformers_api.cache_argument(model)] is not None:
            kwargs["attention_mask"] = None
        return real(*args, **kwargs)

    forward.__signature__ = inspect.signature(real)
    model.forward = forward
    result = Decoder(model).generate(token_ids(9), max_new_tokens=3, eos_token_id=())
    assert result.stats.path == "model.generate" and "off in a trial" in result.stats.why


def test_a_static_layer_that_counts_otherwise_is_not_used(gone, caplog):
    gone("cumulative_length")
    result = Decoder(tiny_model(), make_cache=static_cache).generate(token_ids(9), max_new_tokens=3)
    assert result.stats.path == "model.generate" and "StaticLayer.gone_cumulative_length" in result.stats.why
    assert caplog.records[-1].levelno == logging.WARNING and "gone_cumulative_length" in caplog.records[-1].message


def test_the_split_over_gpus_is_guessed(gone, quantized, caplog):
    gone("_tp_plan")
    planned = lowbit.plan(quantized.parent / "dense", group_size=16)
    assert planned and "gone__tp_plan" in caplog.text


def test_experts_are_not_divided_without_a_plan(gone, quantized):
    gone("_ep_plan")
    with pytest.raises(MissingNameError, match="gone__ep_plan"):
        expert_parallel_plan(tiny_model())


def check_draft(quantized):
    Draft(lookup=2).check(tiny_model())


def quantize(quantized):
    lowbit.quantize(quantized.parent / "dense", quantized.parent / "again", group_size=16, overwrite=True)


def quantize_calibrated(quantized):
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    options = {"method": "gptq", "group_size": 16, "dataset": ids, "overwrite": True}
    lowbit.quantize(quantized.parent / "dense", quantized.parent / "again", **options)


def load(quantized):
    lowbit.load(quantized)


def save(quantized):
    lowbit.load(quantized).save_pretrained(quantized.parent / "saved")


def verify(quantized):
    lowbit.verify(quantized)


def run_experts(quantized):
    lowbit.load(quantized)(token_ids())


def export_gguf(quantized):
    folder = quantized.parent
    save_tiny(folder / "llama")
    lowbit.quantize(folder / "llama", folder / "llama4", group_size=32, overwrite=True)
    lowbit.convert(folder / "llama4", folder / "llama.gguf", format="gguf", overwrite=True)


def read_converted_gguf(quantized):
    rules_of("lfm2", transformers.Lfm2Config().to_dict(), {})


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("WeightRenaming", quantize),
        ("get_model_conversion_mapping", quantize),
        ("rename_source_key", quantize),
        ("MergeModulelist", load),
        ("SplitModulelist", load),
        ("convert_and_load_state_dict_in_model", quantize_calibrated),
        ("LoadStateDictConfig", quantize_calibrated),
        ("GGUF_CONFIG_DEFAULTS_MAPPING", export_gguf),
        ("GGUF_CONFIG_MAPPING", export_gguf),
        ("is_gguf_arch_supported", export_gguf),
        ("get_gguf_conversion_mapping", read_converted_gguf),
        ("TENSOR_PROCESSORS", export_gguf),
        ("TensorProcessor", export_gguf),
        ("get_gguf_hf_weights_map", export_gguf),
        ("_is_stateful", check_draft),
        ("_from_config", quantize),
        ("all_tied_weights_keys", verify),
        ("_keys_to_ignore_on_load_missing", verify),
        ("_keys_to_ignore_on_load_unexpected", load),
        ("_original_source_patterns", load),
        ("_original_target_patterns", load),
        ("_apply_gate", run_experts),
    ],
)
def test_missing_names_of_transformers_are_one_line(name, act, gone, quantized):
    gone(name)
    with pytest.raises(
        MissingNameError, match=rf"^transformers \S+ has no transformers\.\S*gone_{name}, which"
    ) as told:
        act(quantized)
    assert "\n" not in str(told.value) and transformers_api.TESTED in str(told.value)


def test_a_pre_tokenizer_that_transformers_cannot_name(gone, tmp_path):
    gone("GGUF_PRE_TOKENIZER_SPLITS")
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}}, {"type": "ByteLevel", "use_regex": False},
    ]}  # fmt: skip
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": pre_tokenizer}))
    writer = pytest.importorskip("gguf").GGUFWriter(None, "llama")
    (note,) = add_vocabulary(writer, tmp_path, 2, None)
    assert "gone_GGUF_PRE_TOKENIZER_SPLITS" in note and "split as by default" in note


def test_every_name_has_its_test():
    source = inspect.getsource(inspect.getmodule(test_every_name_has_its_test))
    names = [name for name in (*ATTRIBUTES, *IMPORTED) if name not in SERVING]  # those are gone through one by one
    assert not [name for name in names if not re.search(rf'[(\[ ]"{name}"[,\])]', source)]


def test_a_name_that_was_never_there():
    with pytest.raises(
        MissingNameError, match=r"torch \S+ has no torch\.nn\.Nothing, which lowbit needs to test: install"
    ):
        UpstreamName("torch.nn:Nothing", "test", "2.11").imported()
    with pytest.raises(MissingNameError, match=r"has no torch\.no_module\.name"):
        UpstreamName("torch.no_module:name", "test", "2.11").imported()
    with pytest.raises(AttributeError):
        transformers_api.no_such_name  # noqa: B018


SERVING = [name for name, found in IMPORTED.items() if found.path.startswith("transformers.cli.serving")]


@pytest.mark.parametrize("name", SERVING)
def test_without_what_serves_there_is_no_server_and_the_reason(name, gone):
    """Before it listens, in one line."""
    from lowbit.transformers_serving import serving_app

    gone(name)
    with pytest.raises(MissingNameError, match=f"gone_{name}, which lowbit needs to serve requests"):
        serving_app(tiny_model(), None, "tiny", None)
