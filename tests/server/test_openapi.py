"""The OpenAPI document: complete, true to the bodies, and held against the server by schemathesis."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from moe_serve.server.endpoints.chat import ChatBody
from tests.fuzz.harness import random_app, served


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return random_app()


def reads_body(client: TestClient, path: str) -> bool:
    """Whether an endpoint refuses what is no JSON."""
    response = client.post(path, content=b"{")
    return response.status_code == 400 and "body" in response.json()["error"]["message"]


def test_every_operation_shows_its_body_and_its_errors(app: FastAPI) -> None:
    document = app.openapi()
    client = TestClient(app, raise_server_exceptions=False)  # not entered: nothing here needs the engine to run
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("requestBody" in operation) == (method == "post" and reads_body(client, path)), path
            assert operation["responses"]["400"]["content"]["application/json"]["schema"]
    chat = document["components"]["schemas"]["ChatBody"]
    assert set(chat["properties"]) == set(ChatBody.model_fields)
    assert chat["properties"]["temperature"]["minimum"] == 0
    assert all("description" in field for field in chat["properties"].values())
    assert not {"ValidationError", "HTTPValidationError"} & set(document["components"]["schemas"])


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with served(app) as url:
        yield url


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(url: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.fuzz.schemathesis_run import run_cases

        seen = run_cases(url, 15, seed=0)
    assert sum(seen.values()) >= 15
    assert not [key for key in seen if key.rsplit(" ", 1)[1].startswith("5")]
