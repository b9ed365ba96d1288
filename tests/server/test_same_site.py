"""Who may call a server without a key: programs, its own pages, and pages it was told to allow."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from moe_serve.config import ServerConfig
from moe_serve.scheduling.sequence import Request
from moe_serve.server.transport.guard import guard

APP = ("https://app.example",)
OPEN = frozenset[str]()
KEYS = frozenset({"ann", "bob"})
PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog."


def ask(served: Any, *calls: tuple[str, str, dict[str, str]], keys: frozenset[str] = OPEN, **config: Any) -> list[Any]:
    """Responses to (method, path, headers), in order, of a guarded app."""

    async def run() -> list[httpx.Response]:
        async with served.app.router.lifespan_context(served.app):
            app = guard(served.app, ServerConfig(**config), keys)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
                body = {"prompt": PROMPT, "max_tokens": 1}
                return [
                    await client.request(method, path, headers=headers, json=body if "/v1/" in path else None)
                    for method, path, headers in calls
                ]

    return asyncio.run(run())


PATHS = ["/v1/completions", "/start_expert_distribution_record", "/moe_cache", "/expert_plan"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example"},
    ],
)
def test_another_sites_page_is_refused(served: Any, path: str, headers: dict[str, str]) -> None:
    (response,) = ask(served, ("POST", path, headers))
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "127.0.0.1:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "LOCALHOST"},
        {"Host": "app.localhost:8000"},
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_programs_and_own_pages_are_let_in(served: Any, headers: dict[str, str]) -> None:
    (response,) = ask(served, ("POST", "/v1/completions", headers))
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("headers", "settings", "status"),
    [
        ({"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}, {"allowed_origins": APP}, 200),
        ({"Origin": "https://app.example.evil"}, {"allowed_origins": APP}, 403),
        ({"Origin": "https://any.example"}, {"allowed_origins": ("*",)}, 200),
        ({"Host": "llm.lan"}, {"allowed_hosts": ("llm.lan",)}, 200),
        ({"Host": "llm.wan"}, {"allowed_hosts": ("llm.lan",)}, 403),
        ({"Host": "llm.lan"}, {"host": "0.0.0.0"}, 200),
    ],
)
def test_the_settings_say_who_else_may_call(
    served: Any, headers: dict[str, str], settings: dict[str, Any], status: int
) -> None:
    (response,) = ask(served, ("POST", "/v1/completions", headers), **settings)
    assert response.status_code == status


def test_a_link_to_the_dashboard_opens_it(served: Any) -> None:
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    (page,) = ask(served, ("GET", "/dashboard", visit))
    assert page.status_code == 200


@pytest.mark.parametrize("path", PATHS[1:])
def test_a_key_does_not_let_another_sites_page_change_the_server(served: Any, path: str) -> None:
    headers = {"Authorization": "Bearer ann", "Origin": "https://evil.example"}
    refused, answered = ask(served, ("POST", path, headers), ("POST", "/v1/completions", headers), keys=KEYS)
    assert refused.status_code == 403
    assert answered.status_code == 200


def salts_of(served: Any, **config: Any) -> list[str]:
    """What keeps the prefixes of ann's, bob's and again ann's request apart."""
    seen: list[str] = []
    add = served.engine.add_request

    def note(request: Request) -> None:
        seen.append(request.cache_salt)
        add(request)

    served.engine.add_request = note
    calls = [("POST", "/v1/completions", {"Authorization": f"Bearer {key}"}) for key in ("ann", "bob", "ann")]
    assert all(response.status_code == 200 for response in ask(served, *calls, **config))
    return seen


def test_prefixes_are_kept_apart_by_key(served: Any) -> None:
    ann, bob, again = salts_of(served, keys=KEYS)
    assert ann == again != bob
    assert "ann" not in ann


def test_prefixes_can_be_shared_between_keys(served: Any) -> None:
    assert salts_of(served, keys=KEYS, share_prefixes_between_keys=True) == ["", "", ""]
