"""What a calibrated run is predicted to lose, against what such runs write."""

import pytest
import torch
from models import save_tiny

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import skeleton
from lowbit.folders.locate import load_config
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.allocation.trial import divergence_of_run
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.plan import make_plan
from lowbit.quantizers import checked_options

COARSE, FINE, HEAD = "W2A16_ASYM-G16", "W4A16-G16", "W4A16-G32"


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float().log_softmax(-1)


def predicted(folder, seen, ids, recipe):
    config, reader = load_config(folder), CheckpointReader(folder)
    model = LayeredModel(config, reader, torch.cat([seen, ids]), torch.float32, "cpu")
    plan = make_plan(reader, skeleton(config, False, tensors=reader.tensors.values()), recipe, "compressed-tensors")
    return divergence_of_run(model, plan, [seen], list(ids.split(2)))


@pytest.mark.parametrize("options", [{}, {"drift": 0.0}], ids=["drift", "no drift"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_it_is_the_kl_of_what_the_run_writes(tmp_path, architecture, options):
    folder = save_tiny(tmp_path / "model", architecture)
    seen, ids = torch.randint(3, 128, (8, 32)), torch.randint(3, 128, (4, 32))
    head = HEAD if architecture == "llama" else None
    fine = "re:.*(down_proj|c_proj)$"
    lowbit.quantize(
        folder, tmp_path / "made", scheme=COARSE, overrides={fine: FINE}, lm_head=head, method="gptq", dataset=seen,
        num_samples=8, seqlen=32, options=options,
    )  # fmt: skip
    dense, made = (lowbit.load(path, dtype="float32", backend="reference") for path in (folder, tmp_path / "made"))
    wanted, got = logits(dense, ids), logits(made, ids)
    each = (wanted.exp() * (wanted - got)).sum(-1).double()
    recipe = Recipe(
        Scheme.parse(COARSE), overrides={fine: Scheme.parse(FINE)}, lm_head=head and Scheme.parse(head), method="gptq",
        options=checked_options("gptq", options),
    )  # fmt: skip
    kl, error = predicted(folder, seen, ids, recipe)
    assert kl == pytest.approx(float(each.mean()), rel=1e-3)
    assert error == pytest.approx(float(each.view(2, -1).mean(1).std()) / 2**0.5, rel=1e-2)


def test_a_plan_predicts_what_the_run_writes(tmp_path):
    """Nothing of a calibrated run is left to chance; what is judged on is not calibrated with."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    folder = save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, **heads)
    ids = torch.randint(3, 128, (48, 24), generator=torch.Generator().manual_seed(0))
    data = {"dataset": ids, "num_samples": 16, "seqlen": 24, "method": "gptq"}
    found = lowbit.plan(folder, bits=2.9, **data).allocation
    assert found["predicted_kl"] == min(point["kl"] for point in found["judged"])
    again = lowbit.quantize(folder, tmp_path / "made", bits=2.9, **data).allocation
    assert again == found
