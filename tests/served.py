"""Servers in a thread of this process, on a free port of the loopback, and clients of them."""

import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
import torch

from lowbit.options import BatchingOptions, LimitOptions, ListenOptions
from lowbit.server.guard import Door
from lowbit.server.run import answers_of, application, bind, server_of, url

NAME = "tiny"
LONG = 40_000  # tokens of a context in which an answer takes minutes
SECONDS = 300.0  # nothing is waited for any longer: what hangs is not to do so for ever


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict

    def json(self):
        return json.loads(self.body, parse_constant=pytest.fail)

    @property
    def error(self) -> dict:
        """What went wrong, in the shape of OpenAI's API."""
        assert set(self.json()) == {"error"}
        assert set(self.json()["error"]) == {"message", "type", "param", "code"}
        return self.json()["error"]


@dataclass(frozen=True)
class Served:
    url: str
    session: object

    def ask(self, method: str, path: str, body=None, headers=(), **given) -> Reply:
        """A request as curl makes it. body: bytes as they are, anything else as JSON; or the fields that are given."""
        given = given or body
        data = given if given is None or isinstance(given, bytes) else json.dumps(given).encode()
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=SECONDS)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
            response = connection.getresponse()
            return Reply(response.status, response.read(), {k.lower(): v for k, v in response.getheaders()})
        finally:
            connection.close()

    def complete(self, **given) -> Reply:
        return self.ask("POST", "/v1/completions", **{"prompt": "the quick", "max_tokens": 4, **given})

    def chat(self, **given) -> Reply:
        messages = [{"role": "user", "content": "hello"}]
        return self.ask("POST", "/v1/chat/completions", **{"messages": messages, "max_tokens": 4, **given})

    def client(self, key: str = "none"):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=SECONDS, max_retries=0)


@contextmanager
def serving(session, *, key=None, listen=None, limits=None, batching=None) -> Iterator[Served]:
    listen, limits = listen or ListenOptions(), limits or LimitOptions()
    batching = batching or BatchingOptions(slots=0 if isinstance(session, Scripted) else 4)
    answers, ready = answers_of(session, limits, batching, prefill_chunk=64), threading.Event()
    level = logging.getLogger("uvicorn.error").level
    with bind("127.0.0.1", 0, key) as bound:
        app = application(session, answers, NAME, listen, limits, Door(key, local=True))
        server = server_of(app, limits, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert ready.wait(SECONDS)
        try:
            yield Served(url(bound), session)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            logging.getLogger("uvicorn.error").setLevel(level)
            assert not thread.is_alive()


class Scripted:
    """A session whose model says what it is told to, a text for each prompt, or fails.

    pause: seconds after each token
    """

    def __init__(self, session, says: str | Exception, pause: float = 0.0):
        self.model, self.tokenizer, self.context_length = session.model, session.tokenizer, session.context_length
        self.decoder, self.says, self._pause = self, says, pause

    def generate(self, ids: torch.Tensor, *, on_token, max_new_tokens: int, **options) -> None:
        if isinstance(self.says, Exception):
            on_token([int(ids[0, -1])])
            raise self.says
        for token in self.tokenizer(self.says, add_special_tokens=False)["input_ids"][:max_new_tokens]:
            if on_token([token]):
                return
            time.sleep(self._pause)
