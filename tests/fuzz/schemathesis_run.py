"""Schemathesis against our own OpenAPI document: requests it allows, and requests it does not.

    python tests/fuzz/schemathesis_run.py --cases 10000

The server is real down to the sampler; the model is noise. Checks: no 5xx, only documented statuses,
content types and bodies, and no acceptance of what the document forbids. A refused body is sent again
without the field that the refusal names, so that some reach the engine. Prints JSON last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from schemathesis import Case, GenerationMode
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.result import Err, Result
from schemathesis.specs.openapi import checks as openapi_checks

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.fuzz.harness import random_app, served

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]
CHUNK = 100
TIMEOUT_S = 60
MAX_REPAIRS = 12

Operation = schemathesis.APIOperation[Any, Any, Any, Any]
AnyCase = Case[Any]


def run_cases(url: str, num_cases: int, seed: int) -> Counter[str]:
    """Send at least `num_cases` requests; how many got which status, by operation. A failed check raises."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [_operation(result) for result in schema.get_all_operations()]
    seen: Counter[str] = Counter()
    with requests.Session() as session:
        while sum(seen.values()) < num_cases:
            for operation in operations:
                _fuzz_operation(operation, session, min(CHUNK, num_cases), seed, seen)
            seed += 1
            print(f"{sum(seen.values())} cases", file=sys.stderr, flush=True)
    return seen


def _operation(found: Result[Operation, InvalidSchema]) -> Operation:
    if isinstance(found, Err):
        raise found.err()
    return found.ok()


def _fuzz_operation(
    operation: Operation, session: requests.Session, examples: int, seed: int, seen: Counter[str]
) -> None:
    good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    is_fixed = operation.body is None or not len(operation.body)
    strategy = good if is_fixed else good | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=1 if is_fixed else examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def send(case: AnyCase) -> None:
        _serve_any_model(case)
        field = _send(case, session, seen, CHECKS)
        for _ in range(MAX_REPAIRS):
            if not isinstance(case.body, dict) or case.body.pop(field, None) is None:
                break
            field = _send(case, session, seen, CHECKS[:-1])

    send()


def _send(case: AnyCase, session: requests.Session, seen: Counter[str], checks: list[Any]) -> str:
    """Send and check one case; the field that a 400 names, else ""."""
    response = case.call(session=session, timeout=TIMEOUT_S)
    seen[f"{case.operation.label} {response.status_code}"] += 1
    case.validate_response(response, checks=checks)
    return str(response.json()["error"].get("param", "")) if response.status_code == 400 else ""


def _serve_any_model(case: AnyCase) -> None:
    """Nearly every generated model name is unknown, and a 404 tests nothing behind it."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        del case.body["model"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    with served(random_app()) as url:
        seen = run_cases(url, args.cases, args.seed)
    total = sum(seen.values())
    server_errors = sum(count for key, count in seen.items() if key.rsplit(" ", 1)[1].startswith("5"))
    result = {"cases": total, "5xx": server_errors, "seconds": round(time.monotonic() - start), "by_status": seen}
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()
