"""Files under a URL, read whole or from their start, by range requests. Knows no format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType

import httpx

from moe_serve.errors import ConfigError, one_line

TIMEOUT_S = 20.0
TOTAL = re.compile(r"bytes \d+-\d+/(?P<size>\d+)")
"""Of a Content-Range."""
ATTEMPTS = 3
PASSING = (429, 500, 502, 503, 504)
"""Statuses that another attempt may not meet again."""


class RemoteFiles:
    """The files of one folder, `url`, without a slash at its end. Errors are ConfigErrors that name the URL."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url = url
        self._client = httpx.Client(headers=dict(headers), follow_redirects=True, timeout=TIMEOUT_S)

    def __enter__(self) -> RemoteFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._client.close()

    def has(self, name: str) -> bool:
        """Whether a GET of the first byte finds it."""
        return self._ask(name, {"Range": "bytes=0-0"}).status_code in (200, 206)

    def whole(self, name: str) -> bytes:
        """All of a small file."""
        return self._good(name, {}).content

    def start(self, name: str, count: int) -> tuple[bytes, int]:
        """(at most `count` first bytes, the file's size)."""
        answer = self._good(name, {"Range": f"bytes=0-{count - 1}"})
        match = TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or match is None:
            raise ConfigError(f"{self.url}/{name}: the server sends no parts of files (range requests)")
        return answer.content, int(match["size"])

    def _good(self, name: str, headers: Mapping[str, str]) -> httpx.Response:
        answer = self._ask(name, headers)
        if answer.is_error:
            hint = "; a private or gated model needs HF_TOKEN" if answer.status_code in (401, 403) else ""
            raise ConfigError(f"{self.url}/{name}: the server answered {answer.status_code}{hint}")
        return answer

    def _ask(self, name: str, headers: Mapping[str, str]) -> httpx.Response:
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                answer = self._limited(f"{self.url}/{name}", headers)
            except httpx.HTTPError as error:
                if last or not isinstance(error, httpx.TransportError):
                    raise ConfigError(f"{self.url}/{name}: cannot be read: {one_line(error)}") from error
                continue
            if last or answer.status_code not in PASSING:
                return answer
        raise AssertionError("the last attempt returns or raises")

    def _limited(self, url: str, headers: Mapping[str, str]) -> httpx.Response:
        """The answer; its body only if it is the part that was asked for, or no part was."""
        with self._client.stream("GET", url, headers=dict(headers)) as answer:
            if "Range" not in headers or answer.status_code == 206:
                answer.read()
            return answer
