"""What a server does not do: each is an answer of HTTP that says so, and the next request is answered."""

import json
import socket
import threading
from queue import Queue

import pytest
from served import LONG, NAME, SECONDS, Scripted, serving

from lowbit.errors import InputError, UsageError
from lowbit.options import LimitOptions
from lowbit.server.asked import RequestError
from lowbit.server.guard import Door
from lowbit.server.run import api_key, bind

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = [{"role": "user", "content": "hello"}]
DEEP = b"[" * 200_000
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
BROKEN_CALL = {"function": {"name": "f", "arguments": "{"}}


@pytest.fixture
def lives(served):
    """The server answers after what the test did."""
    yield
    assert served.complete().status == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"[]", b'"text"', b"null", b'{"a": NaN}', b"\xff\xfe", b'{"prompt": "\\ud800"}', DEEP,
     b'{"prompt": ' + b"9" * 5000 + b"}"],
    ids=lambda body: body[:12],
)  # fmt: skip
def test_what_is_no_json_object(served, lives, body):
    reply = served.ask("POST", TEXT, body)
    assert reply.status == 400 and "the body is" in reply.error["message"]


WRONG = {
    CHAT: [
        ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"),
        ({"messages": [{}]}, "messages"), ({"messages": [{"role": 1, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [BROKEN_CALL]}]}, "messages"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": USER, "tools": {}}, "tools"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
        ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": USER, "logprobs": True}, "logprobs"),
        ({"messages": USER, "logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": USER, "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"messages": USER, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"messages": USER, "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"messages": USER, "generation_config": "{}"}, "generation_config"),
    ],
    TEXT: [
        ({}, "prompt"), ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": ""}, None),
        ({"prompt": "x", "nonsense": 1}, "nonsense"), ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"), ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": True}, "temperature"), ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"), ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 10**30}, "max_tokens"), ({"prompt": "x", "max_tokens": LONG}, None),
        ({"prompt": "x", "seed": -1}, "seed"), ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "stop": ""}, "stop"), ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "n": 3}, "n"), ({"prompt": "x", "echo": True}, "echo"), ({"prompt": "dog " * LONG}, None),
    ],
    RESPONSES: [
        ({}, "input"), ({"input": 3}, "input"), ({"input": []}, "input"), ({"input": ["x"]}, "input"),
        ({"input": [{"type": "function_call"}]}, "input"), ({"input": [{"type": "unheard of"}]}, "input"),
        ({"input": "x", "previous_response_id": "1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [(path, body, field) for path, cases in WRONG.items() for body, field in cases],
    ids=lambda value: str(value)[:40],
)
def test_what_a_request_cannot_ask_for(served, lives, path, body, field):
    reply = served.ask("POST", path, body or b"{}")
    assert reply.status == 400 and reply.error["param"] == field and "\n" not in reply.error["message"]


def test_what_says_what_happens_anyway_is_taken(served):
    harmless = {"n": 1, "logprobs": False, "user": "me", "stop": None, "frequency_penalty": 0, "presence_penalty": 0.0,
                "metadata": {"a": "b"}, "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
                "tools": [], "tool_choice": "auto", "seed": 0}  # fmt: skip
    assert served.chat(**harmless).status == 200


def test_another_model_is_not_looked_for(served, lives, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("downloads"))
    for name in ("org/other", "other@main", f"{NAME}@main", "../tiny", "x:y.gguf"):
        reply = served.complete(model=name)
        assert reply.status == 404 and reply.error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/reset", 404), ("POST", "/load_model", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404),
     ("POST", "/v1/audio/transcriptions", 404), ("POST", "/v1/systemone", 404), ("GET", "/", 404), ("GET", TEXT, 405),
     ("DELETE", CHAT, 405), ("GET", "/v1/../etc/passwd", 404), ("OPTIONS", "/v1/models", 404)],
)  # fmt: skip
def test_nothing_else_is_there(served, lives, method, path, status):
    """Not what transformers has beside the API: unloading the model, loading another one, pages."""
    assert served.ask(method, path, b"{}").status == status


def test_pages_of_the_web_are_not_let_in(served, lives):
    """A page can send text anywhere, and give its own name this address; it cannot send JSON without asking first."""
    body = json.dumps({"prompt": "x"}).encode()
    assert served.ask("POST", TEXT, body, {"Content-Type": "text/plain"}).status == 415
    assert served.ask("POST", TEXT, body, {"Host": "evil.example"}).status == 403
    assert served.ask("GET", "/v1/models", headers={"Host": "evil.example:8000"}).status == 403
    assert served.ask("GET", "/v1/models", headers={"Host": "localhost:1"}).status == 200


def test_a_body_is_only_so_large(session):
    with serving(session, limits=LimitOptions(max_body=1000)) as served:
        reply = served.complete(prompt="x" * 2000)
        assert reply.status == 413 and "at most 1000" in reply.error["message"]
        chunked = b"64\r\n" + b"x" * 100 + b"\r\n"  # of no length that is told before
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
            connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + 11 * chunked)
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert served.complete().status == 200


def test_context_and_answers_are_only_so_long(session):
    with serving(session, limits=LimitOptions(context=12, max_tokens=6)) as served:
        assert served.complete(max_tokens=7).error["param"] == "max_tokens"
        assert served.complete(prompt="the dog " * 20).error["code"] == "context_length_exceeded"
        cut = served.complete(prompt="the quick", max_tokens=None).json()  # as many as there may be
        assert cut["usage"]["completion_tokens"] == 6 and cut["choices"][0]["finish_reason"] == "length"


class Waiting(Scripted):
    """A model that does not go on until it is told to."""

    def __init__(self, session):
        super().__init__(session, "the dog")
        self.go_on = threading.Event()

    def generate(self, ids, **options):
        assert self.go_on.wait(SECONDS)
        super().generate(ids, **options)


def test_requests_at_once_are_only_so_many(session):
    waiting = Waiting(session)
    with serving(waiting, limits=LimitOptions(max_requests=2)) as served:
        replies: Queue = Queue()
        threads = [threading.Thread(target=lambda: replies.put(served.complete())) for _ in range(3)]
        for thread in threads:
            thread.start()
        refused = replies.get(timeout=SECONDS)  # the others wait for the model
        assert refused.status == 429 and "come back later" in refused.error["message"]
        assert refused.headers["retry-after"] == "1" and served.ask("GET", "/health").status == 200
        waiting.go_on.set()
        assert [replies.get(timeout=SECONDS).status for _ in range(2)] == [200, 200]
        assert served.complete().status == 200
        for thread in threads:
            thread.join(SECONDS)


def test_a_model_that_fails_is_an_error_and_no_end(session, caplog):
    scripted = Scripted(session, InputError('its weights are "damaged"'))
    with serving(scripted) as served:
        assert served.complete().error["message"] == 'its weights are "damaged"'
        *_, last = served.complete(stream=True).body.split(b"\n\n")[:-1]
        assert json.loads(last.removeprefix(b"data: ")) == {"error": "its weights are 'damaged'"}
        scripted.says = RuntimeError("deep inside\nand a second line")
        reply = served.complete()
        assert reply.status == 500 and reply.error["message"] == "the server failed: deep inside"
        scripted.says = "the dog"
        assert served.complete().json()["choices"][0]["text"].startswith("the")
    assert [each.message for each in caplog.records if each.levelname == "ERROR"] == [
        "POST /v1/completions failed: deep inside"
    ]


def test_a_key_opens_the_door(session):
    with serving(session, key="se:cret") as served:
        wrong = [{"Authorization": each} for each in ("Bearer wrong", "Basic se:cret", "Bearer se:cret2", "Bearer ")]
        for headers in ({}, *wrong, {"x-api-key": "se:cret"}):
            for method, path in (("GET", "/v1/models"), ("POST", TEXT), ("POST", "/reset")):
                reply = served.ask(method, path, {"prompt": "x"}, headers)
                assert reply.status == 401 and reply.error["code"] == "invalid_api_key"
        assert served.ask("GET", "/health").status == 200
        with served.client("se:cret") as client:
            assert client.completions.create(model=NAME, prompt="x", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:8000"])
def test_names_of_this_machine(host):
    Door(None, local=True).check("/v1/models", {b"host": host.encode()})


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example:8000", "192.0.2.1", "[::2]:1", "1:127.0.0.1"]
)
def test_names_that_are_not_of_this_machine(host):
    with pytest.raises(RequestError, match="not to"):
        Door(None, local=True).check("/v1/models", {b"host": host.encode()})
    Door("key", local=True).check("/health", {b"host": host.encode()})  # who has a key may use any name


def test_others_reach_a_server_with_a_key_only(monkeypatch):
    monkeypatch.delenv("LOWBIT_API_KEY", raising=False)
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(UsageError, match="pass --api-key"):
            bind(host, 0, api_key(None))
    monkeypatch.setenv("LOWBIT_API_KEY", "k")
    with bind("0.0.0.0", 0, api_key(None)) as bound:
        assert bound.getsockname()[0] == "0.0.0.0"
    for key in ("", " k", "ä", "a\nb"):
        with pytest.raises(UsageError, match="API key"):
            api_key(key)


def test_an_address_that_cannot_be_had():
    with bind("127.0.0.1", 0, None) as taken:
        taken.listen()
        with pytest.raises(InputError, match="pass another --port"):
            bind("127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(UsageError, match="no address"):
        bind("no such name.invalid", 0, None)


def test_a_connection_that_breaks_off_disturbs_nobody(served, lives):
    """Before the request has come, in its middle, and after it with a reset, as that of a client that was killed."""
    host, port = served.url.removeprefix("http://").split(":")
    head = f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 400\r\n\r\n"
    for sent in (b"", b"GARBAGE\r\n\r\n", head.encode(), head.encode() + b'{"prompt": '):
        with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
