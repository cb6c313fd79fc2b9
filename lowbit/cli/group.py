"""The command line as typer sees it. Importing this imports typer, and no command."""

import copy
import logging
import os
from importlib import import_module

import typer
from typer.core import TyperGroup

from lowbit import __version__
from lowbit.cli.main import COMMANDS
from lowbit.cli.options import grouped
from lowbit.cli.terminal import console, notes

_SETTINGS = {"help_option_names": ["-h", "--help"]}


def _spelling(token: str) -> str:
    """--group_size is --group-size."""
    return token.replace("_", "-")


def load_command(name: str):
    """The command as typer builds it from its function."""
    module, attribute = COMMANDS[name][0].split(":")
    function = getattr(import_module(module), attribute)
    made = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {**_SETTINGS, "token_normalize_func": _spelling}
    made.command(name, help=function.__doc__, context_settings=settings)(grouped(function))
    command = typer.main.get_command(made)
    version = copy.copy(next(option for option in typer.main.get_command(app).params if option.name == "version"))
    version.expose_value, version.hidden = False, True
    command.params.append(version)
    return command


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        return load_command(name) if name in COMMANDS else None

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    cls=_LazyGroup, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)  # fmt: skip


def _show_version(value: bool):
    if value:
        console.print(f"lowbit {__version__}")
        raise typer.Exit


class _ToNotes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notes.print(self.format(record))


@app.callback(help="Quantize, run, check and publish LLMs with low-bit weights.")
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
):
    level = os.environ.get("LOWBIT_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(format="lowbit: %(message)s", handlers=[_ToNotes()])
    for name in ("lowbit", "lowbit_kernels"):
        logging.getLogger(name).setLevel(level if level in logging.getLevelNamesMapping() else "WARNING")
