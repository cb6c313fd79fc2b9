"""Whatever model, rope and chunks: the loop gives the tokens of `model.generate`, or leaves the model to it."""

import pytest
import torch
import transformers
from models import tiny_model
from packaging.version import Version
from tiny import model_types, tiny_model_that_runs

from lowbit.errors import InputError
from lowbit.generation import Decoder
from lowbit.generation.steps.graph import Eager

pytestmark = pytest.mark.slow

CAUSAL = [name for task, name in model_types() if task == "AutoModelForCausalLM"]
NEW = 5
# Prompts of (rows, tokens), all but the first row padded, and tokens of a chunk
CASES = ((1, 40, None), (2, 23, 7), (3, 30, 11), (1, 21, 4))


def prompts(model, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : length * row // (rows + 1)] = 0
    return ids.masked_fill(mask == 0, model.generation_config.pad_token_id or 0), mask


def of_generate(model, ids, mask, new: int) -> torch.Tensor:
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def difference(name: str, number: int) -> str | None:
    """What is wrong with a model of a type, None if nothing is or there is no tiny model of it."""
    rows, length, chunk = CASES[number % len(CASES)]
    try:
        model, _ = tiny_model_that_runs("AutoModelForCausalLM", name)
        ids, mask = prompts(model, rows, length)
        wanted = of_generate(model, ids, mask, NEW)
    except Exception:  # whatever transformers cannot build or run
        return None
    for graphs in (None, Eager()) if number % 3 == 0 else (None,):
        result = Decoder(model, graphs=graphs).generate(
            ids, mask, max_new_tokens=NEW, eos_token_id=(), prefill_chunk=chunk
        )
        if not torch.equal(result.tokens, wanted):
            return f"{name}: other tokens in the {result.stats.path} ({rows} rows of {length}, chunks of {chunk})"
    return None


@pytest.mark.parametrize("part", range(4))
def test_every_causal_model_of_transformers(part):
    found = [difference(name, number) for number, name in enumerate(CAUSAL) if number % 4 == part]
    assert len(found) > 30 and not [each for each in found if each]


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
                 "short_factor": [1.0] * 8, "long_factor": [1, 2, 4, 8, 16, 32, 40, 64]},
}  # fmt: skip
BORDER = 64  # from which on longrope and dynamic rope encode otherwise


def with_rope(name: str, rope: str):
    limits = {"max_position_embeddings": BORDER if rope == "dynamic" else 256}
    if name == "phi3":
        limits["original_max_position_embeddings"] = BORDER
    return tiny_model(name, rope_parameters=ROPES[rope], **limits)


@pytest.mark.parametrize(("name", "rope"), [*(("llama", rope) for rope in ROPES), ("phi3", "longrope")])
def test_ropes_before_across_and_behind_the_border(name, rope):
    for length, chunk in ((20, 7), (BORDER - 4, 16), (BORDER + 30, 16), (BORDER + 30, None), (BORDER - 4, None)):
        model = with_rope(name, rope)  # dynamic rope keeps what it has grown to
        ids, mask = prompts(model, 1, length)
        wanted = of_generate(with_rope(name, rope), ids, mask, 12)
        result = Decoder(model).generate(ids, mask, max_new_tokens=12, eos_token_id=(), prefill_chunk=chunk)
        assert torch.equal(result.tokens, wanted), (length, chunk, result.stats)
        crosses = rope in ("dynamic", "longrope") and length < BORDER < length + 12
        if crosses:
            assert "encoding of positions changes" in result.stats.why
        elif rope not in ("dynamic", "longrope"):
            assert result.stats.path == "recorded loop", result.stats.why


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.21"), reason="generate of this transformers dies past the border"
)
def test_ropes_of_several_kinds_of_layers():
    """Each kind has its own: the one that depends on the length is found, whichever is asked for last."""
    for kind in ("sliding_attention", "full_attention"):
        ropes = {"sliding_attention": ROPES["default"], "full_attention": ROPES["default"]} | {kind: ROPES["longrope"]}
        kinds = ["sliding_attention", "full_attention"]
        model = tiny_model("gemma3", rope_parameters=ropes, layer_types=kinds, max_position_embeddings=256)
        ids, mask = prompts(model, 1, BORDER + 20)
        wanted = of_generate(model, ids, mask, 8)
        decoder = Decoder(model)
        result = decoder.generate(ids, mask, max_new_tokens=8, eos_token_id=(), prefill_chunk=16)
        assert torch.equal(result.tokens, wanted) and not decoder.eligibility.positions.same(2, BORDER + 20)


def test_a_conversation_that_grows_past_the_border():
    """Keys of the earlier turns were encoded for a shorter text: they are not used again, in either direction."""
    model = with_rope("phi3", "longrope")
    decoder, ids = Decoder(model), prompts(model, 1, 20)[0]
    for turn in (20, 20, 30, 20):
        mask = torch.ones_like(ids)
        wanted = of_generate(model, ids, mask, 5)
        result = decoder.generate(ids, mask, max_new_tokens=5, eos_token_id=(), prefill_chunk=8)
        assert torch.equal(result.tokens, wanted), result.stats
        ids = torch.cat([ids, result.tokens, prompts(model, 1, turn)[0]], 1)
    assert ids.shape[1] > BORDER
    short = ids[:, :30]
    wanted = of_generate(model, short, torch.ones_like(short), 5)
    assert torch.equal(decoder.generate(short, max_new_tokens=5, eos_token_id=()).tokens, wanted)


@pytest.mark.usefixtures("compiler")
def test_a_run_across_the_border_is_the_only_one_that_is_left_alone():
    model = with_rope("phi3", "longrope")
    decoder = Decoder(model)
    for length, path in ((20, "recorded loop"), (BORDER - 4, "model.generate"), (20, "recorded loop")):
        ids, mask = prompts(model, 1, length)
        stats = decoder.generate(ids, mask, max_new_tokens=12, eos_token_id=()).stats
        assert (stats.path, stats.why is None) == (path, path == "recorded loop")


def test_models_of_remote_code_that_say_nothing_are_tried():
    """A causal model whose authors set no flag runs in the loop if its logits are those without a cache."""
    model = tiny_model("llama")
    type(model)._can_compile_fullgraph, before = False, type(model)._can_compile_fullgraph
    try:
        ids, mask = prompts(model, 2, 12)
        result = Decoder(model).generate(ids, mask, max_new_tokens=NEW, eos_token_id=())
        assert torch.equal(result.tokens, of_generate(model, ids, mask, NEW))
        assert result.stats.path == "recorded loop"
    finally:
        type(model)._can_compile_fullgraph = before


def test_adapters_of_peft_run_in_the_loop():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    ids, mask = prompts(model, 2, 12)
    result = Decoder(model.eval()).generate(ids, mask, max_new_tokens=NEW, eos_token_id=())
    assert torch.equal(result.tokens, of_generate(model, ids, mask, NEW))
    assert result.stats.path == "recorded loop", result.stats.why


def test_overflow_is_an_error_in_model_generate_too():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.generation_config.suppress_tokens = [5]  # a processor that the loop does not have
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="NaN or infinite logits"):
            Decoder(model).generate(prompts(model, 1, 6)[0], max_new_tokens=3, temperature=temperature)
