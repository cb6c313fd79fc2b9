"""The `lowbit` command. Each subcommand lives in a file of its own, imported when it is called."""

from lowbit.cli.main import main

__all__ = ["main"]
