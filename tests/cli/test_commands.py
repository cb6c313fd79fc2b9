"""Each command on a tiny model, and what scripts may rely on of its output."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from folders import (
    REFERENCE,
    ROOT,
    STORIES,
    contents,
    data_bytes,
    read_json,
    save_chat_model,
    stored_tensors,
)
from models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.cli.main import COMMANDS

COMMAND = [sys.executable, "-m", "lowbit"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


# The program


def test_version_in_a_process_of_its_own():
    done = subprocess.run([*COMMAND, "--version"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lowbit {lowbit.__version__}\n", "")


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; sys.argv = ['lowbit', '--help']\n"
        "try:\n    from lowbit.cli import main; main()\n"
        "finally:\n    print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n")
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(done, command):
    out = done(command, "--help").out
    assert f"Usage: lowbit {command}" in out
    # the line in the table is the first of the function's docstring, or its beginning
    assert COMMANDS[command][1].split(",")[0].rstrip(".").split(":")[0] in " ".join(out.split())


def test_no_command_shows_the_help(cli):
    outcome = cli()
    assert outcome.code == 2 and "Commands" in outcome.out + outcome.err


def test_errors_in_a_process_of_their_own(tmp_path):
    """What the other tests see in this process is what a shell sees."""
    done = subprocess.run([*COMMAND, "quantize", "no/such", "-o", "x", "--bits", "7"],
                          env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lowbit: error: bits is 7; allowed: 2, 3, 4, 5, 6, 8\n"
    assert list(tmp_path.iterdir()) == []


def test_output_into_a_pipe_that_closes(quantized):
    process = subprocess.Popen([*COMMAND, "inspect", quantized, "--layers"], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 1)


# quantize


def test_quantize_json(json_of, chat_model, tmp_path):
    report = json_of("quantize", chat_model, "-o", tmp_path / "out", "--bits", "4", "--group-size", "32", "--asym")
    assert report["source"] == str(chat_model)
    assert report["recipe"]["scheme"] == {"bits": 4, "group_size": 32, "sym": False}
    assert report["source_bytes"] == data_bytes(chat_model)
    assert report["output_bytes"] == data_bytes(tmp_path / "out")
    assert report["quantized_tensors"] == len(report["layers"]) == 14
    assert all(0.02 < layer["error"] < 0.2 for layer in report["layers"])


def test_quantize_for_people(done, chat_model, tmp_path):
    outcome = done("quantize", chat_model, "-o", tmp_path / "out")
    for words in ("14 weight tensors quantized", "model.layers.0.mlp.down_proj.weight: W4A16-G32", "lm_head",
                  f"written to {tmp_path / 'out'}"):  # fmt: skip
        assert words in outcome.out
    assert outcome.err == ""


def test_brackets_are_not_markup(done, chat_model, tmp_path):
    """Names of folders and regexes are printed as they are, whatever rich takes them for."""
    for name in ("out[b]", "out [/b]", "[red]", "x[link=y]"):
        out = done(
            "quantize", chat_model, "-o", tmp_path / name, "--ignore", ".*[qk]_proj[/]?", "--group-size", "32"
        ).out
        assert f"written to {tmp_path / name}\n" in out and "ignored by '.*[qk]_proj[/]?'" in out
        out = done("inspect", tmp_path / name, "--layers").out
        assert "model.layers.1.mlp.down_proj" in out


@pytest.mark.parametrize(
    "spelling",
    [
        ("{model}", "-o", "{out}", "--scheme", "W8A16-G32"),
        ("--model", "{model}", "--output-dir", "{out}", "--bits", "8", "--group_size", "32"),
        ("-m", "{model}", "--output_dir={out}", "--scheme=w8a16", "--group-size=32", "--sym", "--scale_search=minmax"),
    ],
    ids=["scheme", "bits", "equals"],
)
def test_ways_to_say_the_same(done, chat_model, tmp_path, spelling):
    done("quantize", *(part.format(model=chat_model, out=tmp_path / "out") for part in spelling))
    lowbit.quantize(chat_model, tmp_path / "expected", scheme="W8A16", group_size=32)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_options_arrive(done, chat_model, tmp_path):
    done("quantize", chat_model, "-o", tmp_path / "out", "--group-size", "32", "--scale-search", "mse",
         "--ignore", ".*q_proj", "--ignore", ".*k_proj", "--override", ".*down_proj=W8A16-G16",
         "--max-shard-size", "50KB")  # fmt: skip
    lowbit.quantize(chat_model, tmp_path / "expected", group_size=32, options={"scale_search": "mse"},
                    ignore=[".*q_proj", ".*k_proj"], overrides=[(".*down_proj", "W8A16-G16")],
                    max_shard_size=50_000)  # fmt: skip
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_dry_run(json_of, done, chat_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = json_of("quantize", chat_model, "--dry-run")
    assert "nothing was written" in done("quantize", chat_model, "-o", tmp_path / "out", "--dry-run").out
    assert list(tmp_path.iterdir()) == []
    written = json_of("quantize", chat_model, "-o", tmp_path / "out")
    assert report["output_bytes"] == written["output_bytes"] == data_bytes(tmp_path / "out")


def test_overwrite(done, chat_model, tmp_path):
    done("quantize", chat_model, "-o", tmp_path / "out", "--bits", "8")
    done("quantize", chat_model, "-o", tmp_path / "out", "--bits", "4", "--overwrite")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# inspect


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "mixtral", "gpt2"])
def test_inspect_adds_up(json_of, tmp_path, architecture):
    source = save_tiny(tmp_path / "source", architecture, dtype=torch.bfloat16)
    lowbit.quantize(source, tmp_path / "out", group_size=32, overrides=[(r".*\.1\.", "W8A16_ASYM-G16")],
                    max_shard_size="50KB")  # fmt: skip
    dense, packed = json_of("inspect", source), json_of("inspect", tmp_path / "out")
    for folder, summary in ((source, dense), (tmp_path / "out", packed)):
        assert summary["bytes"] == sum(part["bytes"] for part in summary["parts"]) == data_bytes(folder)
        assert summary["files"] == len(list(folder.glob("*.safetensors")))
        assert summary["bits_per_weight"] == 8 * summary["bytes"] / summary["parameters"]
        for part in summary["parts"]:
            assert part["bits_per_weight"] == 8 * part["bytes"] / part["parameters"]
    parameters = sum(tensor.numel() for tensor in stored_tensors(source).values())
    assert dense["parameters"] == packed["parameters"] == parameters
    assert dense["format"] is None and [part["name"] for part in dense["parts"]] == ["bfloat16"]
    assert packed["format"] == "compressed-tensors"
    assert {part["name"] for part in packed["parts"]} == {"bfloat16", "W4A16-G32", "W8A16_ASYM-G16"}
    quantized = [part for part in packed["parts"] if part["name"] != "bfloat16"]
    assert sum(layer["bytes"] for layer in packed["layers"]) == sum(part["bytes"] for part in quantized)
    assert len(packed["layers"]) == sum(part["tensors"] for part in quantized)


def test_inspect_for_people(done, quantized):
    out = done("inspect", quantized, "--layers").out
    assert "LlamaForCausalLM" in out and "model.layers.1.mlp.down_proj" in out and "[64, 96]" in out


def test_inspect_reads_headers_only(json_of, quantized, monkeypatch):
    """It has to work on a checkpoint larger than memory: what it reads are the few bytes of the shapes."""
    from lowbit.checkpoint import CheckpointReader

    read = []
    real = CheckpointReader.tensor
    monkeypatch.setattr(CheckpointReader, "tensor", lambda self, name: read.append(name) or real(self, name))
    json_of("inspect", quantized)
    assert all(name.endswith("_shape") for name in read)


# eval


def test_a_model_is_itself(json_of, chat_model, text_file):
    result = json_of("eval", chat_model, "--reference", chat_model, "--dataset", text_file, "--num-tokens", "150")
    assert {"perplexity", "kl_mean", "kl_p99", "top1_agreement", "tokens"} <= result.keys()
    assert (result["kl_mean"], result["kl_p99"], result["top1_agreement"]) == (0, 0, 1)
    assert result["perplexity"] == result["reference_perplexity"]


def float64_log_probs(folder, windows):
    """Next-token log-probabilities of a dense model in float64, for each window all but the last position."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return [model(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for window in windows]


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
def test_eval_equals_a_computation_in_float64(json_of, text_file, tmp_path, bos):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_chat_model(dense, bos=bos)
    lowbit.quantize(dense, packed, group_size=32)
    lowbit.load(packed).dequantize().save_pretrained(tmp_path / "restored")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = [*tokenizer(text_file.read_text("utf-8"), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > 300
    start, own = ([tokenizer.bos_token_id], 63) if bos else ([], 64)
    windows = [start + ids[i : i + own] for i in range(0, len(ids), own)]
    windows = [window for window in windows if len(window) > 1]
    targets = torch.tensor([token for window in windows for token in window[1:]])
    actual = torch.cat(float64_log_probs(tmp_path / "restored", windows))
    expected = torch.cat(float64_log_probs(dense, windows))
    divergence = (expected.exp() * (expected - actual)).sum(-1).sort().values

    result = json_of("eval", packed, "--reference", dense, "--dataset", text_file, "--seqlen", "64")
    assert result["tokens"] == len(targets) and result["seqlen"] == 64

    def perplexity(log_probs):
        return float(torch.exp(-log_probs.gather(1, targets[:, None]).mean()))

    assert result["perplexity"] == pytest.approx(perplexity(actual), rel=1e-4)
    assert result["reference_perplexity"] == pytest.approx(perplexity(expected), rel=1e-4)
    assert result["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    # at least 99 of 100 tokens are at most at the percentile
    rank = -(-99 * len(divergence) // 100) - 1
    assert result["kl_p99"] == pytest.approx(float(divergence[rank]), rel=1e-3)
    # where two tokens are as likely as each other, rounding decides which one is first
    ties = sum(int((p.topk(2).values.diff().abs() < 1e-3).sum()) for p in (actual, expected))
    agreement = (actual.argmax(-1) == expected.argmax(-1)).double().mean()
    assert ties < 0.02 * len(targets)
    assert result["top1_agreement"] == pytest.approx(float(agreement), abs=(ties + 0.5) / len(targets))
    assert 0 < result["kl_mean"] < result["kl_p99"] and result["top1_agreement"] < 1


def test_eval_without_a_reference(json_of, done, quantized, text_file):
    result = json_of("eval", quantized, "--dataset", text_file, "--num-tokens", "40")
    assert result["kl_mean"] is None and result["reference"] is None
    assert result["tokens"] == 39 and 1 < result["perplexity"] < 1e5
    out = done("eval", quantized, "--dataset", text_file, "--num-tokens", "40").out
    assert f"{result['perplexity']:.3f}" in out and "39 tokens" in out


def test_eval_for_people_shows_both_models(done, quantized, chat_model, text_file, monkeypatch):
    monkeypatch.chdir(quantized.parent)  # short names: they share a line
    options = ["--dataset", text_file, "--num-tokens", "40"]
    out = done("eval", quantized.name, "--reference", chat_model.name, *options).out
    assert out.splitlines()[0].split() == [quantized.name, chat_model.name] and "top-1 agreement" in out


def test_eval_of_a_folder_with_brackets(done, quantized, tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quantized, tmp_path / "x[/b]")
    assert "x[/b]" in done("eval", "x[/b]", "--dataset", text_file, "--num-tokens", "40").out


def test_eval_on_the_standard_library(json_of, quantized):
    result = json_of("eval", quantized, "--num-tokens", "60")
    assert (result["dataset"], result["tokens"]) == ("stdlib", 59)


def test_windows_are_no_longer_than_the_context(json_of, quantized, text_file):
    assert json_of("eval", quantized, "--dataset", text_file)["seqlen"] == 256


# generate


def test_generate_json(json_of, quantized):
    result = json_of("generate", quantized, "--prompt", "the fox", "--max-new-tokens", "8")
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    assert result["prompt"] == "the fox" and result["model"] == str(quantized)
    assert result["prompt_tokens"] == len(tokenizer("the fox")["input_ids"]) and result["tokens"] <= 8
    ids = tokenizer("the fox", return_tensors="pt")
    greedy = lowbit.load(quantized).generate(**ids, max_new_tokens=8, do_sample=False)[0, result["prompt_tokens"] :]
    assert result["text"] == tokenizer.decode(greedy, skip_special_tokens=True)


def test_sampling_is_repeatable_with_a_seed(json_of, quantized):
    def sampled(seed):
        return json_of("generate", quantized, "--prompt", "the fox", "--max-new-tokens", "24",
                       "--temperature", "1.2", "--top-p", "0.95", "--seed", str(seed))["text"]  # fmt: skip

    first = sampled(7)
    assert sampled(7) == first != sampled(8)


def test_text_streams_to_standard_output(done, json_of, quantized):
    options = ["generate", "--model", quantized, "--prompt", "the fox", "--max-new-tokens", "8"]
    outcome = done(*options)
    assert outcome.out == "the fox" + json_of(*options)["text"] + "\n"
    assert "8 tokens" in outcome.err


def test_prompt_from_standard_input(json_of, quantized, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox"))
    from_pipe = json_of("generate", quantized, "--prompt", "-", "--max-new-tokens", "4")
    assert from_pipe["text"] == json_of("generate", quantized, "--prompt", "the fox", "--max-new-tokens", "4")["text"]


@pytest.mark.parametrize("backend", ["torch_cpu", "reference"])
def test_generate_on_a_backend(json_of, quantized, backend):
    result = json_of("generate", quantized, "-p", "the fox", "--max-new-tokens", "4", "--backend", backend,
                     "--dtype", "bfloat16")  # fmt: skip
    assert result["tokens"] == 4


# Real models


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.skipif(not (STORIES / "model.safetensors").is_file(), reason=f"no {STORIES}")
def test_a_real_model_still_tells_a_story(json_of, tmp_path, bits):
    """stories260K: MLP width 172, which no group of 16 or more divides."""
    report = json_of("quantize", STORIES, "-o", tmp_path / "out", "--bits", str(bits), "--group-size", "32")
    assert len(report["fallbacks"]) == 5 and all("down_proj" in name for name in report["fallbacks"])
    (tmp_path / "story.txt").write_text(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big red ball. She wanted to play with it, but her mom said it was time to go home.\n"
    )
    result = json_of("eval", tmp_path / "out", "--reference", STORIES, "--dataset", tmp_path / "story.txt")
    assert result["kl_mean"] < {4: 0.1, 8: 1e-3}[bits] and result["top1_agreement"] > {4: 0.75, 8: 0.95}[bits]
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel={4: 0.2, 8: 0.01}[bits])
    story = json_of("generate", tmp_path / "out", "--prompt", "Once upon a time", "--max-new-tokens", "60")["text"]
    assert {"was", "a", "to"} <= set(story.split())


@pytest.mark.skipif(not (REFERENCE / "model.safetensors").is_file(), reason="the embedded model is not trained yet")
def test_the_embedded_model(json_of, tmp_path):
    json_of("quantize", "reference", "-o", tmp_path / "out")
    assert json_of("inspect", tmp_path / "out")["bits_per_weight"] < json_of("inspect", "reference")["bits_per_weight"]
    result = json_of("eval", tmp_path / "out", "--reference", "reference", "--num-tokens", "2000")
    assert 0 < result["kl_mean"] < 0.3 and result["top1_agreement"] > 0.7
    prompt = "def main():\n    import "
    assert json_of("generate", "--model", "reference", "--prompt", prompt, "--max-new-tokens", "8")["text"].strip()


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell):
    """As the script that --show-completion prints asks for it."""
    script = subprocess.run(
        [sys.executable, "-m", "lowbit", "--show-completion", shell], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert script.returncode == 0 and "_LOWBIT_COMPLETE" in script.stdout, script.stderr
    for words, expected in (("lowbit qu", "quantize"), ("lowbit convert --form", "--format")):
        asked = {"_LOWBIT_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")),
                 "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
                 "_TYPER_COMPLETE_WORD_TO_COMPLETE": words.split()[-1]}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "lowbit"], capture_output=True, text=True, env={**ENVIRONMENT, **asked}
        )
        assert expected in done.stdout, done
