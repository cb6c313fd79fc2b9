"""Entry point: finds the command in the table, runs it, turns errors into one line and an exit code."""

import sys

from lowbit.cli.ending import end_on_signals, one_line_errors
from lowbit.cli.streams import dependable_streams

# name -> (module:function, one line of help). The help stands here so that `lowbit --help` imports nothing.
COMMANDS = {
    "plan": ("lowbit.cli.commands.plan:plan", "Show what quantizing a model would give and take, from its headers."),
    "quantize": (
        "lowbit.cli.commands.quantize:quantize",
        "Quantize a model into a folder that transformers and vLLM load.",
    ),
    "convert": ("lowbit.cli.commands.convert:convert", "Write a quantized model in another format, the same numbers."),
    "dequantize": ("lowbit.cli.commands.dequantize:dequantize", "Write a quantized model as a plain one."),
    "merge": ("lowbit.cli.commands.merge:merge", "Merge a LoRA adapter into a model, quantized or not."),
    "verify": ("lowbit.cli.commands.verify:verify", "Check a quantized folder before it is published."),
    "inspect": ("lowbit.cli.commands.inspect:inspect", "Show what is quantized and how, from headers alone."),
    "eval": ("lowbit.cli.commands.eval:evaluate", "Measure perplexity, and KL divergence to a reference model."),
    "report": ("lowbit.cli.commands.report:report", "Show what a quantize run did as one HTML page."),
    "generate": ("lowbit.cli.commands.running.generate:generate", "Complete a prompt."),
    "chat": ("lowbit.cli.commands.running.chat:chat", "Talk to a model."),
    "serve": ("lowbit.cli.commands.running.serve:serve", "Serve a model by OpenAI's API."),
    "bench": ("lowbit.cli.commands.bench:bench", "Measure how fast a model runs here, beside others."),
    "push": ("lowbit.cli.commands.push:push", "Write the model card and upload a quantized folder to the Hub."),
    "tune": ("lowbit.cli.commands.tune:tune", "Find the fastest kernels for a model on this GPU."),
    "doctor": ("lowbit.cli.commands.doctor:doctor", "Show versions, devices, and which backends run here."),
}


def main() -> None:
    """Exit codes: 0 done, 1 could not do it, 2 wrong usage."""
    with dependable_streams(), one_line_errors():
        end_on_signals()
        from lowbit.cli.group import app  # typer: where memory is short this can fail, too

        words = sys.argv[1:]
        if words[:1] == ["help"]:
            words = [*words[1:], "--help"]
        app(words, prog_name="lowbit")


def __getattr__(name: str):
    """`app` and `load_command`, which need typer."""
    from lowbit.cli import group

    if name not in ("app", "load_command"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(group, name)
