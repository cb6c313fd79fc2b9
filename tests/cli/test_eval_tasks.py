"""Tasks of lm-evaluation-harness on lowbit's models. Skipped where the harness is not installed."""

import json

import pytest
import torch

import lowbit
from lowbit.errors import InputError
from lowbit.eval import tasks
from lowbit.generation.stream import load_tokenizer

EXAMPLES = [
    {"question": "import", "choices": [" os", " qqq"], "answer": 0},
    {"question": "def f(x):\n    return", "choices": [" zzz(", " x"], "answer": 0},  # a wrong one, on purpose
    {"question": "for i in", "choices": [" range", " import"], "answer": 0},
]
TASK = """task: toy
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/examples.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    (made / "examples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in EXAMPLES))
    (made / "toy.yaml").write_text(TASK.format(folder=made))
    return made


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    ids = tokenizer(question + choice, return_tensors="pt")["input_ids"]
    start = len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def test_the_harness_takes_a_loaded_model(folder):
    """The line of docs/service.md; its answers are those that the logits give."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = lowbit.load("reference"), load_tokenizer("reference")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(wrapped, tasks=["toy"], task_manager=manager, bootstrap_iters=0)
    for sample, example in zip(found["samples"]["toy"], EXAMPLES, strict=True):
        expected = [log_likelihood(model, tokenizer, example["question"], c) for c in example["choices"]]
        assert [each[0][0] for each in sample["resps"]] == pytest.approx(expected, abs=0.15)  # it computes in bfloat16
    right = sum(
        log_likelihood(model, tokenizer, e["question"], e["choices"][0])
        > log_likelihood(model, tokenizer, e["question"], e["choices"][1])
        for e in EXAMPLES
    )
    assert tasks.run_tasks(model, tokenizer, ["toy"], folder)["toy"]["acc"] == pytest.approx(right / 3)


def test_the_command(folder, cli, tmp_path):
    pytest.importorskip("lm_eval")
    lowbit.quantize("reference", tmp_path / "q", scheme="W4A16-G32")
    done = cli("eval", tmp_path / "q", "--reference", "reference", "--tasks", "toy", "--task-path", folder, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert set(result["tasks"]["toy"]) >= {"acc"} and set(result["reference_tasks"]) == {"toy"}
    shown = cli("eval", "reference", "--tasks", "toy", "--task-path", folder, "--task-limit", 1)
    assert shown.code == 0 and "toy, acc" in shown.out and shown.out.count("1.0000") == 1
    wrong = cli("eval", "reference", "--tasks", "other", "--task-path", folder)
    assert wrong.code == 1 and "there is no task 'other'" in wrong.err and "toy" in wrong.err


def test_what_cannot_be(cli, monkeypatch, tmp_path):
    for arguments, code, words in (
        (("--task-limit", 3), 2, "are of --tasks: pass that too"),
        (("--tasks", "toy", "--save"), 2, "--save records perplexities"),
        (("--tasks", "toy", "--task-path", tmp_path / "no"), 2, "is no folder"),
        (("--tasks", ","), 2, "--tasks is empty"),
    ):
        done = cli("eval", "reference", *arguments)
        assert done.code == code and words in done.err, done
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"tasks need lm_eval: pip install 'lowbit\[lm-eval\]'"):
        tasks.harness()
