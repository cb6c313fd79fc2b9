"""Models that write no text: quantized as any, and refused in one line by whatever needs logits over a vocabulary."""

import pytest
import torch
import transformers
from folders import save_chat_model, save_tokenizer, stored_tensors

import lowbit
from lowbit.discovery import choose, require_language_head, skeleton
from lowbit.errors import InputError
from lowbit.numerics.scheme import Recipe

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CLASSES = {
    "classes": (transformers.AutoModelForSequenceClassification, {"num_labels": 40}),
    "embeddings": (transformers.AutoModel, {}),
}


@pytest.fixture(scope="module", params=CLASSES)
def headless(request, tmp_path_factory):
    auto, options = CLASSES[request.param]
    folder = tmp_path_factory.mktemp("headless") / request.param
    torch.manual_seed(0)
    auto.from_config(transformers.LlamaConfig(**SIZES, **options)).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    lowbit.quantize(folder, folder.with_name("quantized"), scheme="W4A16-G32")
    return folder


def test_scores_are_left_as_an_output_embedding_is(headless):
    stored = stored_tensors(headless.with_name("quantized"))
    assert not [name for name in stored if name.startswith(("score", "classifier")) and "packed" in name]
    assert sum(name.endswith("weight_packed") for name in stored) == 14
    model = lowbit.load(headless.with_name("quantized"))
    assert model(input_ids=torch.tensor([[5, 6, 7]]))[0].isfinite().all()


@pytest.mark.parametrize(
    "command",
    [("generate", "-p", "x"), ("chat",), ("eval",), ("bench", "--against", "none")],
    ids=lambda command: command[0],
)
def test_commands_that_need_logits_say_so(refused, headless, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    refused(1, command[0], headless.with_name("quantized"), *command[1:], says=["no language head", "ForCausalLM"])


def test_as_a_reference(refused, headless, chat_model):
    refused(1, "eval", chat_model, "--reference", headless, says="no language head")


def test_text_of_the_model_itself(cli, headless, tmp_path):
    outcome = cli("quantize", headless, "-o", tmp_path / "out", "--method", "gptq", "--dataset", "self",
                  "--group-size", "32", "--num-samples", "2", "--seqlen", "16")  # fmt: skip
    assert outcome.code == 1 and "no language head" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err and not (tmp_path / "out").exists()


def test_verify_checks_all_but_text(done, headless):
    out = " ".join(done("verify", headless.with_name("quantized")).out.split())
    assert "no language head" in out and "all checks passed" in out


def test_models_that_write_are_let_through(tmp_path):
    config = transformers.AutoConfig.from_pretrained(save_chat_model(tmp_path / "model"))
    require_language_head(config, tmp_path)
    config.architectures = ["LlamaModel"]
    with pytest.raises(InputError, match="LlamaModel gives no logits"):
        require_language_head(config, tmp_path)


def test_heads_of_tasks_are_told_from_the_body():
    """Left alone by default, like the output embedding; embeddings models have no such head at all."""
    config = transformers.LlamaConfig(**SIZES, num_labels=40, architectures=["LlamaForSequenceClassification"])
    chosen, left = choose(skeleton(config), Recipe())
    assert left["score.weight"][1] == "output of the model" and "score.weight" not in chosen
    config.architectures = ["LlamaModel"]
    assert len(choose(skeleton(config), Recipe())[0]) == 14
