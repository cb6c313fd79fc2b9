"""What running takes, foreseen on the meta device, against what torch allocates while models run."""

import gc

import pytest
import torch
from models import save_tiny, tiny_config
from torch.profiler import ProfilerActivity, profile

import lowbit
from lowbit.discovery import skeleton
from lowbit.errors import InputError
from lowbit.generation.loop import Decoder
from lowbit.generation.memory import BesideWeights, Load, beside_weights


def allocated_at_most(run) -> int:
    """The most bytes that are allocated at a time while `run()` runs, beside those that were there before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    for each in sorted(events, key=lambda event: event.start_ns()):
        now += each.nbytes()
        peak = max(peak, now)
    return peak


def storage_bytes(tensors) -> int:
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize(
    ("scheme", "batch", "kv_cache"),
    [("W4A16-G64", 1, "bf16"), ("W3A16_ASYM-G64", 4, "bf16"), ("W2A16_ASYM-G32", 2, "int8")],
)
def test_the_embedded_model_takes_what_is_foreseen(tmp_path, scheme, batch, kv_cache):
    """Weights to the kilobyte, everything within ten percent; two prompts, as the second finds what the first left."""
    context = 300
    foreseen = lowbit.plan("reference", scheme=scheme, context=context, batch=batch, kv_cache=kv_cache).memory
    lowbit.quantize("reference", tmp_path / "out", scheme=scheme)
    model = lowbit.load(tmp_path / "out")
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    assert weights == pytest.approx(foreseen["weights"], abs=4096)
    prompts = torch.randint(2048, (2, batch, context - 4), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, int8_cache=kv_cache == "int8")

    def run():
        for prompt in prompts:
            decoder.generate(prompt, max_new_tokens=4, eos_token_id=())

    real = weights + allocated_at_most(run)
    assert decoder.stats.path != "model.generate"
    assert foreseen["peak"] == pytest.approx(real, rel=0.1)


def beside(architecture, load, **changes) -> BesideWeights:
    return beside_weights(skeleton(tiny_config(architecture, **changes), dtype=torch.bfloat16), load)


def test_the_cache_is_that_of_the_config():
    heads, width, layers = 2, 16, 2  # of keys and values, in `tiny_config`
    small, config = beside("llama", Load(512)), tiny_config("llama")
    assert (config.num_key_value_heads, config.head_dim, config.num_hidden_layers) == (heads, width, layers)
    assert small.cache == pytest.approx(layers * 2 * heads * width * 2 * 512, abs=64)
    assert beside("llama", Load(512, batch=3)).cache == pytest.approx(3 * small.cache, abs=64)
    assert beside("llama", Load(1024)).cache == pytest.approx(2 * small.cache, abs=64)
    int8 = layers * 2 * heads * (width + 2) * 512
    assert beside("llama", Load(512, int8_cache=True)).cache == pytest.approx(int8, rel=0.05)


def test_engines_keep_no_more_than_a_window_reaches():
    windows = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
    here, engine = (beside("gemma3", Load(1024, here=here), **windows).cache for here in (True, False))
    assert engine == pytest.approx(here * (1024 + 128) / 2048, rel=0.01)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "gemma2", "qwen3_moe"])
def test_more_tokens_take_more(architecture):
    few, many = (beside(architecture, Load(tokens, here=False)) for tokens in (64, 256))
    assert few.cache * 4 == pytest.approx(many.cache, abs=256) and few.working < many.working


def test_a_recurrent_state_does_not_grow():
    """A hybrid: layers of attention grow with the context, those of a recurrence do not."""
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    model = skeleton(config, dtype=torch.bfloat16)
    few, many = (beside_weights(model, Load(tokens)).cache for tokens in (256, 512))
    attention = 2 * 2 * 16 * 2 * 256  # keys and values, two heads of 16, in one layer of four
    assert many - few == pytest.approx(attention, abs=64) and few > attention + 10_000


def test_a_model_that_needs_numbers_is_told_in_a_line():
    class Needy(torch.nn.Module):
        config = tiny_config("llama")

        def forward(self, input_ids=None, past_key_values=None):
            raise ValueError("numbers\nwanted")

    with pytest.raises(InputError, match=r"what running Needy takes cannot be told from its sizes \(.*\): pass --size"):
        beside_weights(Needy(), Load(64))


def test_memory_of_another_engine_is_that_of_the_files(tmp_path):
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    options = {"bits": 5.5, "num_samples": 2, "seqlen": 16, "dataset": torch.randint(3, 128, (4, 16))}
    found = lowbit.plan(folder, context=64, engine="vllm", **options)
    assert found.memory["weights"] == found.output_bytes
