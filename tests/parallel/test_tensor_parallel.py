"""Several processes share a model: they compute what one process alone computes, or say why they cannot."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from folders import save_chat_model
from models import relative_error, save_tiny, tiny_config, token_ids
from runs import ended, start_ranks

import lowbit
from lowbit.discovery import find_sites, skeleton
from lowbit.errors import InputError, LowbitError, UsageError
from lowbit.generation.loop import Decoder, generate
from lowbit.hf.packed import QuantizedSite
from lowbit.hf.shares import AUTO, BY_EXPERT, Share, shares_of
from lowbit.parallel import Part, Ranks
from lowbit.serving import modules_of, verdicts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes share CPUs here")
IDS = token_ids(24).view(2, 12)
# name -> (architecture, changes of its config, options of quantize (None: it stays dense), tp_plan)
TWO = {
    "llama": ("llama", {}, {"sym": False}, AUTO),
    "3 bits of GPTQ": ("llama", {}, {"bits": 3, "format": "gptq"}, AUTO),
    "AWQ": ("llama", {}, {"sym": False, "format": "awq"}, AUTO),
    "per channel, with biases and a head": ("qwen2", {}, {"bits": 8, "group_size": -1, "lm_head": True}, AUTO),
    "partly dense": ("qwen3", {}, {"ignore": "re:.*down_proj"}, AUTO),
    "dense": ("llama", {}, None, AUTO),
    "biases after sums": ("gpt_neox", {}, {}, AUTO),
    "fused in the checkpoint": ("phi3", {}, {}, AUTO),
    "experts by their sides": ("mixtral", {}, {"sym": False}, AUTO),
    "whole experts": ("mixtral", {}, {}, BY_EXPERT),
    "whole experts with biases": ("gpt_oss", {}, {}, BY_EXPERT),
}
WIDE = {"num_key_value_heads": 4, "intermediate_size": 128}
FOUR = {"llama": ("llama", WIDE, {}, AUTO), "whole experts": ("qwen3_moe", WIDE, {}, BY_EXPERT)}


def stored(tmp_path, cases: dict) -> dict:
    """name -> (folder, tp_plan)"""
    made = {}
    for number, (name, (architecture, changes, options, plan)) in enumerate(cases.items()):
        folder = save_tiny(tmp_path / f"{number}", architecture, **changes)
        if options is not None:
            lowbit.quantize(folder, tmp_path / f"{number}-q", **{"group_size": 16, **options})
            folder = tmp_path / f"{number}-q"
        made[name] = folder, plan
    return made


def held(model) -> int:
    """Bytes of the weights and biases of all layers."""
    layers = model.base_model.layers
    tensors = [*layers.parameters(), *layers.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def computed(told, source, output, options) -> None:
    results = {}
    for name, (folder, plan) in options["models"].items():
        model = lowbit.load(folder, tp_plan=plan)
        with torch.no_grad():
            results[name] = model(IDS).logits, held(model)
        made = generate(model, IDS, max_new_tokens=5, eos_token_id=())
        sampled = generate(model, IDS, max_new_tokens=5, temperature=5.0, eos_token_id=())  # no seed: all have one
        stopped = generate(model, IDS, max_new_tokens=5, eos_token_id=(), on_token=lambda tokens: Ranks().rank == 0)
        results[name] += made.tokens, sampled.tokens, stopped.tokens.shape[1], made.stats.path
        if options.get("save"):
            with pytest.raises(InputError, match="2 processes share this model: load it in one to save it"):
                model.save_pretrained(output)
    torch.save(results, told.with_suffix(".pt"))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)], ids=["2", "4"])
def test_processes_give_the_logits_of_one(world, cases, tmp_path):
    models = stored(tmp_path, cases)
    assert ended(start_ranks(None, tmp_path / "out", world, computed, models=models)) == [0] * world
    told = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(world)]
    for name, (folder, _) in models.items():
        alone = lowbit.load(folder)
        with torch.no_grad():
            expected = alone(IDS).logits
        tokens = generate(alone, IDS, max_new_tokens=5, eos_token_id=()).tokens
        for logits, size, made, sampled, stopped, path in (results[name] for results in told):
            assert relative_error(logits, expected) < 2e-6, name
            assert torch.equal(made, tokens), name
            assert torch.equal(sampled, told[0][name][3]) and stopped == 1 and path == "static loop", name
            if folder.name.endswith("-q") and "partly" not in name:
                assert size < held(alone) * (0.75 if world == 2 else 0.6), name


def refused(architecture: str, world: int, tp_plan=AUTO, group: int = 16, **changes) -> str:
    """Why so many processes cannot share a model whose linears have groups of that size."""
    model = skeleton(tiny_config(architecture, **changes))
    ranks = Ranks.alone()
    ranks.world = world
    scheme = lowbit.Scheme(4, group)
    found = {name: QuantizedSite(site, scheme) for name, site in find_sites(model).items()}
    with pytest.raises(LowbitError) as refusal:
        shares_of(model, tp_plan, ranks, found)
    return str(refusal.value)


def test_what_cannot_be_divided_is_refused_with_the_numbers():
    layer = "model.layers.0"
    assert f"{layer}.self_attn.k_proj has 2 heads: 4 processes cannot share them equally" in refused("llama", 4)
    assert "q_proj has 4 heads: 3 processes" in refused("llama", 3)
    assert f"{layer}.mlp.down_proj has 48 of 96 in_features on each of 2 processes, expected whole groups of 32" in (
        refused("llama", 2, group=32)
    )
    assert "mlp.gate_proj has 90 out_features: 4 processes" in (
        refused("llama", 4, num_key_value_heads=4, intermediate_size=90)
    )
    assert "in_features on each of 2 processes, expected whole groups of 32; tp_plan='experts' leaves" in (
        refused("mixtral", 2, group=32, intermediate_size=96)
    )
    assert "experts has 4 experts: 8 processes" in re.sub(
        r"\.(gate_up|down)_proj", "", refused("mixtral", 8, BY_EXPERT, num_attention_heads=8, num_key_value_heads=8)
    )
    assert "GPT2LMHeadModel has no tensor parallel plan" in refused("gpt2", 2)
    assert "LlamaForCausalLM has no plan of transformers for experts" in refused("llama", 2, BY_EXPERT)
    assert "tp_plan is 'rows': expected 'auto', 'experts'" in refused("llama", 2, "rows")
    assert "model.norm is 'sequence_parallel' in the plan" in refused("llama", 2, {"model.norm": "sequence_parallel"})


def test_rules_take_the_place_of_those_of_transformers():
    model, ranks = skeleton(tiny_config("llama")), Ranks.alone()
    ranks.world = 2
    rules = {"model.layers.*.mlp.gate_proj": "colwise_gather_output"}
    share = shares_of(model, rules, ranks).weights["model.layers.1.mlp.gate_proj.weight"]
    assert share == Share(share.site, Part(0, 2), -2, whole_side=True)


def test_a_vocabulary_that_does_not_divide_stays_whole():
    model, ranks = skeleton(tiny_config("llama", vocab_size=127)), Ranks.alone()
    ranks.world = 2
    assert "lm_head.weight" not in shares_of(model, AUTO, ranks).weights
    ranks.world = 1


def test_one_process_has_all(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    folder = save_tiny(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(lowbit.load(folder, tp_plan=AUTO)(IDS).logits, lowbit.load(folder)(IDS).logits)


def refusing(told, source, output, options) -> None:
    said = []
    for keywords in ({"device_map": "auto"}, {"lm_head": "W8A16"}):
        with pytest.raises(UsageError) as error:
            lowbit.load(source, tp_plan=AUTO, **keywords)
        said.append(str(error.value))
    model = lowbit.load(source, tp_plan=AUTO)
    with pytest.raises(UsageError) as error:
        Decoder(model, compile=True)
    said.append(str(error.value))
    with pytest.raises(UsageError) as error:
        model(IDS)  # with gradients
    said.append(str(error.value))
    told.write_text(json.dumps(said))


@pytest.mark.slow
def test_what_does_not_go_with_sharing(tmp_path):
    source = save_tiny(tmp_path / "m")
    assert ended(start_ranks(source, tmp_path / "out", 2, refusing)) == [0, 0]
    said = " ".join(json.loads((tmp_path / "rank-1.json").read_text()))
    for words in (
        "device_map='auto' and tp_plan=",
        "lm_head= and tp_plan=",
        "compile does not go",
        "only runs: load it",
    ):
        assert words in said


def dying(told, source, output, options) -> None:
    model = lowbit.load(source, tp_plan=AUTO)

    def on_token(tokens) -> bool:
        return False

    if Ranks().rank == 1:
        generate(model, IDS[:1], max_new_tokens=3, eos_token_id=())
        os.kill(os.getpid(), 9)
    generate(model, IDS[:1], max_new_tokens=3, eos_token_id=(), on_token=on_token)
    try:
        generate(model, IDS[:1], max_new_tokens=100, eos_token_id=(), on_token=on_token)
    except LowbitError as error:
        told.write_text(str(error))
        raise


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_in_one_line(tmp_path):
    source = save_tiny(tmp_path / "m")
    codes = ended(start_ranks(source, tmp_path / "out", 2, dying))
    assert codes == [1, -9]
    assert (tmp_path / "rank-0.json").read_text() == (
        "another process of this run has ended: what it printed says why, nothing if it was killed"
    )


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2", "phi3"])
@pytest.mark.parametrize("group", [16, 32])
def test_the_serving_table_says_what_loading_does(architecture, group):
    model = skeleton(tiny_config(architecture))
    found = {name: QuantizedSite(site, lowbit.Scheme(4, group)) for name, site in find_sites(model).items()
             if site.kind != "embedding"}  # fmt: skip
    modules = modules_of(model, {name: (each.site, each.scheme) for name, each in found.items()})
    verdict = next(v for v in verdicts("compressed-tensors", modules, [], []) if v.engine == "lowbit")
    for size in (2, 4, 8):
        ranks = Ranks.alone()
        ranks.world = size
        try:
            shares_of(model, AUTO, ranks, found)
            loads = True
        except LowbitError:
            loads = False
        assert (verdict.tensor_parallel[size] is None) is loads, verdict.tensor_parallel[size]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    """Two processes answer as one does, in one voice; what they cannot do together is refused."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    source = tmp_path / "m"
    save_chat_model(source)
    said = []
    for program in ([sys.executable, "-m"], ["torchrun", "--standalone", "--nproc-per-node", "2", "-m"]):
        command = [*program, "lowbit", "eval", source, "--num-tokens", "64", "--seqlen", "32", "--json"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout))
    assert said[0].keys() == said[1].keys()
    assert said[1]["perplexity"] == pytest.approx(said[0]["perplexity"], rel=1e-5)
