"""`lowbit report`, and `lowbit eval --save` whose result it shows."""

import re
import shutil
import sys

import pytest
from folders import contents, read_json


@pytest.fixture
def model(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "model")


def test_page_beside_the_folder(done, model, tmp_path):
    before = contents(model)
    assert done("report", model).out == f"written to {tmp_path / 'model.report.html'}\n"
    page = (tmp_path / "model.report.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "model.layers.0.mlp.down_proj" in page and page.count("<svg") == 3
    assert contents(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.report.html"]


def test_page_elsewhere_and_again(done, model, tmp_path, monkeypatch):
    monkeypatch.chdir(model)
    for _ in range(2):
        done("report", ".", "-o", "../page.html")
    done("report", ".")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.report.html", "page.html"]
    assert (tmp_path / "page.html").read_text("utf-8") == (tmp_path / "model.report.html").read_text("utf-8")


def test_refusals(refused, wrong_usage, chat_model, model, tmp_path, monkeypatch):
    wrong_usage("report", says="DIR")
    refused(1, "report", tmp_path / "nowhere", says=["no such folder", tmp_path / "nowhere"])
    refused(1, "report", chat_model, says=["holds no lowbit_report.json", chat_model])
    refused(1, "report", model, "-o", tmp_path / "no" / "page.html", says=["cannot write", "No such file"])
    refused(1, "report", model, "-o", model, says=["cannot write", model])
    with monkeypatch.context() as without:
        for name in [name for name in sys.modules if name.startswith(("matplotlib", "lowbit.report_page"))]:
            without.delitem(sys.modules, name)
        without.setitem(sys.modules, "matplotlib", None)
        refused(1, "report", model, says=["matplotlib", "pip install 'lowbit[report]'"])
    (model / "lowbit_report.json").write_text("{")
    refused(1, "report", model, says=["cannot read", "lowbit_report.json", "quantize again"])


def test_measured_quality_is_recorded_and_shown(json_of, done, model, chat_model, text_file, tmp_path):
    before = read_json(model / "lowbit_report.json")
    others = contents(model)
    measured = json_of("eval", model, "--reference", chat_model, "--dataset", text_file, "--num-tokens", 99, "--save")
    after = read_json(model / "lowbit_report.json")
    quality = after.pop("quality")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", quality.pop("date"))
    assert {"model": str(model), **quality} == measured and quality["kl_mean"] > 0
    assert before.pop("quality") is None and after == before and contents(model) == others

    done("report", model)
    page = (tmp_path / "model.report.html").read_text("utf-8")
    for key in ("perplexity", "reference_perplexity", "kl_mean", "kl_p99"):
        assert f'<td class="n">{measured[key]:.4g}</td>' in page, key
    assert f'<td class="n">{100 * measured["top1_agreement"]:.3g} %</td>' in page
    assert "98 tokens of" in page and "lowbit eval --save" in page

    again = json_of("eval", model, "--dataset", text_file, "--num-tokens", 50, "--save")
    assert read_json(model / "lowbit_report.json")["quality"]["tokens"] == again["tokens"] == 49


def test_quality_that_cannot_be_recorded(refused, quantized, chat_model, text_file, monkeypatch):
    from lowbit import eval as evaluation

    monkeypatch.setattr(evaluation, "evaluate", None)  # it is refused before anything is measured
    options = ["--dataset", text_file, "--save"]
    refused(2, "eval", "reference", *options, says=["--save", "quantized folder", "reference"])
    refused(2, "eval", "org/name", *options, says=["--save", "org/name"])
    refused(1, "eval", chat_model, *options, says=["holds no lowbit_report.json", chat_model])


def test_the_command_of_a_run(json_of, chat_model, tmp_path):
    words = ["--bits", "4", "--override", ".*q_proj=W8A16 ", "-o", tmp_path / "out"]
    shown = json_of("quantize", chat_model, *words)["command"]
    assert shown == f"lowbit quantize {chat_model} --bits 4 --override '.*q_proj=W8A16 ' -o {tmp_path / 'out'} --json"


def test_the_command_of_several_processes(monkeypatch):
    from lowbit.cli.commands.quantize import typed_command

    monkeypatch.setattr(sys, "argv", ["/somewhere/lowbit/__main__.py", "quantize", "a model"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert typed_command() == "torchrun --nproc-per-node 4 -m lowbit quantize 'a model'"
