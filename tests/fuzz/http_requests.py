"""Generated HTTP for fuzz_http.py: any method, version, header, encoding, body and order of pieces, from a seed.

Everything is drawn from one random.Random, so that a seed gives the same bytes again.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from dataclasses import dataclass, field
from enum import Enum

PATHS = (
    *("/live", "/health", "/version", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"),
    *("/v1/responses", "/tokenize", "/detokenize", "/moe_cache", "/expert_plan", "/dashboard", "/docs", "/", "/load"),
    *("/dashboard/stream", "/ranks", "/openapi.json", "/start_expert_distribution_record"),
)
METHODS = (
    "GET",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "get",
    "PRI",
    "X",
    "M-SEARCH",
)
VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/11", "http/1.1", "", "ICY", "HTTP/1.1 x")
ENDINGS = (b"\r\n",) * 12 + (b"\n", b"\r", b"\r\n\r\n", b"\x00\r\n")
HEADERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Host", ("localhost", "127.0.0.1:1", "evil.example", "", "[::1]", "a b", "localhost, localhost", "x" * 300)),
    (
        "Content-Type",
        ("application/json", "text/plain", "application/json; charset=utf-16", "a", "", "multipart/form-data"),
    ),
    ("Content-Encoding", ("gzip", "identity", "br", "deflate, gzip")),
    ("Transfer-Encoding", ("chunked", "identity", "gzip, chunked", "chunked, chunked", "CHUNKED", "x")),
    ("Connection", ("close", "keep-alive", "upgrade", "close, keep-alive", "TE")),
    ("Expect", ("100-continue", "200-ok")),
    ("Upgrade", ("websocket", "h2c", "TLS/1.0")),
    ("Origin", ("https://evil.example", "null", "http://localhost")),
    ("Sec-Fetch-Site", ("cross-site", "same-origin", "none")),
    ("Authorization", ("Bearer x", "Basic !!", "Bearer " + "k" * 9000, "Basic Og==")),
    ("X-Request-Id", ("a", "a\tb", "é", "x" * 1000, "{}")),
    ("Range", ("bytes=0-1", "bytes=-")),
    ("Cookie", ("a=b; c", "=" * 5000)),
    ("Accept-Encoding", ("gzip", "*;q=0")),
    ("Content-Length", ("0", "-1", "1e3", "99999999999999999999", "5, 5", "+5", "0x10", "")),
)
BODIES = (
    {"prompt": "Once", "max_tokens": 3},
    {"prompt": "Once", "max_tokens": 4, "stream": True},
    {"prompt": [[1, 2], [3]], "max_tokens": 2, "n": 3, "logprobs": 3, "echo": True},
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True},
    {"input": "Hi", "max_output_tokens": 3},
    {"prompt": "x", "max_tokens": 3, "guided_regex": "[a-c]+"},
    {"prompt": "x", "max_tokens": 3, "guided_grammar": 'start: a\na: a a | "x"'},
    {"prompt": "x", "max_tokens": 3, "guided_json": {"$ref": "#"}},
    {"prompt": "x", "stop": ["a"] * 17},
    {"prompt": "x", "max_tokens": 10**18},
    {"tokens": [5, 6, 10**9]},
    {"mib": 1},
)
CHARACTERS = 'ab \n\0é🙂\ud7ff\u2028"\\{}[]<>%'


class Ending(Enum):
    """What a client does after its last byte."""

    READ = "read"
    HALF_CLOSE = "close the sending side and read"
    LEAVE = "close at once"
    RESET = "reset"


@dataclass
class Script:
    """One connection of a client."""

    pieces: list[bytes] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    """Before each piece."""
    ending: Ending = Ending.READ


def script(rng: random.Random) -> Script:
    """A connection with one to five requests, whole or in pieces, with or without an end."""
    data = b"".join(request(rng) for _ in range(rng.choice((1, 1, 1, 2, 5))))
    if rng.random() < 0.15:
        data = data[: rng.randrange(len(data) + 1)]
    if rng.random() < 0.1:
        data = damaged(rng, data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 0, 1, 3, 20))))
    bounds = [0, *cuts, len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    pauses = [rng.choice((0, 0, 0.001, 0.01)) for _ in pieces]
    ending = rng.choice((Ending.READ,) * 5 + (Ending.HALF_CLOSE,) * 2 + (Ending.LEAVE, Ending.RESET))
    return Script(pieces, pauses, ending)


def request(rng: random.Random) -> bytes:
    """One request: most are good but for one or two things."""
    path = rng.choice(PATHS) if rng.random() < 0.9 else strange_path(rng)
    wants_body = path.startswith("/v1/") or rng.random() < 0.3
    method = rng.choice(METHODS) if rng.random() < 0.2 else ("POST" if wants_body else "GET")
    version = rng.choice(VERSIONS) if rng.random() < 0.1 else "HTTP/1.1"
    body = body_of(rng) if wants_body else b""
    headers = [("Host", "localhost")] if rng.random() < 0.95 else []
    headers += [("Content-Type", "application/json")] if body and rng.random() < 0.9 else []
    headers += [strange_header(rng) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
    is_chunked = rng.random() < 0.2
    if is_chunked:
        headers.append(("Transfer-Encoding", "chunked"))
        body = chunked(rng, body)
    elif body and rng.random() < 0.95:
        headers.append(("Content-Length", str(len(body) + rng.choice((0,) * 20 + (1, -1, 1000)))))
    rng.shuffle(headers)
    ending = rng.choice(ENDINGS) if rng.random() < 0.1 else b"\r\n"
    lines = [f"{method} {path} {version}".encode(errors="surrogatepass")]
    lines += [f"{name}: {value}".encode(errors="surrogatepass") for name, value in headers]
    return ending.join(lines) + ending + ending + body


def strange_path(rng: random.Random) -> str:
    return rng.choice(
        (
            "*",
            "//" + rng.choice(PATHS),
            "http://evil.example/v1/models",
            "/" + "a" * rng.choice((100, 5000, 70_000)),
            "/v1/../../etc/passwd",
            "/%00%ff/%2e%2e/",
            "/v1/models?" + "&".join(f"a{i}=1" for i in range(rng.choice((1, 2000)))),
            "/v1/models/" + text(rng, 50),
            "localhost:443",
            "/dashboard/" + text(rng, 20),
        )
    )


def strange_header(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.8:
        name, values = rng.choice(HEADERS)
        return name, rng.choice(values)
    name = rng.choice(("X-" + "a" * rng.choice((1, 300, 30_000)), text(rng, 10), "", " Host", "Host ", "x:y"))
    return name, rng.choice((text(rng, 30), "v" * rng.choice((1, 8000, 70_000)), "a\r\n b", "a\n b", "\x00", "\xff"))


def body_of(rng: random.Random) -> bytes:
    body = dict(rng.choice(BODIES))
    kind = rng.random()
    if kind < 0.5:
        return json.dumps(body).encode()
    if kind < 0.7:
        body[text(rng, 8) if rng.random() < 0.3 else rng.choice(list(body))] = value(rng, 3)
        return json.dumps(body).encode()
    if kind < 0.8:
        return damaged(rng, json.dumps(body).encode())
    if kind < 0.85:
        return json.dumps(body).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if kind < 0.9:
        return gzip.compress(json.dumps(body).encode())
    return rng.choice(
        (
            b"",
            rng.randbytes(rng.choice((1, 100, 5000))),
            b"[" * rng.choice((10, 100_000)),
            json.dumps({"prompt": "hello " * rng.choice((10, 20_000))}).encode(),
            json.dumps({"prompt": [1] * rng.choice((10, 100_000))}).encode(),
            json.dumps({"prompt": "x", "logit_bias": {str(i): 1 for i in range(2000)}}).encode(),
        )
    )


def value(rng: random.Random, depth: int) -> object:
    """Any JSON."""
    plain = (None, True, 0, -1, 2**63, 1e308, 0.5, "", text(rng, 20))
    if depth == 0 or rng.random() < 0.6:
        return rng.choice(plain)
    if rng.random() < 0.5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng, 5): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def text(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(CHARACTERS) for _ in range(rng.randrange(most + 1)))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, lost or repeated."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(found) + 1)
        found[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(found)


def chunked(rng: random.Random, body: bytes) -> bytes:
    """The body in chunks; some of their sizes are wrong."""
    size = rng.choice((1, 7, 1000))
    if len(body) // size > 2000:
        size = 1000
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    lines = []
    for part in parts:
        head = f"{len(part):x}" if rng.random() < 0.999 else rng.choice(("-1", "fffffffffffffffff", "g", "", "5;a=b"))
        lines.append(head.encode() + b"\r\n" + part + b"\r\n")
    end = rng.choice((b"0\r\n\r\n",) * 9 + (b"0\r\nTrailer: x\r\n\r\n", b"0\r\n", b""))
    return b"".join(lines) + end
