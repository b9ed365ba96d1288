"""The OpenAPI document: complete, true to the bodies, and held against the server by schemathesis."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from moe_serve.server.endpoints.bodies.sampling_body import ChatBody
from tests.fuzz.harness import random_app, served

WITHOUT_BODY = {"/ping", "/stop_expert_distribution_record", "/dump_expert_distribution_record"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return random_app()


def test_every_post_shows_its_body_and_its_errors(app: FastAPI) -> None:
    document = app.openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("requestBody" in operation) == (method == "post" and path not in WITHOUT_BODY), path
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


def test_schemathesis_finds_no_server_error(url: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.fuzz.schemathesis_run import run_cases

        seen = run_cases(url, 15, seed=0)
    assert sum(seen.values()) >= 15
    assert not [key for key in seen if key.rsplit(" ", 1)[1].startswith("5")]
