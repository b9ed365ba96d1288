"""AsyncLLM: what LLM answers, many requests at once, inside an event loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from moe_serve import LLM, AsyncLLM, ConfigError, InvalidRequestError, SamplingParams
from moe_serve.cli.flags import default_model
from tests.patience import PATIENCE_S

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = ["It was a dark and", "The old captain", "Hello"]
TALK = [{"role": "user", "content": "Hello!"}]
SMALL: dict[str, Any] = {"max_model_len": 256, "num_kv_pages": 64, "num_threads": 1}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    """Token ids by LLM, for the prompts and the conversation."""
    with LLM(default_model(), **SMALL) as llm:
        yield [list(r.outputs[0].token_ids) for r in [*llm.generate(PROMPTS, GREEDY), *llm.chat(TALK, GREEDY)]]


def test_requests_at_once_answer_as_llm_does(expected: list[list[int]]) -> None:
    async def run() -> list[list[int]]:
        async with AsyncLLM(default_model(), **SMALL) as llm:
            results = await asyncio.gather(*(llm.generate(p, GREEDY) for p in PROMPTS), llm.chat(TALK, GREEDY))
            async with aclosing(llm.stream(llm.get_tokenizer().encode(PROMPTS[0]), GREEDY)) as pieces:
                streamed = [token async for piece in pieces for token in piece.token_ids]
            assert streamed == results[0].outputs[0].token_ids
            assert len(results[0].prompt_token_ids) > 0
            return [list(result.outputs[0].token_ids) for result in results]

    assert asyncio.run(run()) == expected


def test_a_stream_that_is_left_ends_its_request() -> None:
    async def run() -> None:
        async with AsyncLLM(default_model(), **SMALL) as llm:
            async with aclosing(llm.stream("Once", SamplingParams(max_tokens=200, ignore_eos=True))) as pieces:
                async for _ in pieces:
                    break
            async with asyncio.timeout(PATIENCE_S):
                while llm.engine.num_in_flight:
                    await asyncio.sleep(0.01)
            with pytest.raises(InvalidRequestError, match="prompt"):
                await llm.generate({"text": "x"}, GREEDY)
            with pytest.raises(InvalidRequestError, match="context"):
                await llm.generate("word " * 400, GREEDY)

    asyncio.run(run())


def test_a_wrong_setting_names_this_class() -> None:
    with pytest.raises(ConfigError, match="AsyncLLM has no setting 'max_num_sqs'; did you mean max_num_seqs"):
        AsyncLLM("no/model", max_num_sqs=4)


def test_the_example_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "async_embedding.py"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.startswith("It was a dark and stormy night, and")
    assert len(done.stdout.splitlines()) >= 5
