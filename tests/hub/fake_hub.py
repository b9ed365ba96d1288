"""A server that speaks what a download needs of the Hugging Face Hub's protocol, and writes down what is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"main").hexdigest()


@dataclass
class FakeHub:
    """One model, org/name, in a branch `main` and a tag `v1` of the same commit."""

    files: Mapping[str, bytes]
    error: str | None = None
    """X-Error-Code of the answer to everything."""
    url: str = ""
    knows_ranges: bool = True
    """Whether parts of files are sent."""
    sent_bytes: int = 0
    """Of all bodies."""
    requests: list[str] = field(default_factory=list)
    """Methods and paths."""
    tokens: set[str] = field(default_factory=set)
    """Those that were sent."""

    @property
    def downloaded(self) -> set[str]:
        """Names of files whose contents were asked for."""
        return {asked.split("/")[-1] for asked in self.requests if asked.startswith("GET /org/name/resolve/")}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub on a free port."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if token := self.headers.get("authorization"):
            self.hub.tokens.add(token)
        known = path.startswith(("/api/models/org/name/", "/org/name/"))
        revision = path.removeprefix("/api/models").split("/")[4:5]
        if self.hub.error or not known or revision not in (["main"], ["v1"], [COMMIT]):
            code = self.hub.error or ("RevisionNotFound" if known else "RepoNotFound")
            self._send(403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code}, with_body)
        elif path.startswith("/api/"):
            listed = self._tree() if "/tree/" in path else self._info()
            self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, with_body)
        else:
            self._send_file(path.split("/", 5)[5], with_body)

    def _info(self) -> object:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.files.items()]
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings}

    def _tree(self) -> object:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.hub.files.items()
        ]

    def _send_file(self, name: str, with_body: bool) -> None:
        data = self.hub.files.get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("range") if self.hub.knows_ranges else None
        if asked is None:
            self._send(200, data, headers, with_body)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._send(206, part, headers, with_body)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.hub.sent_bytes += len(body)
            self.wfile.write(body)
