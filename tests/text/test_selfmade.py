"""Samples that the model makes itself."""

import pytest
import torch
from folders import REFERENCE, edit_config, edit_tensors, save_chat_model
from models import save_tiny
from transformers import AutoModelForCausalLM

from lowbit.errors import InputError
from lowbit.text import selfmade
from lowbit.text.selfmade import sample_from_model

pytestmark = pytest.mark.slow

BOS, EOS = 1, 2


def log_likelihood(model, ids: torch.Tensor) -> float:
    """Mean log-likelihood of a token behind the first, in nats."""
    with torch.inference_mode():
        log_probs = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)
    return float(log_probs.gather(2, ids[:, 1:, None]).mean())


def test_samples_are_likely_text_of_the_model():
    """About as likely as real text is, at temperatures around 1, where random tokens are worse than guessing."""
    ids = sample_from_model(REFERENCE, num_samples=16, seqlen=48)
    assert ids.dtype == torch.int64 and ids.shape == (16, 48)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    noise = torch.randint(2048, ids.shape, generator=torch.Generator().manual_seed(0))
    assert log_likelihood(model, noise) < -7.6  # -log(2048)
    assert -4.0 < log_likelihood(model, ids) < -1.0
    # sample i and sample i + 8 have one temperature: likely text first, the unlikely last
    by_temperature = [log_likelihood(model, ids[t::8]) for t in range(8)]
    assert sum(by_temperature[:3]) / 3 > sum(by_temperature[5:]) / 3 + 0.5
    assert len({tuple(row) for row in ids.tolist()}) == 16


def test_temperatures_are_those_of_the_samples(model_folder):
    processor = selfmade._Temperatures(range(6, 10))
    scaled = processor(None, torch.full((4, 3), 1.0, dtype=torch.bfloat16))
    assert torch.allclose(1 / scaled[:, 0], torch.tensor([1.2, 1.3, 0.6, 0.7])) and scaled.dtype == torch.float32


def test_same_seed_same_samples_and_the_callers_random_state(model_folder):
    state = torch.get_rng_state()
    made = [sample_from_model(model_folder, num_samples=3, seqlen=20, seed=seed) for seed in (5, 5, 6, 2**32 - 1)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(sample_from_model(model_folder, num_samples=3, seqlen=20, seed=5), made[0])
    assert torch.equal(made[0], made[1])
    assert len({tuple(ids.flatten().tolist()) for ids in made}) == 3


def test_batches(model_folder, monkeypatch):
    monkeypatch.setattr(selfmade, "_LARGEST_BATCH", 4)
    reports = []
    ids = sample_from_model(model_folder, num_samples=10, seqlen=8, progress=lambda *r: reports.append(r))
    assert ids.shape == (10, 8) and reports == [(32, 80), (64, 80), (80, 80)]
    assert not torch.equal(ids[:4], ids[4:8]), "the batches are the same"
    assert torch.equal(sample_from_model(model_folder, num_samples=4, seqlen=8), ids[:4])


@pytest.mark.parametrize(
    ("room", "batch"), [(2 * 2 * 4 * 10 * 2 * 16 * 3, 3), (1, 1), (2**40, 64)], ids=["three", "too little", "plenty"]
)
def test_batch_fits_its_memory(model_folder, monkeypatch, room, batch):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = model.config
    layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    assert (layers, heads, width, model.dtype.itemsize) == (2, 2, 16, 4)
    monkeypatch.setattr(selfmade, "_CACHE_BYTES", room)
    assert selfmade._batch_size(model, 10) == batch


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_samples_begin_with_bos_and_go_on_behind_eos(tmp_path, name):
    """Random models say everything equally often: EOS comes, and does not end the sample."""
    folder = save_tiny(tmp_path / "model", name)
    ids = sample_from_model(folder, num_samples=32, seqlen=60)
    assert ids.shape == (32, 60) and (ids[:, 0] == BOS).all()
    assert (ids[:, 1:-1] == EOS).any() and len(set(ids.flatten().tolist())) > 100


def test_model_without_bos(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    edit_config(folder, bos_token_id=None)
    for file in [*folder.glob("tokenizer*"), folder / "generation_config.json"]:
        file.unlink()
    first = sample_from_model(folder, num_samples=40, seqlen=3)[:, 0]
    assert len(set(first.tolist())) > 20 and not {0, EOS} & set(first.tolist())


def test_settings_of_the_models_author_do_not_narrow_the_text(tmp_path):
    from transformers import GenerationConfig

    folder = save_chat_model(tmp_path / "model")
    before = sample_from_model(folder, num_samples=2, seqlen=20)
    GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        repetition_penalty=9.0,
        eos_token_id=[2, 3],
        bos_token_id=1,
    ).save_pretrained(folder)
    assert torch.equal(sample_from_model(folder, num_samples=2, seqlen=20), before)


def test_every_token_can_come(model_folder):
    """No top-k: the 50 likeliest are its default in transformers."""
    ids = sample_from_model(model_folder, num_samples=16, seqlen=20)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model_folder)(input_ids=ids).logits[:, :-1]
    likelier = (logits > logits.gather(2, ids[:, 1:, None])).sum(-1)
    assert int(likelier.max()) > 100


def test_bf16_is_multiplied_in_float32_without_instructions_for_it(tmp_path, monkeypatch):
    folder, seen = save_chat_model(tmp_path / "model", dtype=torch.bfloat16), []
    original = selfmade._continue
    monkeypatch.setattr(selfmade, "_continue", lambda model, *args: seen.append(model.dtype) or original(model, *args))
    for gemm in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(selfmade, "gemm_dtype", lambda dtype, gemm=gemm: gemm)
        sample_from_model(folder, num_samples=1, seqlen=4)
    assert seen == [torch.float32, torch.bfloat16]


def drop_weight(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def other_shape(folder):
    edit_config(folder, intermediate_size=40)


def make_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def make_nan(folder):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def unknown_architecture(folder):
    edit_config(folder, model_type="unheard-of", architectures=["UnheardOf"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_weight, ["missing", "model.layers.1.mlp.up_proj.weight"]),
        (other_shape, ["mismatched", "mlp"]),
        (make_pickle, ["pickle", "safetensors"]),
        (truncate, ["truncated"]),
        (make_nan, ["NaN"]),
        (unknown_architecture, ["cannot load", "unheard-of"]),
    ],
)
def test_models_that_cannot_speak(refused, tmp_path, damage, words):
    folder = save_chat_model(tmp_path / "model")
    damage(folder)
    refused("self", *words, error=InputError, folder=folder, num_samples=2, seqlen=8)
