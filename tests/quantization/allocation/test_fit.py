"""A budget of memory: what is foreseen of running keeps to it, and uses it."""

import pytest
import torch
from models import save_tiny

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.errors import UsageError

IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"dataset": IDS, "num_samples": 4, "seqlen": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    return save_tiny(folder, dtype=torch.bfloat16, hidden_size=128, intermediate_size=256, **heads)


def memory(source, scheme, **load):
    return lowbit.plan(source, scheme=scheme, **load).memory


@pytest.mark.parametrize("engine", [None, "vllm", "mlx"])
def test_a_memory_is_kept_and_used(source, engine):
    load = {"context": "64", "batch": 2, "engine": engine}
    least = lowbit.plan(source, max_kl=9.0, **load, **QUICK).memory["peak"]
    most = lowbit.plan(source, fit=10**9, **load, **QUICK).memory["peak"]
    fit = (least + most) // 2
    found = lowbit.plan(source, fit=fit, **load, **QUICK)
    assert fit * 0.99 < found.memory["peak"] <= fit
    assert found.allocation["memory"] == found.memory and found.allocation["budget"] == {"fit": fit}
    parts = [found.memory[part] for part in ("weights", "cache", "working")]
    assert sum(parts) == found.memory["peak"] and min(parts) > 0


def test_weights_that_run_are_those_foreseen(source, tmp_path):
    fit = memory(source, "W4A16-G32", context=64)["peak"]
    report = lowbit.quantize(source, tmp_path / "out", fit=fit, context=64, **QUICK)
    model = lowbit.load(tmp_path / "out")
    tensors = [*model.parameters(), *model.buffers()]
    held = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
    assert held == pytest.approx(report.allocation["memory"]["weights"], rel=0.02)


def test_a_longer_context_leaves_less_for_weights(source):
    fit = memory(source, "W4A16-G32", context=128)["peak"]
    bits = [lowbit.plan(source, fit=fit, context=tokens, **QUICK).bits_per_weight for tokens in (16, 128)]
    assert bits == sorted(bits, reverse=True)
    cache = [memory(source, "W4A16-G32", context=128, kv_cache=kind)["cache"] for kind in ("bf16", "int8")]
    assert cache[1] < 0.6 * cache[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "10KB", "context": 64}, r"10,000 bytes of memory cannot be kept: the smallest schemes come to [\d,]+ "
         r"bytes, [\d,]+ of them for the full cache of 1 x 64 tokens and [\d,]+ to compute with; pass at least that"),
        ({"fit": "1GB", "size": "1GB"}, r"--size and --fit are two budgets: pass one of them"),
        ({"fit": "1GB", "context": 10**6}, r"the model was made for \d+ tokens: --context 1000000 is more"),
        ({"fit": "1GB", "context": "many"}, r"context 'many' is not understood; expected a number of tokens, such as"),
        ({"fit": "1GB", "kv_cache": "fp8"}, r"kv_cache is 'fp8'; expected one of full, bf16, int8"),
        ({"fit": "1GB", "batch": 0}, r"batch is 0; expected 1 or more"),
        ({"fit": "1GB", "engine": "transformers"}, r"transformers dequantizes the whole model at its first call"),
        ({"bits": 3.5, "context": "4k"}, r"--context 4k says what is to fit: pass --fit 24GB too, or see"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_said_in_a_line(source, tmp_path, options, message):
    with pytest.raises(UsageError, match=message) as raised:
        lowbit.quantize(source, tmp_path / "out", **options, **QUICK)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fit", "size"])
def test_it_is_said_where_the_model_fits_as_it_is(source, kind):
    load = {"context": 16} if kind == "fit" else {}
    whole = lowbit.plan(source, fit=10**9, context=16, **QUICK)
    dense = whole.memory["cache"] + whole.memory["working"] if kind == "fit" else 0
    dense += sum(info.nbytes for info in CheckpointReader(source).tensors.values())
    found = [lowbit.plan(source, **{kind: size}, **load, **QUICK).allocation for size in (dense - 1, dense + 100_000)]
    assert [each["fits_dense"] for each in found] == [False, True]
