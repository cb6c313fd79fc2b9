"""A model with its tokenizer, and generation that hands out text as it comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer

from lowbit.errors import InputError, first_line
from lowbit.generation.kv_int8 import Int8StaticCache
from lowbit.hf import check_vocabulary, load
from lowbit.sources import load_config, resolve


@dataclass(frozen=True)
class Generation:
    """The text that was generated, its token count, the prompt's, and seconds of wall time for all of it."""

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class _Callback(TextStreamer):
    """Passes finished pieces of text to a function and keeps the token ids."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.on_text, self.ids = on_text, []

    def put(self, value):
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            self.ids += value.reshape(-1).tolist()
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        if text:
            self.on_text(text)


class Session:
    """A loaded model that completes text and answers chats."""

    def __init__(self, model, tokenizer, kv_cache: str = "full"):
        self.model, self.tokenizer, self.kv_cache = model, tokenizer, kv_cache

    @property
    def context_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not ids.shape[1]:
            raise InputError("the prompt is empty: expected some text")
        return ids

    def encode_chat(self, messages: list[dict]) -> torch.Tensor:
        """messages: [{"role": ..., "content": ...}] through the chat template; plain lines without one."""
        if self.tokenizer.chat_template is None:
            return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:")
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]

    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Generation:
        """Continue ids [1, T]. temperature 0 is greedy. Ctrl-C ends the answer, which is returned as far as it came."""
        self._check_length(ids.shape[1], max_new_tokens)
        check_vocabulary(self.model, ids)
        if seed is not None:
            torch.manual_seed(seed)
        sampling = (
            {"do_sample": True, "temperature": max(temperature, 1e-4), "top_p": top_p}
            if temperature > 0
            else {"do_sample": False}
        )
        ids = ids.to(self.model.device)
        streamer = _Callback(self.tokenizer, on_text)
        started, interrupted = time.perf_counter(), False
        try:
            with torch.inference_mode():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self._pad_token(),
                    streamer=streamer,
                    **self._cache(ids.shape[1] + max_new_tokens),
                    **sampling,
                )
        except KeyboardInterrupt:
            interrupted = True
        except RuntimeError as error:
            if "nan" not in str(error):
                raise
            raise InputError(
                "the model gives NaN or infinite logits: its weights are damaged or its dtype overflows (try bfloat16)"
            ) from None
        text = self.tokenizer.decode(streamer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(text, len(streamer.ids), ids.shape[1], time.perf_counter() - started, interrupted)

    def _cache(self, length: int) -> dict:
        if self.kv_cache == "full":
            return {}
        return {"past_key_values": Int8StaticCache(self.model.config, length)}

    def _pad_token(self) -> int | None:
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos

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
        raise InputError(f"cannot load the tokenizer of {folder}: {first_line(error)}") from None


def open_session(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    kv_cache: str = "full",
    **kwargs,
) -> Session:
    """Load a model (keywords as in `lowbit.load`) and its tokenizer. kv_cache: "full" or "int8"."""
    folder = resolve(model, revision)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return Session(load(folder, trust_remote_code=trust_remote_code, **kwargs), tokenizer, kv_cache)
