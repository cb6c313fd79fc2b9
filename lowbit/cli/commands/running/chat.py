"""lowbit chat"""

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.commands.running.generate import (
    PREFILL_CHUNK,
    RunningOptions,
    StatsOption,
    sampling_keywords,
    show_stats,
)
from lowbit.cli.common import HeadChoice, ModelArgument, ModelOption, one_model
from lowbit.cli.terminal import console, notes
from lowbit.cli.together import refuse_together
from lowbit.errors import LowbitError, OutputError
from lowbit.guards.safe_files import write_whole
from lowbit.options import SamplingOptions, like
from lowbit.system.read_ahead import read_ahead

HELP = (
    "!help         this text",
    "!clear        forget the conversation",
    "!save [FILE]  write the conversation as JSON (default: chat.json)",
    "!stats        times and rates of the last answer, and what made it",
    "!exit         leave (so does Ctrl-D); Ctrl-C stops an answer",
)


class Context(StrEnum):
    """What happens when a conversation has filled the context of the model."""

    stop = "stop"
    slide = "slide"


@dataclass(frozen=True)
class ChatSamplingOptions(SamplingOptions):
    """The same, with what conversations usually want."""

    max_new_tokens: int = like(SamplingOptions, "max_new_tokens", 512)
    temperature: float = like(SamplingOptions, "temperature", 0.7)
    top_p: float = like(SamplingOptions, "top_p", 0.95)


def chat(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    context: Annotated[
        Context, typer.Option(help="When it is full: stop, or slide and drop the oldest turns.")
    ] = Context.stop,
    *,
    sampling: ChatSamplingOptions,
    running: RunningOptions,
    head: HeadChoice,
    stats: StatsOption = False,
):
    """Talk to a model: multi-turn, streaming, through its chat template. Type !help for the commands."""
    name, options, head_scheme = one_model(model, model_option), sampling_keywords(sampling), head.scheme()
    running.check()
    refuse_together("lowbit chat")
    read_ahead(Path(name))  # while all else is imported
    session = running.start(name, head_scheme)
    head.tell(session.model, notes.print)
    notes.print(f"{name}: !help for commands, !exit or Ctrl-D to leave")
    options["prefill_chunk"] = running.prefill_chunk or PREFILL_CHUNK
    conversation = Conversation(session, system, options, context is Context.slide, stats)
    conversation.run()
    if conversation.asked and not conversation.answered:
        raise typer.Exit(1)


class Conversation:
    """The messages so far, and the loop that reads a line and answers it.

    options: those of `Session.generate`. slide: leave the oldest turns out of the prompt where it would not fit.
    """

    def __init__(self, session, system: str | None, options: dict, slide: bool = False, stats: bool = False):
        self.session, self.options, self.slide, self.stats = session, options, slide, stats
        self.asked = self.answered = 0
        self.start = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self.turns: list[dict] = []
        self.dropped = 0  # messages of `turns` that the model is not shown any more
        self.last = None

    @property
    def messages(self) -> list[dict]:
        return [*self.start, *self.turns]

    def run(self) -> None:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
                line.encode()
            except EOFError:
                return
            except UnicodeError:
                notes.print("that is not UTF-8 text")
                continue
            except KeyboardInterrupt:
                notes.print("", "(!exit or Ctrl-D to leave)")
                continue
            if line.startswith("!"):
                if not self.command(line):
                    return
            elif line:
                try:
                    self.answer(line)
                except KeyboardInterrupt:  # before the first token, or between two lines of output
                    notes.print("", "[stopped]")

    def command(self, line: str) -> bool:
        """Run a ! command; False ends the chat."""
        word, _, rest = line.partition(" ")
        if word in ("!exit", "!quit"):
            return False
        if word == "!clear":
            self.clear()
            notes.print("forgotten")
        elif word == "!save":
            self.save(rest.strip() or "chat.json")
        elif word == "!stats":
            if self.last is None:
                notes.print("no answer yet")
            else:
                show_stats(self.last)
        elif word == "!help":
            notes.print(*HELP)
        else:
            notes.print(f"no command {word}", *HELP)
        return True

    def save(self, path: str) -> None:
        import json

        try:
            write_whole(Path(path), json.dumps(self.messages, indent=2))
        except OutputError as error:
            notes.print(str(error))
        else:
            notes.print(f"saved to {path}")

    def answer(self, line: str) -> None:
        question = {"role": "user", "content": line}
        self.asked += 1
        try:
            ids, dropped = self._prompt(question)
            room = self._room(ids)
            with console.prose() as show:
                result = self.session.generate(ids, **{**self.options, "max_new_tokens": room}, on_text=show)
        except LowbitError as error:
            notes.print(f"{error} (!clear forgets the conversation)")
            return
        self.answered += 1
        console.print()
        full = result.tokens == room < self.options["max_new_tokens"]
        ending = ", stopped" if result.interrupted else ", the context is full" if full else ""
        notes.print(f"[{result.tokens} tokens, {result.tokens_per_second:.1f} per second{ending}]", style="dim")
        if dropped and not self.dropped:
            notes.print("[the context is full: the oldest turns are dropped from here on]")
        self.last, self.dropped = result.stats, dropped
        if self.stats:
            show_stats(self.last)
        self.turns += [question, {"role": "assistant", "content": result.text}]

    def _prompt(self, question: dict):
        """The ids [1, T] of the conversation and a question, and how many messages were left out: those before, and
        where they are to slide as many of the oldest turns as need be."""
        for dropped in range(self.dropped, len(self.turns) + 1, 2):
            ids = self.session.encode_chat([*self.start, *self.turns[dropped:], question])
            if not self.slide or self._fits(ids):
                break
        return ids, dropped

    def _fits(self, ids) -> bool:
        """Whether there is room for an answer as long as wanted, or else a quarter of the context."""
        limit = self.session.context_length
        return limit is None or limit - ids.shape[1] >= min(self.options["max_new_tokens"], limit // 4)

    def _room(self, ids) -> int:
        """The answer may be as long as the context allows."""
        limit, wanted = self.session.context_length, self.options["max_new_tokens"]
        return wanted if limit is None else max(1, min(wanted, limit - ids.shape[1]))
