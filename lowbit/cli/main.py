"""Entry point: finds the command in the table, runs it, turns errors into one line and an exit code."""

import logging
import os
import signal
import sys
from importlib import import_module

import typer
from typer.core import TyperGroup

from lowbit import __version__
from lowbit.errors import LowbitError

# What typer turns a KeyboardInterrupt into
_INTERRUPTED = 130

# `kill`, and a terminal that is closed
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

# name -> (module:function, one line of help). The help stands here so that `lowbit --help` imports nothing.
COMMANDS = {
    "plan": ("lowbit.cli.plan:plan", "Show what quantizing a model would give and take, from its headers."),
    "quantize": ("lowbit.cli.quantize:quantize", "Quantize a model into a folder that transformers and vLLM load."),
    "convert": ("lowbit.cli.convert:convert", "Write a quantized model in another format, the same numbers."),
    "dequantize": ("lowbit.cli.dequantize:dequantize", "Write a quantized model as a plain one."),
    "verify": ("lowbit.cli.verify:verify", "Check a quantized folder before it is published."),
    "inspect": ("lowbit.cli.inspect:inspect", "Show what is quantized and how, from headers alone."),
    "eval": ("lowbit.cli.eval:evaluate", "Measure perplexity, and KL divergence to a reference model."),
    "report": ("lowbit.cli.report:report", "Show what a quantize run did as one HTML page."),
    "generate": ("lowbit.cli.generate:generate", "Complete a prompt."),
    "chat": ("lowbit.cli.chat:chat", "Talk to a model."),
    "bench": ("lowbit.cli.bench:bench", "Measure how fast a model runs here, beside others."),
    "push": ("lowbit.cli.push:push", "Write the model card and upload a quantized folder to the Hub."),
    "tune": ("lowbit.cli.tune:tune", "Find the fastest kernels for a model on this GPU."),
    "doctor": ("lowbit.cli.doctor:doctor", "Show versions, devices, and which backends run here."),
}


def _spelling(token: str) -> str:
    """--group_size is --group-size."""
    return token.replace("_", "-")


def load_command(name: str):
    """The command as typer builds it from its function."""
    module, attribute = COMMANDS[name][0].split(":")
    function = getattr(import_module(module), attribute)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, help=function.__doc__, context_settings={"token_normalize_func": _spelling})(function)
    return typer.main.get_command(app)


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        return load_command(name) if name in COMMANDS else None

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(cls=_LazyGroup, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(value: bool):
    if value:
        print(f"lowbit {__version__}")
        raise typer.Exit


@app.callback(help="Quantize, run, check and publish LLMs with low-bit weights.")
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
):
    level = os.environ.get("LOWBIT_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(format="lowbit: %(message)s")
    for name in ("lowbit", "lowbit_kernels"):
        logging.getLogger(name).setLevel(level if level in logging.getLevelNamesMapping() else "WARNING")


def main() -> None:
    """Exit codes: 0 done, 1 could not do it, 2 wrong usage."""
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    try:
        app(prog_name="lowbit")
    except LowbitError as error:
        print(f"lowbit: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as exit:
        if exit.code == _INTERRUPTED:
            print("lowbit: interrupted, nothing was left half-made", file=sys.stderr)
            sys.exit(1)
        raise
    except BrokenPipeError:
        # the reader of our output went away (`lowbit inspect ... | head`); nothing to tell anyone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _terminate(signum, frame):
    """`kill` and a closed terminal end a run, staged folders are removed. A KeyboardInterrupt only stops an answer."""
    for number in (*_ENDING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(_INTERRUPTED)
