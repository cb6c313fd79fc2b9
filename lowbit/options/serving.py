"""Options of the server: where it listens, for whom, and how much it takes on."""

from dataclasses import dataclass

from lowbit.options.keywords import option


@dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, and for whom."""

    host: str = option("127.0.0.1", "Address or name to listen on; one that others can reach needs --api-key.")
    port: int = option(8000, "Port to listen on; 0 takes one that is free.", least=0, most=65535)
    api_key: str | None = option(
        None, "What requests must bring as `Authorization: Bearer KEY` (default: LOWBIT_API_KEY of the environment)."
    )
    name: str | None = option(None, "What requests call the model (default: its Hub id, or the name of its folder).")
    ui: bool = option(False, "Serve a chat page too, at /.")


@dataclass(frozen=True)
class LimitOptions:
    """How much a server takes on."""

    context: int | None = option(
        None, "Tokens of a prompt and its answer together (default: what the model was made for).", least=2
    )
    max_tokens: int = option(2048, "Tokens of an answer at most, and of one whose request names no number.", least=1)
    max_requests: int = option(64, "Requests at once, running and waiting: more are told to come back.", least=1)
    max_body: int = option(2_000_000, "Bytes of a request at most.", least=1)


@dataclass(frozen=True)
class BatchingOptions:
    """How requests share forward passes."""

    slots: int | None = option(
        None,
        "Requests that share the steps of lowbit's loop, each of which joins and leaves between two; 0: none do "
        "(default: 16, fewer where memory is short).",
        least=0,
    )
    continuous_batching: bool = option(False, "Run requests together in transformers' continuous batching instead.")
    cb_block_size: int | None = option(None, "Tokens in a block of its paged cache.", least=1)
    cb_num_blocks: int | None = option(
        None, "Blocks of its paged cache (default: for 65,536 tokens on a CPU, most of the memory on a GPU).", least=1
    )
    cb_max_batch_tokens: int | None = option(None, "Tokens that one of its forward passes runs at most.", least=1)
    cb_max_memory_percent: float | None = option(
        None, "Share of the free memory that its cache may take.", least=0.01, most=1.0
    )
