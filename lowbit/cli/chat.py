"""lowbit chat"""

import sys
from typing import Annotated

import typer

from lowbit.cli.common import (
    BackendOption,
    DeviceMapOption,
    DtypeOption,
    KvCacheOption,
    LmHeadOption,
    LmHeadSchemeOption,
    ModelArgument,
    ModelOption,
    RevisionOption,
    TrustOption,
    checked_dtype,
    checked_kv_cache,
    console,
    default_device_map,
    head_scheme,
    notes,
    one_model,
    quiet_transformers,
)  # fmt: skip
from lowbit.cli.generate import NewTokensOption, SeedOption, TemperatureOption, TopPOption
from lowbit.errors import LowbitError

HELP = """!help         this text
!clear        forget the conversation
!save [FILE]  write the conversation as JSON (default: chat.json)
!exit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    max_new_tokens: NewTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.95,
    seed: SeedOption = None,
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    backend: BackendOption = None,
    lm_head: LmHeadOption = False,
    lm_head_scheme: LmHeadSchemeOption = None,
    kv_cache: KvCacheOption = "full",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
):
    """Talk to a model: multi-turn, streaming, through its chat template. Type !help for the commands."""
    from lowbit.generation import open_session

    name, dtype = one_model(model, model_option), checked_dtype(dtype)
    quiet_transformers()
    session = open_session(
        name,
        dtype=dtype,
        device_map=default_device_map(device_map),
        backend=backend,
        lm_head=head_scheme(lm_head, lm_head_scheme),
        kv_cache=checked_kv_cache(kv_cache),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    notes.print(f"{name}: !help for commands, !exit or Ctrl-D to leave", markup=False)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    Conversation(session, system, sampling).run()


class Conversation:
    """The messages so far, and the loop that reads a line and answers it."""

    def __init__(self, session, system: str | None, sampling: dict):
        self.session, self.sampling = session, sampling
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)

    def run(self) -> None:
        while True:
            try:
                line = console.input("> " if sys.stdin.isatty() else "").strip()
                line.encode()
            except EOFError:
                return
            except UnicodeError:
                notes.print("that is not UTF-8 text")
                continue
            except KeyboardInterrupt:
                notes.print("\n(!exit or Ctrl-D to leave)")
                continue
            if line.startswith("!"):
                if not self.command(line):
                    return
            elif line:
                try:
                    self.answer(line)
                except KeyboardInterrupt:  # before the first token, or between two lines of output
                    notes.print("\n[stopped]")

    def command(self, line: str) -> bool:
        """Run a ! command; False ends the chat."""
        word, _, rest = line.partition(" ")
        if word in ("!exit", "!quit"):
            return False
        if word == "!clear":
            self.messages = list(self.start)
            notes.print("forgotten")
        elif word == "!save":
            self.save(rest.strip() or "chat.json")
        elif word == "!help":
            notes.print(HELP, markup=False)
        else:
            notes.print(f"no command {word}", HELP, sep="\n", markup=False)
        return True

    def save(self, path: str) -> None:
        import json

        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self.messages, file, indent=2)
        except OSError as error:
            notes.print(f"cannot write {path}: {error.strerror}", markup=False)
        else:
            notes.print(f"saved to {path}", markup=False)

    def answer(self, line: str) -> None:
        messages = [*self.messages, {"role": "user", "content": line}]
        try:
            ids = self.session.encode_chat(messages)
            result = self.session.generate(ids, **self._fitting(ids), on_text=_show)
        except LowbitError as error:
            notes.print(f"{error} (!clear forgets the conversation)", markup=False)
            return
        _show("\n")
        stopped = ", stopped" if result.interrupted else ""
        notes.print(
            f"[{result.tokens} tokens, {result.tokens_per_second:.1f} per second{stopped}]", style="dim", markup=False
        )
        self.messages = [*messages, {"role": "assistant", "content": result.text}]

    def _fitting(self, ids) -> dict:
        """The answer may be as long as the context allows."""
        limit = self.session.context_length
        room = self.sampling["max_new_tokens"] if limit is None else limit - ids.shape[1]
        return {**self.sampling, "max_new_tokens": max(1, min(self.sampling["max_new_tokens"], room))}


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
