"""Folders of strangers whose names are links: a clone or an archive, and the command that its README names."""

import os
import shutil

import pytest
from folders import precious, read_json, write_json

from lowbit.verification.checks import static_checks

GPTQ = ["--method", "gptq", "--num-samples", 2, "--seqlen", 16]


@pytest.fixture
def victim(tmp_path_factory):
    """Files of the user's, which must stay what they are."""
    with precious(tmp_path_factory.mktemp("victim")) as folder:
        yield folder


@pytest.fixture
def model(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "model")


@pytest.fixture
def methods(text_file):
    return {"rtn": ["--group-size", 32], "gptq": ["--group-size", 32, *GPTQ, "--dataset", text_file]}


# quantize: the folder of an unfinished run


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_job_folder_that_is_a_link(refused, chat_model, tmp_path, victim, methods, method, relative):
    job = tmp_path / ".out.job"
    job.symlink_to(os.path.relpath(victim, tmp_path) if relative else victim)
    refused(1, "quantize", chat_model, "-o", tmp_path / "out", *methods[method], says=[job, "is a link", "remove it"])


JOB_FILES = [
    "job.json", "job.json.partial", "layer.partial", "layer.partial/x", "streams-0001-0", "samples-0", "deep/er/x"
]  # fmt: skip


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("name", "to"), [(".lock", "a"), (".lock", "docs"), (".lock", "new"), *((name, "a") for name in JOB_FILES)]
)
def test_a_link_in_a_job_folder(refused, chat_model, tmp_path, victim, methods, method, name, to):
    link = tmp_path / ".out.job" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / to)
    refused(1, "quantize", chat_model, "-o", tmp_path / "out", *methods[method], says=[link, "is a link", "remove"])


def test_a_pipe_in_a_job_folder(cli, chat_model, tmp_path, methods):
    """To open it would wait for ever."""
    pipe = tmp_path / ".out.job" / "job.json"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    outcome = cli("quantize", chat_model, "-o", tmp_path / "out", *methods["gptq"])
    assert outcome.code == 1 and f"{pipe} is no regular file" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# eval --save and report: names in the folder, and beside it


@pytest.mark.parametrize("name", [".lowbit_report.json.partial", "lowbit_report.json.partial", ".partial"])
def test_saving_follows_no_link_in_the_folder(done, model, victim, text_file, name):
    (model / name).symlink_to(victim / "a")
    write_json(model / "lowbit_report.json", {**read_json(model / "lowbit_report.json"), "x": "$(touch PWNED)"})
    done("eval", model, "--save", "--dataset", text_file, "--num-tokens", 64, "--seqlen", 32)
    assert read_json(model / "lowbit_report.json")["quality"]["perplexity"] > 0


def test_a_report_that_is_a_link_is_not_taken_into_the_folder(refused, model, tmp_path, victim, text_file):
    """Written back, what it leads to would be a file of the folder, and published with it."""
    (tmp_path / "secret.json").write_text('{"token": "hf_x"}')
    (model / "lowbit_report.json").unlink()
    (model / "lowbit_report.json").symlink_to(tmp_path / "secret.json")
    says = [model / "lowbit_report.json", "is a link"]
    refused(1, "eval", model, "--save", "--dataset", text_file, "--num-tokens", 64, "--seqlen", 32, says=says)
    refused(1, "report", model, says=says)
    assert (model / "lowbit_report.json").is_symlink()


@pytest.mark.parametrize("name", [".model.report.html.partial", "model.report.html"])
def test_a_page_beside_the_folder_follows_no_link(done, model, tmp_path, victim, name):
    (tmp_path / name).symlink_to(victim / "a")
    done("report", model)
    page = tmp_path / "model.report.html"
    assert page.read_text("utf-8").startswith("<!doctype html>") and not page.is_symlink()


# push

PUBLISHED = [
    "config.json", "quantize_config.json", "quant_config.json", "lowbit_manifest.json", "lowbit_report.json",
    "model.safetensors", "model.safetensors.index.json", "README.md", "LICENSE", "tokenizer.json", "deep/notes.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_link_that_leads_out_of_the_folder_is_not_published(refused, model, tmp_path, name):
    path = model / name
    path.parent.mkdir(exist_ok=True)
    target = tmp_path / "elsewhere"
    if path.exists():
        path.rename(target)
    else:
        target.write_text("{}")
    for to in (target, os.path.relpath(target, path.parent), "nowhere"):
        path.symlink_to(to)
        refused(1, "push", model, "me/x", "--dry-run", says=[path, "is a link", str(model)])
        checked = list(static_checks(model))
        assert any(not check.ok and (name in check.detail or name == "model.safetensors") for check in checked)
        path.unlink()


def test_links_that_stay_in_the_folder_are_published(done, model):
    (model / "NOTICE").write_text("notice")
    (model / "LICENSE").symlink_to("NOTICE")
    err = done("push", model, "me/x", "--dry-run").err
    assert "LICENSE" in err and "NOTICE" in err


def test_a_folder_of_the_hub_cache_is_published(done, model, refused, tmp_path):
    """All of its files are links: to the blobs of the same repository, and to nothing else."""
    snapshot, blobs = tmp_path / "models--org--x" / "snapshots" / "abc", tmp_path / "models--org--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert "model.safetensors" in done("push", snapshot, "me/x", "--dry-run").err
    (tmp_path / "secret").write_text("{}")
    (blobs / "link").symlink_to(tmp_path / "secret")
    (snapshot / "quant_config.json").symlink_to("../../blobs/link")
    refused(1, "push", snapshot, "me/x", "--dry-run", says=["quant_config.json", "is a link"])
