"""Random JSON schemas through the real engine: does every answer parse and validate?

    python benchmarks/check_json_schemas.py --schemas 1000

Each schema is one request of the demo model (or --model) at temperature 1, many in a batch. jsonschema judges,
formats included. Answers cut by max_tokens are counted apart. Also measured: what masks cost. Prints JSON last.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import random
import time
from collections import Counter
from typing import Any

import jsonschema
from random_schemas import random_schema

from moe_serve import LLM, SamplingParams
from moe_serve.demo import MODEL
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Completion, GrammarKind, GrammarSpec

PROMPT = "Here is the JSON of a record:\n"


def is_rfc3339_date(value: object) -> bool:
    """RFC 3339 knows the year 0000, a leap year; Python's dates, and so jsonschema's own check, do not."""
    if isinstance(value, str):
        datetime.date.fromisoformat("2000" + value[4:] if value.startswith("0000") else value)
    return True


def judge(schema: dict[str, Any], completion: Completion) -> str:
    """ "valid", "cut" (by max_tokens), "unparsable" or "invalid"."""
    if completion.finish_reason is not FinishReason.STOP:
        return "cut"
    try:
        value = json.loads(completion.text)
    except ValueError:
        return "unparsable"
    checker = copy.deepcopy(jsonschema.Draft202012Validator.FORMAT_CHECKER)
    checker.checks("date", ValueError)(is_rfc3339_date)
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return "valid" if validator.is_valid(value) else "invalid"


def params_for(schema: dict[str, Any] | None, seed: int, max_tokens: int) -> SamplingParams:
    grammar = None if schema is None else GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    return SamplingParams(grammar=grammar, seed=seed, max_tokens=max_tokens, temperature=1.0)


def run(llm: LLM, schemas: list[dict[str, Any]], max_tokens: int, seed: int) -> dict[str, Any]:
    params = [params_for(schema, seed + i, max_tokens) for i, schema in enumerate(schemas)]
    start = time.monotonic()
    results = llm.generate([PROMPT] * len(schemas), params)
    seconds = time.monotonic() - start
    outcomes = [judge(s, r.completions[0]) for s, r in zip(schemas, results, strict=True)]
    tokens = sum(len(r.completions[0].token_ids) for r in results)
    failures = [
        {"schema": s, "text": r.completions[0].text, "outcome": outcome}
        for s, r, outcome in zip(schemas, results, outcomes, strict=True)
        if outcome != "valid"
    ]
    return {"outcomes": Counter(outcomes), "tokens": tokens, "seconds": round(seconds, 1), "failures": failures[:5]}


def mask_cost(llm: LLM, num_seqs: int, length: int) -> dict[str, float]:
    """Tokens per second of equal work with and without a grammar, interleaved; the ratio is what masks cost."""
    grammar = GrammarSpec(GrammarKind.REGEX, r"(.|\n)*")
    rates: dict[str, list[float]] = {"free": [], "masked": []}
    for i in range(3):
        for name, spec in (("free", None), ("masked", grammar)):
            params = SamplingParams(grammar=spec, max_tokens=length, min_tokens=length, temperature=1.0, seed=i)
            start = time.monotonic()
            llm.generate([PROMPT] * num_seqs, params)
            rates[name].append(num_seqs * length / (time.monotonic() - start))
    best = {name: max(values) for name, values in rates.items()}
    return {f"{k}_tokens_per_s": round(v) for k, v in best.items()} | {"ratio": round(best["masked"] / best["free"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    schemas = [random_schema(rng) for _ in range(args.schemas)]
    llm = LLM(args.model, max_num_seqs=64)
    result = run(llm, schemas, args.max_tokens, args.seed)
    result["mask_cost"] = mask_cost(llm, 32, 64)
    llm.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
