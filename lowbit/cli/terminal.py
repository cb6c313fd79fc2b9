"""What commands show: lines, tables, progress. All of it is data, which no markup or escape sequence gets out of.

Nothing else in lowbit.cli writes to a stream, so no command has to think of what a name or a text may hold.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import cached_property

from lowbit.guards import escape

# Without a terminal, progress is a line every so many seconds
_SECONDS_BETWEEN_LINES = 60.0


class Terminal:
    """Standard output, which carries the result, or standard error, for progress and notes."""

    def __init__(self, stderr: bool = False):
        self._stderr = stderr

    @property
    def stream(self):
        return sys.stderr if self._stderr else sys.stdout

    @cached_property
    def _console(self):
        from rich.console import Console

        return Console(stderr=self._stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def print(self, *lines, style: str | None = None) -> None:
        """Each of `lines` is one line, whatever it holds, or a `table`."""
        from rich.text import Text

        for line in lines or ("",):
            self._console.print(Text(escape.terminal(line)) if isinstance(line, str) else line, style=style)

    def write(self, text: str) -> None:
        """Text of several lines, without what a terminal would take for commands."""
        self.stream.write(escape.prose(text))
        self.stream.flush()

    @contextmanager
    def prose(self):
        """Yields what shows the next piece of a text that comes in pieces."""
        shown = escape.Prose()

        def show(text: str) -> None:
            self.stream.write(text)
            self.stream.flush()

        try:
            yield lambda piece: show(shown.put(piece))
        finally:
            show(shown.finish())


console, notes = Terminal(), Terminal(stderr=True)


def table(*columns: str, title: str | None = None):
    """Left-aligned first column, the others right-aligned."""
    from rich.table import Table
    from rich.text import Text

    class Cells(Table):
        def add_row(self, *cells: str) -> None:
            super().add_row(*(Text(escape.terminal(cell)) for cell in cells))

    made = Cells(title=title and Text(escape.terminal(title)), title_justify="left", box=None, pad_edge=False,
                 padding=(0, 2, 0, 0))  # fmt: skip
    for index, column in enumerate(columns):
        header = Text(escape.terminal(column))
        made.add_column(header, justify="left" if index == 0 else "right", overflow="fold")
    return made


def print_json(data) -> None:
    """All that is no ASCII is spelled out, so the text is exact and safe to look at."""
    console.stream.write(json.dumps(data, indent=2) + "\n")


def show_names(title: str, names: dict[str, str], shown: int = 12) -> None:
    """A title and a line for each name, the first ones where there are many."""
    if not names:
        return
    console.print(title, *(f"  {name}: {what}" for name, what in list(names.items())[:shown]))
    if len(names) > shown:
        console.print(f"  and {len(names) - shown} more (--json has all)")


@contextmanager
def progress(label: str, total: float, quiet: bool = False):
    """A bar with the time left on standard error, or a line every minute where that is no terminal.

    Yields `advance(steps, note)`."""
    if quiet or not notes.is_terminal:
        yield _Lines(label, total, quiet).advance
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=notes._console, transient=True) as bar:
        task = bar.add_task(escape.terminal(label), total=total, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=escape.terminal(note))


class _Lines:
    """Progress as lines, at most one in `_SECONDS_BETWEEN_LINES`."""

    def __init__(self, label: str, total: float, quiet: bool):
        self.label, self.total, self.quiet = label, max(total, 1e-9), quiet
        self.done, self.started = 0.0, time.monotonic()
        self.last = self.started

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.done += steps
        now = time.monotonic()
        if self.quiet or now - self.last < _SECONDS_BETWEEN_LINES:
            return
        self.last = now
        minutes = (now - self.started) / 60
        share = min(self.done / self.total, 1.0)
        notes.print(f"{self.label}: {share:.0%} after {minutes:.0f} min" + (f", {note}" if note else ""))


@contextmanager
def status(quiet: bool = False):
    """Yields what shows, in place of the line before, what runs now; each is a line of its own without a terminal."""
    if quiet or not notes.is_terminal:
        yield (lambda line: None) if quiet else notes.print
        return
    from rich.text import Text

    with notes._console.status("") as shown:
        yield lambda line: shown.update(Text(escape.terminal(line)))


@contextmanager
def counted_progress(label: str, quiet: bool):
    """Yields `start(total) -> advance(name)`: a progress bar whose length is known only once work begins."""
    with ExitStack() as stack:

        def on_start(total: int) -> Callable[[str], None]:
            advance = stack.enter_context(progress(label, total, quiet))
            return lambda name: advance(1, name)

        yield on_start
