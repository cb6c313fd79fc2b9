"""A budget is kept to the byte, its result is what any reader loads, and nothing is measured twice."""

import json

import pytest
import torch
from folders import contents
from models import save_tiny, token_ids

import lowbit
from lowbit.errors import UsageError
from lowbit.quantization.allocation import allocate as module

IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"dataset": IDS, "num_samples": 4, "seqlen": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    return save_tiny(folder, hidden_size=128, intermediate_size=256, **heads)


def weight_files(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("bits", [2.9, 3.5, 5.25])
def test_an_average_is_kept(source, tmp_path, bits):
    report = lowbit.quantize(source, tmp_path / "out", bits=bits, **QUICK)
    assert bits * 0.97 < report.bits_per_weight <= bits
    assert lowbit.verify(tmp_path / "out", run=False).ok
    units = report.allocation["units"]
    assert len({unit["scheme"] for unit in units}) > 1
    assert sum(unit["bytes"] for unit in units) * 8 / report.bits_per_weight == pytest.approx(
        sum(layer["shape"][0] * layer["shape"][1] for layer in report.layers)
    )
    for unit in units:
        schemes = {layer["scheme"] for layer in report.layers if layer["module"] in unit["modules"]}
        assert schemes == {unit["scheme"]}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_size_is_kept_and_others_load_the_result(source, tmp_path, method):
    from transformers import AutoModelForCausalLM

    """transformers takes several schemes in one model where all are symmetric."""
    size = int(lowbit.plan(source, scheme="W4A16-G32").file_bytes)
    options = {"size": size, "engine": "transformers", "method": method}
    report = lowbit.quantize(source, tmp_path / "out", **options, **QUICK)
    assert len({unit["scheme"] for unit in report.allocation["units"]}) > 1
    assert size * 0.98 < weight_files(tmp_path / "out") <= size
    ids = token_ids()
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "out", dtype=torch.float32)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.allclose(ours, theirs(ids).logits, atol=2e-4)


def test_sharded_files_keep_to_a_size_too(source, tmp_path):
    size = int(lowbit.plan(source, bits=3.5, **QUICK).file_bytes * 1.05)
    lowbit.quantize(source, tmp_path / "out", size=size, max_shard_size="60KB", **QUICK)
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 2
    assert weight_files(tmp_path / "out") <= size


def test_a_larger_budget_never_costs_more(source):
    found = [lowbit.plan(source, bits=bits, **QUICK).allocation for bits in (2.9, 3.5, 4.5, 6.1)]
    estimates = [each["estimated_kl"] for each in found]
    assert estimates == sorted(estimates, reverse=True)
    frontier = [(point["bytes"], point["kl"]) for point in found[0]["frontier"]]
    assert frontier == sorted(frontier, key=lambda point: (point[0], -point[1]))


def test_the_best_of_the_judged_is_taken(source):
    found = lowbit.plan(source, bits=3.5, **QUICK).allocation
    assert found["predicted_kl"] == min(point["kl"] for point in found["judged"])
    assert len(found["judged"]) > 1
    no_larger = [p for p in found["uniform"] if p["bytes"] <= sum(unit["bytes"] for unit in found["units"])]
    assert all(point["kl"] > found["predicted_kl"] for point in no_larger)


def test_a_quality_is_kept(source, tmp_path):
    loose, strict = (lowbit.plan(source, max_kl=kl, **QUICK) for kl in (0.05, 0.005))
    assert loose.allocation["predicted_kl"] <= 0.05 and strict.allocation["predicted_kl"] <= 0.005
    assert loose.output_bytes < strict.output_bytes
    smaller = lowbit.plan(source, bits=strict.bits_per_weight * 0.9, **QUICK)
    assert smaller.allocation["predicted_kl"] > 0.005 * 0.9 * 0.9


def test_the_same_budget_gives_the_same_files(source, tmp_path):
    for name in ("one", "two"):
        lowbit.quantize(source, tmp_path / name, bits=3.5, **QUICK)
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one["model.safetensors"] == two["model.safetensors"] and one["config.json"] == two["config.json"]


def test_another_budget_measures_nothing_again(source, monkeypatch):
    first = lowbit.plan(source, bits=3.5, **QUICK)

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "second_order_costs", never)
    lowbit.plan(source, bits=4.5, **QUICK)
    monkeypatch.setattr(module, "divergences", never)
    assert lowbit.plan(source, bits=3.5, **QUICK).allocation == first.allocation
    with pytest.raises(AssertionError, match="measured again"):  # other data
        lowbit.plan(source, bits=3.5, **{**QUICK, "dataset": IDS.flip(0)})


@pytest.mark.parametrize("damage", ["{", "[]", '{"costs": {"a": 1}}', '{"costs": {}, "divergences": {"x": "y"}}'])
def test_a_damaged_cache_is_measured_again(source, own_cache, caplog, damage):
    first = lowbit.plan(source, bits=3.5, **QUICK)
    (file,) = own_cache.glob("*.json")
    file.write_text(damage)
    assert lowbit.plan(source, bits=3.5, **QUICK).allocation == first.allocation
    assert "measured again" in caplog.text and str(file) in caplog.text
    assert json.loads(file.read_text())["costs"]


def test_a_cache_that_others_may_write_is_not_read(source, own_cache, monkeypatch):
    lowbit.plan(source, bits=3.5, **QUICK)
    (file,) = own_cache.glob("*.json")
    file.chmod(0o666)
    monkeypatch.setattr(module, "second_order_costs", lambda *args: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        lowbit.plan(source, bits=3.5, **QUICK)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 1.5}, r"1.5 bits cannot be kept: the smallest schemes come to 2[.]\d+ bits; pass at least that"),
        ({"size": "10KB"}, r"10,000 bytes cannot be kept: the smallest schemes come to [\d,]+ bytes; pass"),
        ({"max_kl": 1e-12}, r"a KL of 1e-12 cannot be kept: the largest schemes come to [\d.e-]+, with a margin"),
        ({"bits": 3.5, "engine": "sglang"}, r"the smallest schemes that sglang takes come to 4[.]\d+ bits"),
        ({"max_kl": 0.0}, r"max_kl is 0.0; expected a number above 0"),
        ({"bits": 3.5, "size": "1GB"}, r"--size and --bits 3.5 are two budgets: pass one of them"),
        ({"bits": 4, "size": "1GB"}, r"--size chooses the bits of each part: leave --bits 4 out"),
        ({"bits": 3.5, "group_size": 64}, r"--bits 3.5 chooses a scheme for each part: leave --group-size out"),
        ({"size": "1GB", "scheme": "W4A16"}, r"--size chooses a scheme for each part: leave --scheme out"),
        ({"engine": "vllm"}, r"--engine says which schemes a budget may choose: pass --bits 3.5, --size, --fit or"),
        ({"size": "many"}, r"size 'many' is not understood"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(source, tmp_path, options, message):
    data = {} if set(options) == {"engine"} else QUICK
    with pytest.raises(UsageError, match=message) as raised:
        lowbit.quantize(source, tmp_path / "out", **options, **data)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_average_counts_what_the_user_has_said(source):
    found = lowbit.plan(source, bits=4.0 + 1e-6, overrides={"down_proj": "W8A16-G32"}, **QUICK)
    assert found.bits_per_weight <= 4.0 + 1e-6
    assert {m["scheme"] for m in found.modules if "down_proj" in m["name"]} == {"W8A16-G32"}


def test_what_no_data_reaches_gets_the_most_bits(source, monkeypatch, caplog):
    """As experts that no router is known of, and linears outside of the decoder layers."""
    found = module.steps_by_layer

    def without_first(*args):
        layers = found(*args)
        return [[step for step in layers[0] if "o_proj" not in step.source.name], *layers[1:]]

    monkeypatch.setattr(module, "steps_by_layer", without_first)
    units = lowbit.plan(source, bits=3.5, **QUICK).allocation["units"]
    (unseen,) = (unit for unit in units if unit["modules"] == ["model.layers.0.self_attn.o_proj"])
    assert unseen["scheme"].startswith("W8A16") and unseen["kl"] == 0
    assert "model.layers.0.self_attn.o_proj (and 0 more) lies where no data comes by" in caplog.text
    monkeypatch.setattr(module, "second_order_costs", lambda *args: pytest.fail("measured again"))
    lowbit.plan(source, bits=4.5, **QUICK)


def test_what_the_user_has_said_is_judged_too(source):
    """All else is as small as it gets in both."""
    coarse, fine = (
        lowbit.plan(source, max_kl=9.0, overrides={"down_proj": scheme}, **QUICK).allocation["predicted_kl"]
        for scheme in ("W2A16_ASYM-G64", "W8A16-G32")
    )
    assert coarse > 1.05 * fine


def test_a_head_of_its_own_is_quantized_where_that_is_worth_it(tmp_path):
    """And stays dense where there is room; one that is tied is left alone."""
    source = save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    small, large = (lowbit.plan(source, scheme=s, lm_head=s).file_bytes for s in ("W4A16-G32", "W8A16-G32"))
    dense = lowbit.plan(source, scheme="W8A16-G32").file_bytes

    def head(size):
        found = lowbit.plan(source, size=size, **QUICK)
        assert found.file_bytes <= size
        (unit,) = (unit for unit in found.allocation["units"] if unit["modules"] == ["lm_head"])
        return unit

    assert head(small)["scheme"] != "dense" and head(small)["kl"] > 0
    assert head(dense)["scheme"] == "dense" and head(dense)["kl"] == 0 and dense > large
    lowbit.quantize(source, tmp_path / "out", size=small, **QUICK)
    assert lowbit.verify(tmp_path / "out", run=False).ok
    bits = lowbit.plan(source, bits=3.5, **QUICK).allocation["units"]
    assert not any("lm_head" in unit["modules"] for unit in bits)  # an average is of what is quantized
