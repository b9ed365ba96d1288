"""API keys: where they come from, who gets in, and what stays open."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_serve.config import ServerConfig
from moe_serve.errors import ConfigError
from moe_serve.server.transport.auth import OPEN_PATHS, read_keys
from moe_serve.server.transport.guard import guard

KEY = "sk-geheim"
BODY = {"prompt": "x", "max_tokens": 2}


def _basic(password: str, user: str = "") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _ask(served: Any, method: str, path: str, headers: dict[str, str], config: ServerConfig | None = None) -> Any:
    async def run() -> httpx.Response:
        async with served.app.router.lifespan_context(served.app):
            app = guard(served.app, config or ServerConfig(), frozenset({KEY, "other"}))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, headers=headers, json=BODY if method == "POST" else None)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "value", [f"Bearer {KEY}", "bearer other", f"Bearer  {KEY} ", _basic(KEY), _basic("other", "ann")]
)
def test_a_key_opens_everything(served: Any, value: str) -> None:
    assert _ask(served, "POST", "/v1/completions", {"Authorization": value}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer \u00fc"},
        {"Authorization": "Basic !"},
        {"Authorization": "Basic "},
        {"Authorization": _basic("")},
        {"Authorization": _basic(KEY), "Sec-Fetch-Site": "cross-site"},
        {"api-key": KEY},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/moe_cache", "/tokenize", "/no_such"])
def test_without_one_it_is_401(served: Any, path: str, headers: dict[str, str]) -> None:
    latin = {name: value.encode("latin-1") for name, value in headers.items()}
    response = _ask(served, "POST", path, latin)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert KEY not in response.text


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/load", "/docs", "/openapi.json", "/dashboard", "/health/"]
)
def test_reading_needs_a_key_too(served: Any, path: str) -> None:
    assert _ask(served, "GET", path, {}).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_need_no_key(served: Any, path: str) -> None:
    assert _ask(served, "GET", path, {}).status_code == 200


def test_a_browser_is_asked_for_the_key_of_the_dashboard(served: Any) -> None:
    assert _ask(served, "GET", "/dashboard", {}).headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    ("method", "origin", "status", "allowed"),
    [
        ("OPTIONS", "https://chat.example", 200, "https://chat.example"),
        ("OPTIONS", "https://evil.example", 400, None),
        ("POST", "https://chat.example", 401, "https://chat.example"),
    ],
)
def test_an_origin_may_ask_before_it_has_a_key(
    served: Any, method: str, origin: str, status: int, allowed: str | None
) -> None:
    config = ServerConfig(allowed_origins=("https://chat.example",))
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = _ask(served, method, "/v1/completions", {"Origin": origin, **asking}, config)
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") == allowed


def test_without_allowed_origins_no_page_may_read(served: Any) -> None:
    answer = _ask(served, "POST", "/v1/completions", {"Origin": "https://a.example", "Authorization": f"Bearer {KEY}"})
    assert "access-control-allow-origin" not in answer.headers


def test_keys_come_from_flags_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n two \n\nthree\n")
    config = ServerConfig(api_key=("sk-1",), api_key_file=str(file))
    assert read_keys(config, {"MOE_SERVE_API_KEY": "four"}) == {"sk-1", "two", "three", "four"}
    assert read_keys(ServerConfig(), {}) == frozenset()
    assert "sk-1" not in repr(config)


@pytest.mark.parametrize(
    ("config", "environment", "named"),
    [
        (ServerConfig(api_key=("",)), {}, "--api-key"),
        (ServerConfig(), {"MOE_SERVE_API_KEY": " "}, "MOE_SERVE_API_KEY"),
        (ServerConfig(api_key_file="/no/such/file"), {}, "--api-key-file"),
        (ServerConfig(api_key_file="/dev/null"), {}, "--api-key-file"),
    ],
)
def test_keys_that_protect_nothing_are_an_error(config: ServerConfig, environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_keys(config, environment)
