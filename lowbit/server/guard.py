"""What stands before the application: who may ask, for what, how much, and how many at once. Every refusal is an answer
of HTTP in the shape of OpenAI's API, and whatever goes wrong behind it is one, too."""

import asyncio
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lowbit.errors import LowbitError, first_line
from lowbit.guards import escape
from lowbit.options.serving import LimitOptions
from lowbit.server.asked import ASKED, POSTED, Asked, RequestError, read_body, read_request

log = logging.getLogger("lowbit")
Send = Callable[[dict], Awaitable[None]]
Receive = Callable[[], Awaitable[dict]]

_SECONDS_FOR_BODY = 60.0
_OPEN = {"/health", "/"}  # without a key: the page asks for it, and holds nothing of the model
_PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy",
     b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
     b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip


@dataclass(frozen=True)
class Door:
    """Who is let in. key: what requests must bring. local: only this machine can reach the server, under its names: a
    page of the web that has its own name point here is not let in."""

    key: str | None
    local: bool

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises RequestError."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.local and self.key is None and not _is_local(host):
            raise RequestError(f"requests without a key come to localhost or 127.0.0.1, not to {host!r}", status=403)
        if self.key is not None and path not in _OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(given.strip(), self.key.encode())
            if scheme.lower() != b"bearer" or not same:
                raise RequestError("the key is missing or wrong: send Authorization: Bearer KEY", status=401,
                                   code="invalid_api_key")  # fmt: skip


def _is_local(host: str) -> bool:
    """Of a Host header, with a port or without."""
    name, separator, port = host.rpartition(":")
    name = name if separator and port.isdigit() else host
    try:
        return name == "localhost" or ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The ASGI application before another. page: what GET / answers, None for nothing."""

    def __init__(self, app, model: str, door: Door, limits: LimitOptions, page: bytes | None):
        self.app, self.model, self.door, self.limits, self.page = app, model, door, limits, page
        self.running = 0

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _Once(send))

    async def _answer(self, scope: dict, receive: Receive, send: "_Once") -> None:
        try:
            await self._admit(scope, receive, send)
        except RequestError as error:
            await send.error(error)
        except Exception as error:  # of the application, which has answered it
            words = first_line(error)
            log.error("%s %s failed: %s", scope["method"], escape.terminal(scope["path"]), escape.terminal(words))
            await send.error(RequestError(f"the server failed: {words}", status=500))

    async def _admit(self, scope: dict, receive: Receive, send: "_Once") -> None:
        method, path, headers = scope["method"], scope["path"], dict(scope["headers"])
        self.door.check(path, headers)
        if path in POSTED:
            if method != "POST":
                raise RequestError(f"{path} takes POST, not {method}", status=405)
            await self._post(scope, receive, send, headers)
        elif path in ("/health", "/v1/models") and method == "GET":
            await self.app(scope, receive, send)
        elif path == "/" and method == "GET" and self.page is not None:
            await send.whole(200, self.page, _PAGE_HEADERS)
        else:
            raise RequestError(f"there is no {method} {path} here", status=404)

    async def _post(self, scope: dict, receive: Receive, send: "_Once", headers: dict[bytes, bytes]) -> None:
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise RequestError("the body is no application/json by its Content-Type", status=415)
        if self.running >= self.limits.max_requests:
            raise RequestError(f"{self.running} requests are running: come back later", status=429)
        self.running += 1
        try:
            raw = await self._body(receive, headers)
            asked, body = read_request(scope["path"], read_body(raw), self.model)
            await self._hand_on(scope, receive, send, asked, json.dumps(body).encode())
        finally:
            self.running -= 1

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        most, raw = self.limits.max_body, bytearray()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise RequestError(f"the body has {int(length[:20])} bytes: at most {most} here", status=413)
        try:
            async with asyncio.timeout(_SECONDS_FOR_BODY):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("the client has gone")
                    raw += message.get("body", b"")
                    if len(raw) > most:
                        raise RequestError(f"the body has more than {most} bytes", status=413)
                    if not message.get("more_body"):
                        return bytes(raw)
        except TimeoutError:
            raise RequestError("the body has not come in time", status=408) from None

    async def _hand_on(self, scope: dict, receive: Receive, send: "_Once", asked: Asked, body: bytes) -> None:
        """Let the application answer, and its answer end where the client goes."""
        gone, unread = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            asked.cancelled.set()
            gone.set()

        async def read() -> dict:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        # A client that chose the id of a request could choose that of another
        kept = [(name, value) for name, value in scope["headers"] if name not in _REPLACED]
        headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        watching = asyncio.create_task(watch())
        token = ASKED.set(asked)
        try:
            await self.app({**scope, "headers": headers}, read, send)
        finally:
            asked.cancelled.set()
            ASKED.reset(token)
            watching.cancel()


_REPLACED = {b"content-type", b"content-length", b"x-request-id", b"transfer-encoding"}


class _Once:
    """`send` of ASGI, which knows whether an answer has begun: then no other can."""

    def __init__(self, send: Send):
        self._send, self.begun = send, False

    async def __call__(self, message: dict) -> None:
        self.begun = True
        await self._send(message)

    async def whole(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        if self.begun:
            return
        length = (b"content-length", str(len(body)).encode())
        await self({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self({"type": "http.response.body", "body": body})

    async def error(self, error: RequestError) -> None:
        headers = [(b"content-type", b"application/json")]
        if error.status == 429:
            headers.append((b"retry-after", b"1"))
        await self.whole(error.status, error_body(error), headers)


def error_body(error: RequestError) -> bytes:
    """In the shape of OpenAI's API."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    words = {"message": str(error), "type": kind, "param": error.field, "code": error.code}
    return json.dumps({"error": words}).encode()


def answer_errors(app) -> None:
    """Let a FastAPI application answer its own errors in the same way: those that are not expected are logged, too."""
    from fastapi import HTTPException, Response

    def refuse(request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = RequestError(str(error.detail), status=error.status_code)
        elif not isinstance(error, RequestError):
            expected = isinstance(error, LowbitError)
            words = str(error) if expected else f"the server failed: {first_line(error)}"
            error = RequestError(words, status=400 if expected else 500)
        return Response(error_body(error), error.status, media_type="application/json")

    for kind in (LowbitError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
