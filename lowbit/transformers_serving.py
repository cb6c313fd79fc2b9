"""The server of transformers (`transformers serve`), with a model that is loaded already and answers made elsewhere.

All of it is undocumented: the names are in `transformers_api`, and how they hang together is known here alone.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from lowbit.transformers_api import use

# Keywords of build_server -> what answers requests there. Its other handlers are not reached: they get None.
_HANDLERS = {
    "chat_handler": "ChatCompletionHandler",
    "completion_handler": "CompletionHandler",
    "response_handler": "ResponseHandler",
}


_OTHERS = (
    "ModelManager", "GenerationState", "Modality", "build_server", "_StreamError", "get_response_template",
    "response_events_to_chunks",
)  # fmt: skip


class Answers(Protocol):
    """What makes the answers, as the handlers of transformers call it."""

    def init_cb(self, model, gen_config) -> None:
        """Called before each answer."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id: str, response_parser=None) -> tuple:
        """Start an answer to `inputs["input_ids"]` [1, T].

        Returns (an asyncio queue of text, then None, or `stream_error`; what has `total_tokens` and `cancel()`)."""

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id: str) -> tuple:
        """Returns (the text, tokens of the prompt, ids of the answer)."""

    def is_alive(self) -> bool:
        """Whether there will be more answers."""

    def stop(self) -> None:
        """No answer is wanted any more."""


def serving_app(model, processor, name: str, answers: Answers):
    """The FastAPI application of transformers that answers requests for one model, `name`.

    processor: what has `apply_chat_template`, `decode` and the like; a tokenizer, or what behaves as one.

    Raises MissingNameError where anything is gone that requests will need.
    """
    for needed in (*_HANDLERS.values(), *_OTHERS):
        use(needed)

    class Loaded(use("ModelManager")):
        """Of one model: nothing is looked up or downloaded, whatever a request names."""

        def load_model_and_processor(self, *args, **given):
            return model, processor

        def process_model_name(self, model_id: str) -> str:
            return name

        def get_model_modality(self, *args, **given):
            return use("Modality").LLM

        def list_models(self, *args, **given) -> list[dict]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]

        get_gen_models = list_models  # before 5.24

        def shutdown(self) -> None:
            answers.stop()

    class State(use("GenerationState")):
        def use_continuous_batching(self, *args, **given) -> bool:
            return False  # so that prompts come in one form

        def get_manager(self, *args, **given):
            return answers

        def is_cb_alive(self) -> bool:
            return answers.is_alive()

    manager, state = Loaded(), State()
    manager.force_model = name
    build = use("build_server")
    made: dict[str, Any] = {"model_manager": manager, "generation_state": state}
    for keyword, parameter in inspect.signature(build).parameters.items():
        if keyword in _HANDLERS:
            made[keyword] = use(_HANDLERS[keyword])(manager, state)
        elif keyword not in made and parameter.default is parameter.empty:
            made[keyword] = None
    return build(**made)


def events(parser, text: str | None = None) -> list:
    """What a queue takes of an answer that is parsed (calls of tools, reasoning) after `text` has come, at its start
    where that is "", at its end where that is None."""
    if text is None:
        try:
            found = parser.finalize()[1]
        except (ValueError, RuntimeError):  # the answer ended inside a call
            found = []
    else:
        found = parser.feed(text) if text else parser.initial_events
    return use("response_events_to_chunks")(found)


def parses_answers(processor, model) -> bool:
    """Whether transformers looks for calls of tools and reasoning in the answers of a model."""
    return use("get_response_template")(processor, model) is not None


def stream_error(words: str):
    """What a queue takes where an answer has failed: transformers puts it between quotes, as it is."""
    return use("_StreamError")(words.replace("\\", "/").replace('"', "'"))


def page_size(sizes: dict[str, Any]) -> int:
    """Tokens in a block of the paged cache, by the fields of its config that are given."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(**sizes)
    named = [getattr(config, name, None) for name in ("block_size", "page_size")]  # the older name
    return next(size for size in named if size is not None)


def start_batching(model, generation_config, sizes: dict[str, Any]):
    """transformers' continuous batching of a model, running in a thread of its own. sizes: fields of its config."""
    from transformers import ContinuousBatchingConfig

    batching = model.init_continuous_batching(
        generation_config=generation_config,
        continuous_batching_config=ContinuousBatchingConfig(per_request_processors=True, **sizes),
    )
    batching.start()
    return batching


def fatal_error(batching) -> BaseException | str | None:
    """What has ended continuous batching, None while it runs."""
    return batching.background_thread_status.fatal_error


OnTokens = Callable[[list[int], bool, str | None], None]


def submit(batching, ids: list[int], request_id: str, on_tokens: OnTokens, **given) -> bool:
    """Add a request; on_tokens(all tokens so far, whether that was all, what went wrong) is called in the event loop
    that runs now. given: max_new_tokens, eos_token_id, and how tokens are chosen. Returns whether it was taken."""
    batching.register_result_handler(
        request_id, lambda out: on_tokens(list(out.generated_tokens), out.is_finished(), out.error)
    )
    return batching.add_request(ids, request_id=request_id, streaming=True, **given) is not None
