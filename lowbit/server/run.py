"""Running a server: where it listens, and how it ends."""

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import InputError, UsageError
from lowbit.generation.steps.notices import say_once
from lowbit.options.serving import BatchingOptions, LimitOptions, ListenOptions
from lowbit.server.guard import Door, Guard, answer_errors
from lowbit.system.memory import available_memory

KEY_VARIABLE = "LOWBIT_API_KEY"
_SLOTS = 16
_TOKENS_IN_SLOTS = 65_536  # of all slots together, where no option says how long a request may be
_SECONDS_TO_END = 60  # for what runs when the server is told to leave
_PAGE = Path(__file__).parents[1] / "assets" / "chat.html"


def check_packages() -> None:
    """Raises InputError where what transformers serves with is not installed."""
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'lowbit[serve]'") from None


def api_key(given: str | None) -> str | None:
    """The key of an option, or else of the environment. Raises UsageError for one that no header can carry."""
    key = os.environ.get(KEY_VARIABLE) if given is None else given
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip() or not key):
        raise UsageError(
            "the API key is empty, or holds what no header can carry: expected printable ASCII, no spaces around it"
        )
    return key


def bind(host: str, port: int, key: str | None) -> socket.socket:
    """A socket that listens nowhere yet. Raises UsageError for an address that others can reach, without a key, and
    InputError for one that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address: {error}") from None
    if key is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise UsageError(f"others can reach {address[0]}: pass --api-key, or set {KEY_VARIABLE}")
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise InputError(f"cannot listen on {address[0]} port {port}: {error.strerror}; pass another --port") from None
    return made


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def answers_of(session, limits: LimitOptions, batching: BatchingOptions, prefill_chunk: int):
    """Who makes the answers of a session. Raises InputError for slots that do not fit into the memory."""
    if batching.continuous_batching:
        from lowbit.server.batched import BatchedAnswers

        return BatchedAnswers(session, limits, batching)
    from lowbit.server.answers import LoopAnswers

    return LoopAnswers(session, limits, prefill_chunk, _slots_of(session, limits, batching.slots))


def _slots_of(session, limits: LimitOptions, asked: int | None):
    """Slots of --context tokens, or of as many as leave the keys and values of all slots in bounds; None where requests
    do not share steps, which is said. asked: how many; None: up to `_SLOTS`, in half of the memory that is free."""
    from lowbit.generation.slots import Slots, refuse_slots

    if asked == 0:
        return None
    if (refusal := refuse_slots(session.decoder)) is not None:
        level = logging.INFO if refusal.by_nature else logging.WARNING
        say_once(f"answers are made one after the other: {refusal.reason}", level)
        return None
    bounds = [limits.context or max(_TOKENS_IN_SLOTS // (asked or _SLOTS), 1), session.context_length]
    tokens = min(each for each in bounds if each is not None)
    each, free = Slots(session.decoder, 1, tokens).bytes, available_memory()
    taken = f"a slot of {tokens} tokens takes {each / 1e6:,.1f} MB of keys and values, and {free / 1e9:.1f} GB are free"
    if asked and asked * each > free:
        raise InputError(f"{taken}, too few for {asked}: lower --slots, or --context")
    count = asked or min(_SLOTS, free // 2 // each)
    if not asked and count < 2:
        say_once(f"answers are made one after the other: {taken}", logging.WARNING)
        return None
    if not asked and count < _SLOTS:
        say_once(f"{count} requests share steps, not {_SLOTS}: {taken}", logging.WARNING)
    say_once(
        f"up to {count} requests share steps, of {tokens} tokens each at most, those that are longer run alone; keys "
        f"and values take {count * each / 1e9:.2f} GB once they are all used"
    )
    return Slots(session.decoder, count, tokens)


def application(session, answers, name: str, listen: ListenOptions, limits: LimitOptions, door: Door):
    """The ASGI application that serves a session under a name."""
    from lowbit.server.answers import Processor
    from lowbit.text.chat_template import chat_ids
    from lowbit.transformers_serving import serving_app

    app = serving_app(session.model, Processor(session.tokenizer, chat_ids), name, answers)
    answer_errors(app)
    return Guard(app, name, door, limits, _PAGE.read_bytes() if listen.ui else None)


def run(app, bound: socket.socket, limits: LimitOptions, on_ready: Callable[[], None]) -> None:
    """Serve until a signal comes; what runs then is finished, for a minute. A second one ends at once."""
    server = server_of(app, limits, on_ready)
    with _ended_by(server):
        server.run(sockets=[bound])


def server_of(app, limits: LimitOptions, on_ready: Callable[[], None]):
    """The uvicorn server of an application, which calls `on_ready` once it listens."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            on_ready()

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what goes wrong is logged by the guard
    return Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
            timeout_graceful_shutdown=_SECONDS_TO_END, limit_concurrency=limits.max_requests + 256,
        )
    )  # fmt: skip


@contextmanager
def _ended_by(server) -> Iterator[None]:
    """uvicorn takes Ctrl-C and SIGTERM while it runs, and raises them again once it has ended."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    closed = getattr(signal, "SIGHUP", None)  # nohup ignores it
    if closed is not None and signal.getsignal(closed) != signal.SIG_IGN:
        before[closed] = signal.signal(closed, server.handle_exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
