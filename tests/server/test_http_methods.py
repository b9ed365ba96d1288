"""What HTTP itself asks of a server: HEAD, slashes at the end, and a first page."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from moe_serve.config import ServerConfig
from moe_serve.server.transport.guard import guard


@pytest.fixture
def client(served: Any) -> TestClient:
    """Not entered: nothing here needs the engine to run."""
    return TestClient(guard(served.app, ServerConfig(), frozenset()), base_url="http://localhost")


@pytest.mark.parametrize("path", ["/health", "/live", "/v1/models", "/metrics", "/dashboard", "/no_such_path"])
def test_head_is_get_without_a_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b""


def test_head_of_what_only_takes_posts_is_405(client: TestClient) -> None:
    response = client.head("/v1/completions")
    assert response.status_code == 405


def test_a_wrong_method_has_the_shape_of_all_errors(client: TestClient) -> None:
    response = client.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == 405


def test_models_with_a_slash_are_the_list(client: TestClient) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


def test_the_first_page_says_where_to_go(client: TestClient) -> None:
    assert client.get("/").json()["links"]["dashboard"] == "/dashboard"
    page = client.get("/", headers={"Accept": "text/html"}, follow_redirects=False)
    assert (page.status_code, page.headers["location"]) == (307, "/dashboard")
