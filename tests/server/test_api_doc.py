"""docs/api.md says what the code does."""

from __future__ import annotations

from typing import Any

from moe_serve.server.endpoints.reference.api_tables import tables
from tests.support.scripts import DOCS, docs_script


def test_the_tables_are_up_to_date() -> None:
    text = (DOCS / "api.md").read_text()
    assert text == docs_script("write_api").renewed(text), "run: python docs/write_api.py"


def test_every_endpoint_is_listed_and_says_what_it_does(served: Any) -> None:
    rows = tables().split("## All endpoints")[1].split("##")[0].splitlines()
    listed = {row.split("`")[1]: row.split(" | ")[1].rstrip(" |") for row in rows if row.startswith("| `")}
    document = served.app.openapi()
    operations = {f"{method.upper()} {path}" for path, found in document["paths"].items() for method in found}
    assert operations <= set(listed)
    assert all(listed.values())


def test_every_field_says_what_it_does() -> None:
    for row in tables().partition("| Field |")[2].splitlines():
        if row.startswith("| `"):
            assert row.split(" | ")[2].rstrip(" |"), row
