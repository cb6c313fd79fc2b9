"""A budget under torchrun: one process measures, all quantize by what it found."""

import json

import pytest
import torch
from folders import contents
from models import save_tiny
from runs import ended, start_ranks, told_by_ranks

import lowbit
from lowbit.quantization.allocation import allocate as module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="two processes need a GPU each, or none"
    ),
]
IDS = torch.randint(3, 128, (9, 24), generator=torch.Generator().manual_seed(0))
OPTIONS = {"method": "gptq", "dataset": IDS, "num_samples": 3, "seqlen": 24}


def budget_and_tell(told, source, output, options) -> None:
    """Leaves its report, and how often it has measured, in the file `told`."""
    calls, measure = [], module.second_order_costs
    module.second_order_costs = lambda *args: calls.append(args) or measure(*args)
    try:
        report = lowbit.quantize(source, output, **OPTIONS, **options)
        told.write_text(json.dumps({"allocation": report.allocation, "calls": len(calls)}))
    except Exception as error:
        told.write_text(json.dumps({"message": str(error), "calls": len(calls)}))
        raise


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))  # of the processes that are started
    return save_tiny(tmp_path / "model")


def test_one_process_measures_for_all(source, tmp_path):
    alone = lowbit.quantize(source, tmp_path / "alone", bits=4.5, **OPTIONS)
    assert ended(start_ranks(source, tmp_path / "out", function=budget_and_tell, bits=4.5)) == [0, 0]
    first, second = told_by_ranks(tmp_path / "out")
    assert (first["calls"], second["calls"]) == (1, 0)
    assert first["allocation"] == second["allocation"] == json.loads(json.dumps(alone.allocation))
    assert lowbit.verify(tmp_path / "out", run=False).ok
    configs = [json.loads(contents(tmp_path / name)["config.json"]) for name in ("alone", "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_budget_that_is_impossible_ends_all(source, tmp_path):
    assert ended(start_ranks(source, tmp_path / "out", function=budget_and_tell, bits=1.5)) == [2, 2]
    assert all("1.5 bits cannot be kept" in told["message"] for told in told_by_ranks(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
