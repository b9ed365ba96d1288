"""POST /moe_cache: the expert cache's memory, changed while serving."""

from __future__ import annotations

from typing import Any


def test_resizing_reaches_the_engine(served: Any) -> None:
    (answer,) = served.talk(("/moe_cache", {"mib": 64}))
    assert answer.status_code == 200
    assert answer.json() == {"mib": 64}
    assert served.engine.expert_cache_mib == 64
    assert served.engine.is_closed  # the app has been shut down since


def test_what_the_engine_refuses_is_a_400_that_names_the_field(served: Any) -> None:
    refused, good = served.talk(("/moe_cache", {"mib": 101}), ("/v1/completions", {"prompt": [5], "max_tokens": 2}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "mib"
    assert good.status_code == 200


def test_bad_sizes_are_refused(served: Any) -> None:
    for answer in served.talk(*(("/moe_cache", body) for body in ({"mib": 0}, {"mib": "many"}, {}))):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "mib"
