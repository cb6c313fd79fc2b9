"""What the page of a report shows of a budget, from JSON that anyone may have written."""

import pytest

from lowbit.folders.allocation import Allocation
from lowbit.report_page.page import render

FACTS = {
    "budget": {"bits": 3.5},
    "engine": None,
    "data": "16,384 tokens of stdlib-train",
    "predicted_kl": 0.021,
    "estimated_kl": 0.02,
    "units": [
        {"name": "model.layers.0.mlp.gate_proj+up_proj", "scheme": "W3A16_ASYM-G128", "bytes": 100, "kl": 0.01},
        {"name": "model.layers.1.mlp.gate_proj+up_proj", "scheme": "W4A16-G32", "bytes": 140, "kl": 0.004},
        {"name": "model.layers.0.mlp.down_proj", "scheme": "W8A16-G32", "bytes": 300, "kl": 0.001},
    ],
    "judged": [{"bytes": 540, "bits": 3.49, "kl": 0.021}, {"bytes": 530, "bits": 3.4, "kl": 0.025}],
    "frontier": [{"bytes": 400, "bits": 2.5, "kl": 0.2}, {"bytes": 900, "bits": 8.5, "kl": 0.0001}],
    "uniform": [{"scheme": "W3A16-G64", "bytes": 500, "bits": 3.25, "kl": 0.05}],
}  # fmt: skip


def test_the_frontier_and_what_each_kind_got():
    html = render({"allocation": FACTS, "source": "model"}, "folder")
    assert "--bits 3.5" in html and "0.021" in html and "16,384 tokens of stdlib-train" in html
    assert "1 × W3A16_ASYM-G128, 1 × W4A16-G32" in html and "gate_proj+up_proj" in html
    assert 'id="frontier-' in html


def test_a_report_without_a_budget_has_no_such_part():
    html = render({"source": "model"}, "folder")
    assert "What was chosen" not in html


def test_the_result_is_the_best_of_the_judged():
    chosen = Allocation(FACTS).chosen
    assert (chosen.bits, chosen.kl) == (3.49, 0.021)


@pytest.mark.parametrize("key", list(FACTS))
@pytest.mark.parametrize(
    "value", [None, [], {}, "<script>", -1, 1e400, [{}], [{"bits": "x", "kl": None}], {"bits": []}]
)
def test_anything_may_stand_there(key, value):
    html = render({"allocation": {**FACTS, key: value}}, "folder")
    assert "<script" not in html
