"""The int8 cache: a row is off by half a step, and everything that a static cache does, it does with such rows."""

import pytest
import torch
from models import as_cache, relative_error, tiny_model, token_ids
from tiny import tiny_model_that_runs
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from lowbit.errors import InputError
from lowbit.generation import Decoder
from lowbit.generation.kv_int8 import Int8StaticCache, channel_factors, decode, encode, in_int8
from lowbit.generation.steps.cache import filled_cache, static_cache

MODELS = {
    "llama": {},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 8},
    "gpt2": {},
}
models = pytest.mark.parametrize("name", MODELS)


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_off_by_half_a_step(dtype):
    x = rows(2, 3, 5, 6, dtype=dtype) * 10.0 ** torch.arange(-3, 2)[:, None].to(dtype)
    x[0, 0, 0] = 0
    encoded = encode(x)
    assert encoded.dtype == torch.int8 and encoded.shape == (2, 3, 5, 8)
    back = decode(encoded, dtype)
    assert back.dtype == dtype and torch.equal(back[0, 0, 0], x[0, 0, 0])
    # half a step, and what the rounding of a bf16 scale (2^-9) leaves beyond code 127, and of the result
    largest = x.double().abs().amax(-1, keepdim=True)
    allowed = largest / 254 + largest * (2**-9 + torch.finfo(dtype).eps)
    assert bool(((back.double() - x.double()).abs() <= allowed).all())
    assert relative_error(back, x) > 1e-4  # it is not kept as it was
    assert torch.equal(encode(back)[..., :-2].abs().amax(-1), encoded[..., :-2].abs().amax(-1))


def test_nan_stays_nan_in_its_row():
    x = rows(3, 4)
    x[1, 2] = torch.nan
    assert decode(encode(x), x.dtype).isnan().any(-1).tolist() == [False, True, False]


def test_large_channels_do_not_take_the_codes_of_others():
    keys, values = rows(2, 3, 9, 16), rows(2, 3, 9, 16, seed=1)
    keys[..., 5] *= 40
    cache = Int8StaticCache(tiny_model("llama").config, 12)
    for start, stop in ((0, 4), (4, 9)):
        kept, _ = cache.update(keys[:, :, start:stop], values[:, :, start:stop], 0)
    others = [n for n in range(16) if n != 5]
    plain = relative_error(decode(encode(keys), torch.float32)[..., others], keys[..., others])
    assert relative_error(kept[:, :, :9][..., others], keys[..., others]) < plain / 2
    assert relative_error(kept[:, :, :9], keys) < 0.01


def test_factors_of_keys_that_are_not_there():
    assert torch.equal(channel_factors(torch.zeros(2, 3, 4, 6)), torch.ones(1, 3, 1, 6))
    cache = Int8StaticCache(tiny_model("llama").config, 12)
    cache.early_initialization(1, 2, 16, torch.bfloat16, "cpu")
    keys = rows(1, 2, 5, 16, dtype=torch.bfloat16)
    kept, _ = cache.update(keys, keys, 0)
    assert kept.dtype == torch.bfloat16 and relative_error(kept[:, :, :5], keys) < 0.01


def through(model, cache, ids, chunks):
    with torch.no_grad():
        parts = [model(part, **as_cache(model, cache), use_cache=True).logits for part in ids.split(chunks, dim=1)]
    return torch.cat(parts, dim=1)


class Rounded(StaticLayer):
    """The same in the dtype of the model: rows that have been int8 once, kept by transformers' own layer."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            ranges = key_states.abs().transpose(0, 1).flatten(1, 2).max(1).values
            self.factors = torch.tensor(
                [[max(float(r) / (sum(map(float, head)) / len(head)), 1) ** 0.5 for r in head] for head in ranges]
            )[:, None]
        keys = decode(encode(key_states / self.factors), torch.float32) * self.factors
        return super().update(keys, decode(encode(value_states), value_states.dtype), *args, **kwargs)


def rounded(config, length):
    cache = StaticCache(config, length)
    for layer in cache.layers:
        layer.__class__ = type("R", (Rounded, type(layer)), {})
    return cache


@models
@pytest.mark.parametrize("chunks", [[20, 1, 1, 1, 1], [3, 4, 10, 7], [24]], ids=str)
def test_logits_are_those_of_rounded_rows(name, chunks):
    model = tiny_model(name, **MODELS[name])
    ids = token_ids(24).expand(2, -1).clone()
    ids[1] = ids[1].flip(0)
    cache = Int8StaticCache(model.config, 32)
    actual, full = through(model, cache, ids, chunks), through(model, StaticCache(model.config, 32), ids, chunks)
    assert relative_error(actual, through(model, rounded(model.config, 32), ids, chunks)) < 1e-5
    assert 1e-4 < relative_error(actual, full) < 0.05
    assert all(layer.keys.dtype == layer.values.dtype == torch.int8 for layer in cache.layers)
    cache.reset()
    assert torch.equal(through(model, cache, ids, chunks), actual)


@models
def test_generate_takes_it(name):
    model = tiny_model(name, **MODELS[name])
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(token_ids(9), **as_cache(model, Int8StaticCache(model.config, 21)), **arguments)
    expected = model.generate(token_ids(9), **as_cache(model, rounded(model.config, 21)), **arguments)
    assert torch.equal(made, expected) and made.shape == (1, 21)


def test_beams_are_reordered():
    model = tiny_model("llama")
    arguments = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    made = model.generate(token_ids(9), **as_cache(model, Int8StaticCache(model.config, 17)), **arguments)
    assert torch.equal(made, model.generate(token_ids(9), **as_cache(model, rounded(model.config, 17)), **arguments))


def test_a_layer_with_a_recurrent_state_too():
    model, inputs = tiny_model_that_runs("AutoModelForCausalLM", "falcon_h1")
    cache, ids = Int8StaticCache(model.config, 16), inputs["input_ids"]
    actual = through(model, cache, ids, [8, 1, 1, 1, 1])
    assert relative_error(actual, through(model, rounded(model.config, 16), ids, [8, 1, 1, 1, 1])) < 1e-5
    layer = cache.layers[0]
    assert layer.keys.dtype == torch.int8 and layer.recurrent_states[0].is_floating_point()


def test_layers_of_another_kind_stay_as_they_are():
    model = tiny_model("llama")
    cache = StaticCache(model.config, 8)
    other = object()
    cache.layers.append(other)
    assert in_int8(cache) is cache and cache.layers[-1] is other
    assert all(isinstance(layer, StaticLayer) for layer in cache.layers[:-1])
    assert StaticCache(model.config, 8).layers[0].__class__ is StaticLayer


def test_a_step_is_one_graph():
    model = tiny_model("llama")
    caches = Int8StaticCache(model.config, 16), Int8StaticCache(model.config, 16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for cache in caches:
        through(model, cache, token_ids(5), 5)
    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for token in token_ids(4).T[:, None]:
            actual = step(token, **as_cache(model, caches[0]), use_cache=True).logits
            assert relative_error(actual, model(token, **as_cache(model, caches[1]), use_cache=True).logits) < 1e-5
    assert len(graphs) == 1


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("make_cache", [static_cache, filled_cache])
def test_the_loop_decodes_with_it(name, make_cache):
    model = tiny_model(name, **MODELS[name])
    decoder = Decoder(model, make_cache=make_cache, int8_cache=True)
    made = decoder.generate(token_ids(9), max_new_tokens=12, eos_token_id=())
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(token_ids(9), **as_cache(model, rounded(model.config, 21)), **arguments)
    assert made.stats.path == "recorded loop" and torch.equal(made.tokens[0], expected[0, 9:])
    assert all(layer.keys.dtype == torch.int8 for layer in decoder.runner.step.cache.layers)


def test_models_that_the_loop_does_not_run():
    model, inputs = tiny_model_that_runs("AutoModelForCausalLM", "falcon_h1")
    with pytest.raises(InputError, match="int8 need a cache that this model does not run with"):
        Decoder(model, int8_cache=True).generate(inputs["input_ids"], max_new_tokens=2)
