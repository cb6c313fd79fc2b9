"""lowbit generate"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import (
    HeadChoice,
    JsonOption,
    ModelArgument,
    ModelOption,
    checked_dtype,
    checked_kv_cache,
    default_device_map,
    heavy_imports,
    one_model,
)
from lowbit.cli.terminal import console, notes, print_json, table
from lowbit.cli.together import one_voice, refuse_together, shared_plan
from lowbit.errors import InputError, UsageError
from lowbit.options import (
    DeviceOptions,
    SamplingOptions,
    SessionOptions,
    ShareOptions,
    SourceOptions,
    keywords,
    option,
)
from lowbit.system.read_ahead import read_ahead

PREFILL_CHUNK = 1024
StatsOption = Annotated[bool, typer.Option("--stats", help="Show times, rates, and what made the tokens.")]


def sampling_keywords(sampling: SamplingOptions) -> dict:
    """Those of `Session.generate`. Raises UsageError."""
    if sampling.stop and "" in sampling.stop:
        raise UsageError("--stop is empty: expected some text")
    return {**keywords(sampling), "stop": sampling.stop or []}


@dataclass(frozen=True)
class RunningOptions(SourceOptions, DeviceOptions, ShareOptions, SessionOptions):
    """What runs a model, and how."""

    prefill_chunk: int | None = option(None, f"Prompt tokens to run at once (default {PREFILL_CHUNK}).", least=1)

    def check(self) -> None:
        """Raise UsageError for what cannot be; drafts are checked in `model.generate`, which has none of the rest."""
        shared_plan(self.tp_plan)
        checked_dtype(self.dtype)
        checked_kv_cache(self.kv_cache)
        drafts = {"--assistant": self.assistant, "--prompt-lookup": self.prompt_lookup}
        wanted = [flag for flag, value in drafts.items() if value is not None]
        if len(wanted) > 1:
            raise UsageError("--assistant and --prompt-lookup: pass one of them")
        others = {
            "--kv-cache int8": self.kv_cache == "int8",
            "--compile": self.compile,
            "--prefill-chunk": self.prefill_chunk,
        }
        for flag, given in others.items():
            if wanted and given:
                raise UsageError(
                    f"{flag} does not go with {wanted[0]}, which runs in transformers' assisted generation"
                )

    def start(self, model: str, head: str | None):
        """The session of a model, with its output embedding as `lowbit.load` has lm_head=head."""
        with heavy_imports():
            from lowbit.generation import open_session

        how = {name: value for name, value in keywords(self).items() if name != "prefill_chunk"}
        plan = shared_plan(self.tp_plan)
        device_map = default_device_map(self.device_map) if plan is None else self.device_map
        return open_session(model, **{**how, "device_map": device_map, "tp_plan": plan}, lm_head=head)


def _text_of(prompt: str) -> str:
    """The prompt that an argument is, or that standard input holds: without the newline that ends its last line."""
    try:
        text = sys.stdin.read().removesuffix("\n").removesuffix("\r") if prompt == "-" else prompt
        text.encode()
    except UnicodeError:
        raise InputError("the prompt is not UTF-8 text") from None
    return text


def show_stats(stats) -> None:
    """The figures of `lowbit.generation.Stats`, on standard error."""
    shown = table("", "tokens", "seconds", "per second")
    fed = stats.prompt_tokens - stats.reused_tokens
    shown.add_row("prompt", str(fed), f"{stats.prefill_seconds:.3f}", f"{stats.prefill_tokens_per_second:.1f}")
    if stats.reused_tokens:
        shown.add_row("in the cache", str(stats.reused_tokens), "", "")
    if stats.setup_seconds >= 0.001:
        shown.add_row("setting up", "", f"{stats.setup_seconds:.3f}", "")
    shown.add_row(
        "answer", str(stats.new_tokens), f"{stats.decode_seconds:.3f}", f"{stats.decode_tokens_per_second:.1f}"
    )
    notes.print(shown)
    if stats.drafted_tokens:
        share = 100 * stats.accepted_tokens / stats.drafted_tokens
        notes.print(f"accepted {stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens ({share:.0f} %)")
    notes.print(f"by {stats.path}{f': {stats.why}' if stats.why else ''}")
    notes.print(f"inputs of products: {stats.inputs}")


def generate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[
        str,
        typer.Option("--prompt", "-p", help="Text to continue; - reads it from standard input.", show_default=False),
    ] = ...,
    *,
    sampling: SamplingOptions,
    running: RunningOptions,
    head: HeadChoice,
    stats: StatsOption = False,
    json: JsonOption = False,
):
    """Complete a prompt. The text streams to standard output, the statistics to standard error."""
    name, how, head_scheme = one_model(model, model_option), sampling_keywords(sampling), head.scheme()
    running.check()
    read_ahead(Path(name))  # while all else is imported
    if prompt == "-":
        refuse_together("--prompt -, standard input,")
    prompt = _text_of(prompt)
    with one_voice():
        _complete(name, prompt, how, running, head, head_scheme, stats, json)


def _complete(name: str, prompt: str, how: dict, running: RunningOptions, head, head_scheme, stats, json) -> None:
    session = running.start(name, head_scheme)
    if not json:
        head.tell(session.model, notes.print)
    ids = session.encode(prompt)
    with nullcontext(lambda text: None) if json else console.prose() as show:
        show(prompt)
        result = session.generate(ids, **how, prefill_chunk=running.prefill_chunk or PREFILL_CHUNK, on_text=show)
    if json:
        print_json(
            {"model": name, "prompt": prompt, "text": result.text, "tokens": result.tokens,
             "prompt_tokens": result.prompt_tokens, "seconds": result.seconds, "stats": result.stats.as_dict()}
        )  # fmt: skip
    else:
        console.print()
        notes.print(f"[{result.tokens} tokens, {result.tokens_per_second:.1f} per second]")
        if stats:
            show_stats(result.stats)
    if result.interrupted:
        raise typer.Exit(1)
