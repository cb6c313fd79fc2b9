"""A model with its tokenizer, and generation that hands out text as it comes."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lowbit.discovery import require_language_head
from lowbit.errors import InputError, first_line
from lowbit.folders.locate import load_config, resolve
from lowbit.generation.draft import Draft, check_same_tokens
from lowbit.generation.loop import Decoder
from lowbit.generation.stats import Stats
from lowbit.generation.text import TextStream
from lowbit.hf import check_vocabulary, load
from lowbit.options import SamplingOptions, SessionOptions, SourceOptions, TokenOptions, takes_options
from lowbit.text.chat_template import chat_ids

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Generation:
    """The text that was generated and the figures of the run. interrupted: by Ctrl-C."""

    text: str
    stats: Stats
    interrupted: bool = False

    @property
    def tokens(self) -> int:
        return self.stats.new_tokens

    @property
    def prompt_tokens(self) -> int:
        return self.stats.prompt_tokens

    @property
    def seconds(self) -> float:
        return self.stats.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Session:
    """A loaded model that completes text and answers chats. What a prompt shares with the text before it stays in the
    cache. options: those of `Decoder`."""

    def __init__(self, model, tokenizer, **options):
        self.model, self.tokenizer = model, tokenizer
        self.decoder = Decoder(model, **options)

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its answer may have; None for any number."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        draft = self.decoder.draft
        return limit if draft is None else draft.context_length(limit)

    def encode(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not ids.shape[1]:
            raise InputError("the prompt is empty: expected some text")
        return ids

    def encode_chat(self, messages: list[dict]) -> torch.Tensor:
        """messages: [{"role": ..., "content": ...}] through the chat template; plain lines without one.

        Raises InputError where the template does not take them."""
        if self.tokenizer.chat_template is None:
            return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:")
        ids = chat_ids(self.tokenizer, messages, "this conversation", add_generation_prompt=True)
        if not ids:
            raise InputError("the chat template of the tokenizer makes nothing of this conversation: expected text")
        return torch.tensor([ids])

    @takes_options
    def generate(
        self,
        ids: torch.Tensor,
        *,
        sampling: SamplingOptions,
        on_text: Callable[[str], None] = lambda text: None,
        **options,
    ) -> Generation:
        """Continue a prompt up to the first of the strings `stop`, which is left out, or an end token. Ctrl-C ends the
        answer, which is returned as far as it came.

        Args:
            ids: Integers [1, T].
            on_text: Called with each piece of text.
            **options: Others of `Decoder.generate`, such as prefill_chunk.
        """
        self._check_length(ids.shape[1], sampling.max_new_tokens)
        check_vocabulary(self.model, ids)
        stream, interrupted = TextStream(self.tokenizer, sampling.stop or (), on_text), False
        tokens = {each.name: getattr(sampling, each.name) for each in fields(TokenOptions)}
        try:
            self.decoder.generate(ids, **tokens, on_token=lambda made: stream.put(made[0]), **options)
        except KeyboardInterrupt:
            interrupted = True
        stream.finish()
        return Generation(stream.text, self.decoder.stats, interrupted)

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        limit = self.context_length
        if limit is not None and prompt_tokens + new_tokens > limit:
            raise InputError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's context of {limit}: "
                "shorten the prompt or lower --max-new-tokens"
            )


def load_tokenizer(model: str | Path, trust_remote_code: bool = False):
    folder = resolve(model)
    load_config(folder, trust_remote_code)  # the tokenizer needs it too, and would be blamed for it
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers stumbles over comes from the files of this folder
        raise InputError(f"cannot load the tokenizer of {folder}: {_useful(error, folder)}") from None


def _useful(error: Exception, folder: Path) -> str:
    """What transformers says of a tokenizer that does not load: the reason is often a list over several lines."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return f"the folder holds none of {', '.join(_TOKENIZER_FILES)} (copy them from the original model)"
    words = " ".join(str(error).split())
    return words if 0 < len(words) <= 400 else first_line(error)


@takes_options
def open_session(model: str | Path, *, session: SessionOptions, source: SourceOptions, **kwargs) -> Session:
    """Load a model and its tokenizer.

    Drafts come from another model, which is loaded the same way, or from the text so far (see `Draft`).

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference".
        **kwargs: Those of `lowbit.load`.

    Raises:
        InputError: The model has no language head, its tokenizer does not load, or the assistant has another.
    """
    folder, trust = resolve(model, source.revision), source.trust_remote_code
    require_language_head(load_config(folder, trust), folder, trust)
    tokenizer = load_tokenizer(folder, trust)
    draft = None if session.prompt_lookup is None else Draft(lookup=session.prompt_lookup)
    if session.assistant is not None:
        _check_tokenizers(folder, tokenizer, resolve(session.assistant), trust)
        assistant = load(session.assistant, trust_remote_code=trust, **kwargs)
        draft = Draft(assistant=assistant, lookup=session.prompt_lookup)
    loaded = load(folder, trust_remote_code=trust, **kwargs)
    return Session(loaded, tokenizer, int8_cache=session.kv_cache == "int8", compile=session.compile, draft=draft)


def _check_tokenizers(folder: Path, tokenizer, assistant: Path, trust_remote_code: bool) -> None:
    """Before any weights are loaded. transformers itself only compares how many tokens there are."""
    check_same_tokens(load_config(folder, trust_remote_code), load_config(assistant, trust_remote_code))
    if load_tokenizer(assistant, trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"the tokenizer of {assistant} is another than that of {folder}: expected the same tokens")
