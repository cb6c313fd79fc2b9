"""GGUF files as the gguf package and transformers read them."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from export_sources import dense_model, dequantized, open_source, quantized_source
from folders import contents, edit_config, read_json, save_tokenizer, write_json
from models import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, modeling_gguf_pytorch_utils
from transformers.integrations.gguf import gguf_tokenizer_mapping

from lowbit.conversion.gguf import export_gguf
from lowbit.conversion.gguf_architecture import Architecture, Arrangement, settings_read
from lowbit.errors import InputError, OutputError, UsageError

gguf = pytest.importorskip("gguf")

# Architectures that transformers reads from GGUF, and what its reader's defaults or rules ask of the config
ARCHITECTURES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": {"head_dim": 256}, "gemma3": {"head_dim": 256}, "phi3": {},
    "qwen2_moe": {}, "qwen3_moe": {"norm_topk_prob": True},
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
SCHEMES = {"W4A16-G32": "Q4_0", "W3A16_ASYM-G64": "Q4_1", "W4A16_ASYM-G32": "Q8_0", "W8A16-G128": "Q8_0"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_reads_the_same_model(name, tmp_path):
    """Through names, permuted rows, shifted norms and stacked experts: no bit may change."""
    source = quantized_source(tmp_path, name, "W4A16-G32", **ARCHITECTURES[name])
    notes = export_gguf(source, tmp_path / "model.gguf")
    expected = dense_model(source, tmp_path / "reference")
    # a reader that took all settings from the file would need no config
    lost = any("takes its own defaults" in note for note in notes)
    given = {"config": expected.config} if lost or name == "phi3" else {}
    actual = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **given)
    weights = actual.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(weights[key], tensor), key
    with torch.no_grad():
        assert torch.equal(actual(token_ids()).logits, expected(token_ids()).logits)
    assert lost == (name in ("qwen3", "qwen2_moe", "qwen3_moe"))


@pytest.mark.parametrize(
    ("name", "embeddings", "tied", "type"),
    [("llama", "W8A16-G64", True, "Q8_0"), ("gemma3", "W4A16-G32", False, "Q4_0")],
)
def test_embeddings_stay_quantized(name, embeddings, tied, type, tmp_path):
    changes = {**ARCHITECTURES[name], "tie_word_embeddings": tied}
    source = quantized_source(tmp_path, name, options={"embeddings": embeddings}, **changes)
    export_gguf(source, tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["token_embd.weight"] == type
    assert types["output.weight"] == (type if tied else "BF16")  # of its own, both ways
    expected = dense_model(source, tmp_path / "reference").state_dict()
    actual = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_are_the_dequantized_weights(scheme, tmp_path):
    source = quantized_source(tmp_path, "qwen2", scheme, options={"overrides": [(".*o_proj", "W8A16-G32")]})
    seen = []
    notes = export_gguf(source, tmp_path / "model.gguf", on_plan=lambda plan: lambda entry, note: seen.append(entry))
    expected, read = dequantized(source), gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert len(seen) == len(tensors) == len(expected)
    for theirs, ours in (
        ("attn_v", "self_attn.v_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("attn_output", "self_attn.o_proj"),
    ):
        tensor = tensors[f"blk.1.{theirs}.weight"]
        assert tensor.tensor_type.name == ("Q8_0" if ours.endswith("o_proj") else SCHEMES[scheme])
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(values, expected[f"model.layers.1.{ours}.weight"])
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    assert tensors["output_norm.weight"].tensor_type.name == tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    assert any("asymmetric weights are held as Q8_0" in note for note in notes) == (scheme == "W4A16_ASYM-G32")


def metadata(file):
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def test_metadata_is_the_config(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    source = quantized_source(tmp_path, "qwen3_moe", norm_topk_prob=True, rope_parameters=rope)
    export_gguf(source, tmp_path / "tiny.gguf")
    actual = metadata(tmp_path / "tiny.gguf")
    expected = {
        "general.architecture": "qwen3moe", "general.name": "tiny", "qwen3moe.block_count": 2,
        "qwen3moe.embedding_length": 128, "qwen3moe.attention.head_count": 4, "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 32, "qwen3moe.attention.value_length": 32, "qwen3moe.rope.freq_base": 5e5,
        "qwen3moe.expert_count": 4, "qwen3moe.expert_used_count": 2, "qwen3moe.expert_feed_forward_length": 128,
        "qwen3moe.attention.layer_norm_rms_epsilon": np.float32(1e-6), "qwen3moe.context_length": 128,
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0, "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert {key: actual[key] for key in expected} == expected
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32" and kinds["blk.1.ffn_up_exps.weight"] == "Q4_0"


def test_scaled_rope_becomes_factors(tmp_path):
    """Llama 3's rule, against the frequencies that transformers computes."""
    source = quantized_source(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    notes = export_gguf(source, tmp_path / "model.gguf")
    assert any("its own defaults for rope_parameters" in note for note in notes)
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    model = AutoModelForCausalLM.from_config(source.config)
    frequencies = 1e4 ** -(torch.arange(0, 32, 2).double() / 32) / torch.from_numpy(np.array(factors)).double()
    torch.testing.assert_close(frequencies.float(), model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert len(set(factors.tolist())) > 2  # some frequencies are scaled, some in part, some not


def test_linear_rope_becomes_metadata(tmp_path):
    source = quantized_source(
        tmp_path, "qwen2", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4}
    )
    assert any("its own defaults for rope_parameters" in note for note in export_gguf(source, tmp_path / "model.gguf"))
    fields = metadata(tmp_path / "model.gguf")
    assert fields["qwen2.rope.scaling.type"] == "linear" and fields["qwen2.rope.scaling.factor"] == 4


# --- vocabularies ---


@pytest.mark.parametrize("bos", [True, False])
def test_transformers_reads_the_same_tokenizer(bos, tmp_path):
    source = quantized_source(tmp_path, "llama", vocab_size=330)  # ten ids more than there are tokens
    ours = save_tokenizer(source.folder, bos=bos)
    assert export_gguf(source, tmp_path / "model.gguf") == []
    fields = metadata(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD329]" and len(fields["tokenizer.ggml.tokens"]) == 330
    kinds = gguf.TokenType
    assert fields["tokenizer.ggml.token_type"][1] == kinds.CONTROL
    assert fields["tokenizer.ggml.token_type"][50] == kinds.NORMAL
    assert fields["tokenizer.ggml.token_type"][329] == kinds.UNUSED
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.chat_template"] == ours.chat_template
    assert fields.get("tokenizer.ggml.add_bos_token", False) == bos
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "the quick brown fox, über 12345 dogs\n\n it's"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)


def set_split(folder, regex):
    data = read_json(folder / "tokenizer.json")
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    write_json(folder / "tokenizer.json", data)


def test_splitting_rules_are_found_by_their_regex(tmp_path):
    splits = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if splits is None:
        pytest.skip("this transformers has no table of splitting rules")
    source = quantized_source(tmp_path, "qwen2", vocab_size=320)
    save_tokenizer(source.folder)
    set_split(source.folder, splits["qwen2"])
    assert export_gguf(source, tmp_path / "known.gguf") == []
    assert metadata(tmp_path / "known.gguf")["tokenizer.ggml.pre"] == "qwen2"
    set_split(source.folder, r"\d|\w+")
    assert any("not known" in note for note in export_gguf(source, tmp_path / "unknown.gguf"))
    assert metadata(tmp_path / "unknown.gguf")["tokenizer.ggml.pre"] == "default"
    assert export_gguf(source, tmp_path / "told.gguf", pre="mine") == []
    assert metadata(tmp_path / "told.gguf")["tokenizer.ggml.pre"] == "mine"


def test_other_tokenizers_are_left_out(tmp_path):
    source = quantized_source(tmp_path, "llama", vocab_size=320)
    save_tokenizer(source.folder)
    data = read_json(source.folder / "tokenizer.json")
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    write_json(source.folder / "tokenizer.json", data)
    assert any("no byte-level BPE" in note for note in export_gguf(source, tmp_path / "model.gguf"))
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.model"] == "no_vocab"


def test_a_tokenizer_of_another_model(tmp_path):
    source = quantized_source(tmp_path, "llama", vocab_size=300)
    save_tokenizer(source.folder)
    with pytest.raises(InputError, match="the model has 300 tokens: the tokenizer is another's"):
        export_gguf(source, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": []}, "tokenizer.json: model is \\[\\]; expected an object"),
        ({"model": {"type": "BPE", "vocab": [["a", 0]], "merges": []}}, "model.vocab: it is .*; expected an object"),
        ({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, "a is '0'; expected a whole number"),
        ({"added_tokens": [{"content": "<s>"}]}, r"added_tokens\[0\].id is missing"),
        ({"pre_tokenizer": {"pretokenizers": ["ByteLevel"]}}, r"pretokenizers\[0\] is 'ByteLevel'"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"pattern": 3}]}}, "pattern is 3"),
    ],
    ids=str,
)
def test_a_tokenizer_file_that_is_none(tmp_path, change, message):
    source = quantized_source(tmp_path, "llama", vocab_size=320)
    save_tokenizer(source.folder)
    write_json(source.folder / "tokenizer.json", {**read_json(source.folder / "tokenizer.json"), **change})
    with pytest.raises(InputError, match=message):
        export_gguf(source, tmp_path / "model.gguf")


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "scheme", "changes", "message"),
    [
        ("llama", "W4A16-G16", {}, "model.layers.0.mlp.down_proj: .* groups of 16 inputs are no multiple"),
        ("llama", "W4A16-CHANNEL", {"intermediate_size": 72}, "down_proj: .* groups of 72 inputs are no multiple"),
        ("llama", "W8A16_ASYM-G32", {}, "model.layers.0.mlp.down_proj: code - zero lies in .* Q8_0 holds"),
        ("llama", "W4A16-G32", {"attention_bias": True}, "attention_bias is True in config.json, .* cannot say"),
        ("llama", "W4A16-G32", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn'"),
        ("qwen2", "W4A16-G32", {"rope_parameters": LLAMA3_ROPE}, "rope_type 'llama3' cannot be said .* qwen2"),
        ("qwen3_moe", "W4A16-G32", {"norm_topk_prob": False}, "norm_topk_prob is False in config.json, .* take True"),
        ("qwen2", "W4A16-G32", {"hidden_act": "gelu"}, "hidden_act is 'gelu' in config.json"),
        ("gemma2", "W4A16-G32", {"head_dim": 32}, "query_pre_attn_scalar is 256 .* takes head_dim, which is 32"),
        ("gemma3", "W4A16-G32", {"head_dim": 256, "rope_parameters": TWO_ROPES}, "rope_parameters is .* cannot say"),
        ("phi3", "W4A16-G32", {"sliding_window": 64}, "sliding_window is 64 in config.json"),
        ("mixtral", "W4A16-G32", {}, "model type 'mixtral' is not one that both"),
        ("gpt2", "W4A16-G32", {}, "h.0.attn.c_attn is stored transposed"),
    ],
)
def test_refused(name, scheme, changes, message, tmp_path):
    source = quantized_source(tmp_path, name, scheme, **changes)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message):
        export_gguf(source, tmp_path / "model.gguf")
    assert contents(tmp_path) == before


# Keys of other tools and of other versions of transformers (vllm-project/vllm#11765)
UNREAD = {
    "unsloth_version": "1", "unsloth_fixed": True, "_attn_implementation_autoset": True, "model_max_length": 64,
    "tokenizer_class": "X", "auto_map": {"AutoModel": "x.Y"}, "transformers.js_config": {"dtype": "q4"},
    "_name_or_path": "a/b", "keys_to_ignore_at_inference": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_settings_that_nothing_reads_are_no_reason_to_refuse(name, tmp_path):
    source = quantized_source(tmp_path, name, "W4A16-G32", **ARCHITECTURES[name])
    edit_config(source.folder, **UNREAD)
    export_gguf(open_source(source.folder), tmp_path / "model.gguf")


def test_a_setting_that_is_read_though_its_class_does_not_declare_it(tmp_path):
    """Qwen2 has no head_dim of its own, and its attention takes one where there is one."""
    source = quantized_source(tmp_path, "qwen2", "W4A16-G32")
    assert "head_dim" not in type(source.config)().to_dict()
    read = settings_read(source.skeleton, source.config)
    assert {"head_dim", "hidden_size", "rms_norm_eps"} <= read and read.isdisjoint(UNREAD.keys() - {"_name_or_path"})


def test_scales_that_fp16_does_not_hold_are_named_and_leave_nothing(tmp_path):
    source = quantized_source(tmp_path, "llama", "W4A16-G32", dtype=torch.float32)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"^model.layers.0.mlp.down_proj: the scale \S+ is not exact in float16"):
        export_gguf(source, tmp_path / "made" / "model.gguf")
    assert contents(tmp_path) == before


class Processor:
    """Stands in for one of transformers' processors, which change tensors while they are read."""

    def __init__(self, change):
        self.change = change

    def process(self, weights, name, **_):
        return SimpleNamespace(weights=self.change(weights), name=name)


def test_transformations_of_the_reader_are_found_by_trying(tmp_path):
    architecture = Architecture(quantized_source(tmp_path))
    architecture._processor = Processor(lambda w: np.roll(w, 2, axis=0) - 1)
    found = architecture.arrangement("any", (7, 5))
    assert found.order.tolist() == [2, 3, 4, 5, 6, 0, 1] and found.offset == -1
    architecture._processor = Processor(lambda w: np.expand_dims(w, 1))
    assert architecture.arrangement("any", (7, 5)) == Arrangement()


CHANGES = {
    "transposed": lambda w: w.T, "columns": lambda w: w * np.arange(1, 3), "log": lambda w: np.log(-w),
    "scaled": lambda w: 2 * w, "repeated": lambda w: np.concatenate([w[:4], w[:3]]),
    "shifted in part": lambda w: w + np.arange(7)[:, None], "of one shape": lambda w: w.reshape(7, 9),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_transformation_that_cannot_be_undone(change, tmp_path):
    architecture = Architecture(quantized_source(tmp_path))
    architecture._processor = Processor(CHANGES[change])
    with pytest.raises(InputError, match=r"blk.0.some.weight (is read through|cannot be traced)"):
        architecture.arrangement("blk.0.some.weight", (7, 5))


def test_a_name_that_transformers_reads_as_another(tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "get_gguf_hf_weights_map", lambda *_: {})
    with pytest.raises(InputError, match=r"is blk.0.ffn_down in a GGUF file, which transformers reads into None"):
        export_gguf(quantized_source(tmp_path), tmp_path / "model.gguf")


def test_more_than_a_language_model(tmp_path):
    source = replace(quantized_source(tmp_path), config=Gemma3Config())
    with pytest.raises(InputError, match="model type 'gemma3' is not a language model alone"):
        export_gguf(source, tmp_path / "model.gguf")


def test_a_tensor_that_the_architecture_does_not_have(tmp_path):
    source = quantized_source(tmp_path, "llama")
    extra = {"model.layers.0.extra.weight": next(iter(source.dense.values()))}
    with pytest.raises(
        InputError, match=r"model.layers.0.extra.weight has no name in a GGUF file of architecture llama"
    ):
        export_gguf(replace(source, dense=source.dense | extra), tmp_path / "model.gguf")


def test_an_existing_file_stays(tmp_path):
    source = quantized_source(tmp_path, "llama")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(source, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    export_gguf(source, tmp_path / "model.gguf", overwrite=True)
    assert len(gguf.GGUFReader(tmp_path / "model.gguf").tensors) == 21


def test_without_the_package(tmp_path, monkeypatch):
    source = quantized_source(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'lowbit\[gguf\]'"):
        export_gguf(source, tmp_path / "model.gguf")
