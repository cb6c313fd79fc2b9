"""A Hub in this process: the endpoints that uploads and downloads use, over HTTP, with failures on demand.

It keeps what a real one keeps and refuses what a real one refuses: objects whose content has another hash, commits that
name objects which never arrived, tokens that are not known or may not write.
"""

import base64
import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READ_ONLY = "hf_writes", "hf_reads"


def _is_private(asked: dict) -> bool:
    """By the name that huggingface_hub 2 gives it, or the one before."""
    return asked["visibility"] == "private" if "visibility" in asked else asked["private"]


@dataclass
class Repo:
    """files: path -> bytes, or the sha256 of an object."""

    private: bool
    files: dict[str, bytes | str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["initial"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


@dataclass
class Fault:
    """What `matches` (method, path) fails `times` times: with an HTTP status, or None for a connection that is dropped
    in the middle of the body; not before `after` is true."""

    matches: Callable[[str, str], bool]
    status: int | None
    times: int = 10**9
    after: Callable[[], bool] = lambda: True


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up is not news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """repos: id -> Repo. objects: sha256 -> bytes. requests: (method, path) of all that came, in order. sent: bytes of
    each file that was downloaded, or of the parts of it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.changed = threading.Condition()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def contents(self, repo_id: str) -> dict[str, bytes]:
        """What a download would give."""
        files = self.repos[repo_id].files
        return {path: self.objects[at] if isinstance(at, str) else at for path, at in files.items()}

    def uploads(self) -> list[str]:
        """Hashes of the objects that were sent, again and again if so."""
        return [path.rsplit("/", 1)[1] for method, path in self.requests if method == "PUT" and "/objects/" in path]

    def fault(self, method: str, path: str) -> Fault | None:
        with self.changed:
            for fault in self.faults:
                if fault.times and fault.matches(method, path):
                    fault.times -= 1
                    assert self.changed.wait_for(fault.after, timeout=600)
                    return fault
        return None


@contextmanager
def running_hub(monkeypatch):
    """A Hub that huggingface_hub talks to for as long as this is open, with a token that may write."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, in a compiled library
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its retries
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, data: dict, **headers: str) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.answer(status, {"error": message}, X_Error_Message=message, **headers)

    def handle_any(self) -> None:
        path, _, _ = self.path.partition("?")
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length", 0))
        fault = self.hub.fault(self.command, path)
        if fault and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if fault:
            self.refuse(fault.status, "out of order")
        elif path.startswith("/objects/"):
            self.put_object(path, body)
        elif (token := self.headers.get("Authorization", "").removeprefix("Bearer ")) not in (TOKEN, READ_ONLY):
            self.refuse(401, "Invalid credentials in Authorization header")
        elif token == READ_ONLY and self.command != "GET":
            self.refuse(403, "you don't have the rights to write")
        else:
            self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/resolve/" in path:
            return self.download(*path.strip("/").split("/resolve/"))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo_id, action = "/".join(parts[:2]).removesuffix(".git"), "/".join(parts[2:])
        if repo_id not in self.hub.repos:
            return self.refuse(404, "Repository not found", X_Error_Code="RepoNotFound")
        repo = self.hub.repos[repo_id]
        match action:
            case "" | "revision/main":
                self.answer(200, self.describe(repo_id, repo))
            case "preupload/main":
                self.answer(200, {"files": [_mode(repo, file) for file in json.loads(body)["files"]]})
            case "info/lfs/objects/batch":
                self.answer(200, {"objects": [self.action(asked) for asked in json.loads(body)["objects"]]})
            case "commit/main":
                self.commit(repo_id, repo, [json.loads(line) for line in body.splitlines()])
            case "settings":
                repo.private = _is_private(json.loads(body))
                self.answer(200, {})
            case _:
                self.refuse(404, f"no such endpoint: {path}")

    def download(self, repo_id: str, rest: str) -> None:
        name = rest.partition("/")[2]
        if repo_id not in self.hub.repos:
            return self.refuse(404, "Repository not found", X_Error_Code="RepoNotFound")
        if name not in self.hub.repos[repo_id].files:
            return self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound")
        data, wanted = self.hub.contents(repo_id)[name], self.headers.get("Range", "")
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first or 0) : int(last or len(data)) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.repos[repo_id].sha)
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.hub.sent[name] += len(part)
            self.wfile.write(part)

    def create(self, asked: dict) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        data = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(409, {**data, "error": "You already created this model repo"})
        self.hub.repos[repo_id] = Repo(_is_private(asked), {".gitattributes": b""})
        self.answer(200, data)

    def describe(self, repo_id: str, repo: Repo) -> dict:
        siblings = []
        for path, at in repo.files.items():
            sibling = {"rfilename": path, "size": len(at)}
            if isinstance(at, str):
                count = len(self.hub.objects[at])
                sibling |= {"size": count, "lfs": {"sha256": at, "size": count, "pointerSize": 134}}
            siblings.append(sibling)
        return {"id": repo_id, "sha": repo.sha, "private": repo.private, "siblings": siblings}

    def action(self, asked: dict) -> dict:
        if asked["oid"] in self.hub.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}

    def put_object(self, path: str, body: bytes) -> None:
        oid = path.removeprefix("/objects/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "the content does not match its hash")
        with self.hub.changed:
            self.hub.objects[oid] = body
            self.hub.changed.notify_all()
        self.answer(200, {})

    def commit(self, repo_id: str, repo: Repo, lines: list[dict]) -> None:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile" if value["oid"] not in self.hub.objects:
                    return self.refuse(400, f"no such object: {value['oid']}")
                case "lfsFile":
                    files[value["path"]] = value["oid"]
                case "deletedFile":
                    del files[value["path"]]
                case "header":
                    summary = value["summary"]
        repo.files, repo.commits = files, [*repo.commits, summary]
        self.answer(200, {"commitOid": repo.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{repo.sha}"})


def _mode(repo: Repo, file: dict) -> dict:
    at = repo.files.get(file["path"])
    oid = hashlib.sha1(b"blob %d\0" % len(at) + at).hexdigest() if isinstance(at, bytes) else at
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
