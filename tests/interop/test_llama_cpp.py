"""llama.cpp runs what `export_gguf` writes.

Skipped without it: pip install -r tests/interop/requirements-llama-cpp.txt
"""

import pytest
import torch
from export_sources import dense_model, quantized_source
from folders import VOCABULARY, save_tokenizer
from models import relative_error, token_ids

from lowbit.conversion.gguf import export_gguf

xllamacpp = pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# (architecture, scheme, changes of the config)
CASES = [
    ("llama", "W4A16-G32", {}), ("llama", "W8A16-G128", {"rope_parameters": _LLAMA3_ROPE}),
    ("qwen2", "W3A16_ASYM-G64", {"rope_parameters": _LINEAR_ROPE}), ("qwen3", "W4A16-G128", {}),
    ("gemma2", "W8A16-G32", {"head_dim": 256}), ("gemma3", "W4A16_ASYM-G32", {"head_dim": 256}),
    ("phi3", "W8A16-G32", {}), ("qwen2_moe", "W8A16-G64", {}), ("qwen3_moe", "W4A16-G32", {"norm_topk_prob": True}),
]  # fmt: skip
_TEXT = "the quick brown fox, it's 12345\n\n dogs"


def start(file):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 128, 1, False
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def next_token(server, ids: list[int]) -> torch.Tensor | None:
    """Log-probabilities; None after ids whose likeliest next token is part of a character: the server keeps it back."""
    question = {"prompt": ids, "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(question)["choices"][0]["logprobs"]
    if answer is None:
        return None
    found = torch.full((VOCABULARY,), torch.nan)
    for entry in answer["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def logits_error(name: str, scheme: str, changes: dict, folder) -> float:
    """Relative error of llama.cpp's log-probabilities of the next token to those of the dequantized model in
    transformers. llama.cpp rounds activations to 8 bits, which is what is left of it."""
    source = quantized_source(folder, name, scheme, torch.bfloat16, vocab_size=VOCABULARY, **changes)
    tokenizer = save_tokenizer(source.folder)
    export_gguf(source, folder / "model.gguf")
    server, ids = start(folder / "model.gguf"), token_ids(24, VOCABULARY)
    answers = ((ids[:, :count], next_token(server, ids[0, :count].tolist())) for count in range(24, 12, -1))
    ids, actual = next((asked, answer) for asked, answer in answers if answer is not None)
    counted = server.handle_completions({"prompt": _TEXT, "n_predict": 1})["usage"]["prompt_tokens"]
    assert counted == len(tokenizer.encode(_TEXT))
    with torch.no_grad():
        expected = dense_model(source, folder / "reference")(ids).logits[0, -1].log_softmax(-1)
    return relative_error(actual - actual.mean(), expected - expected.mean())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_llama_cpp_computes_the_dequantized_model(case, tmp_path):
    assert logits_error(*case, tmp_path) < 0.05
