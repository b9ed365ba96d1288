"""Whatever a client sends wrong is a 4xx that names the field, and the next request is served."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

COMPLETION = {"prompt": "x", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]

# Changes to a good body, and the field the error must name.
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10_001}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": float("nan")}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"seed": 2**80}, "seed"),
    ({"seed": "one"}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {"cat": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "much"}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"json": "no json"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    ({"guided_regex": "(a"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "start: x"}, "guided_grammar"),
    ({"guided_json": {"$ref": "https://example.com/schema"}}, "guided_json"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": "word"}, "bad_words"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"priority": "high"}, "priority"),
    ({"priority": 2**31}, "priority"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "你好"}, "request_id"),
    ({"request_id": "a\r\nSet-Cookie: b"}, "request_id"),
    ({"max_tokens": 512}, "prompt"),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["x", 5]}, "prompt"),
    ({"prompt": [True, False]}, "prompt"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "word " * 2000}, "prompt"),
    ({"prompt": ["x", "word " * 2000]}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"min_tokens": 1, "max_tokens": 0}, "min_tokens"),
    ({"suffix": "!"}, "suffix"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages"),
    ({"messages": [{"role": "forbidden", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "prompt"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
    ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
]
CASES = [
    *(("/v1/completions", COMPLETION, *case) for case in BOTH + COMPLETION_ONLY),
    *(("/v1/chat/completions", CHAT, *case) for case in BOTH + CHAT_ONLY),
]


def case_name(case: Any) -> str:
    path, _, change, _ = case
    return f"{path[4:]} {json.dumps(change)[:50]}"


@pytest.mark.parametrize(("path", "good", "change", "param"), CASES, ids=map(case_name, CASES))
def test_bad_field_is_named_and_the_next_request_served(
    served: Any, path: str, good: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    bad = json.dumps({**good, **change}).encode()
    refused, after = served.talk((path, bad), (path, good))
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["param"], error["type"], error["code"]) == (param, "invalid_request_error", 400)
    assert error["message"]
    assert not re.search(r"\b0x[0-9a-f]{6,}", refused.text), "an address tells where the process has its memory"
    assert after.status_code == 200
    assert len(served.engine.finished) == 1, "nothing of the refused request ran"


RAW = {
    "malformed": b'{"prompt": "x"',
    "array": b"[1, 2]",
    "empty": b"",
    "not UTF-8": b'{"prompt": "\xff"}',
    "deeply nested": b'{"prompt": ' + b"[" * 100_000,
    "long integer": b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a pair in a name": b'{"prompt": "x", "\\uD800": 1}',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_a_body_that_is_no_json_object_is_refused(served: Any, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        refused, after = served.talk((path, raw), ("/v1/completions", COMPLETION))
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "body"
        assert after.status_code == 200
        served.async_engine.__init__(served.engine)  # a stopped engine does not start twice


def test_missing_fields_are_named(served: Any) -> None:
    completion, chat = served.talk(("/v1/completions", {}), ("/v1/chat/completions", {}))
    assert completion.json()["error"]["param"] == "prompt"
    assert chat.json()["error"]["param"] == "messages"


def test_unknown_field_gets_a_hint(served: Any) -> None:
    (refused,) = served.talk(("/v1/completions", {**COMPLETION, "temprature": 1}))
    assert "did you mean 'temperature'" in refused.json()["error"]["message"]


def test_wrong_model_and_unknown_path_are_404(served: Any) -> None:
    model, path, card = served.talk(
        ("/v1/completions", {**COMPLETION, "model": "gpt-4"}), ("/v1/nothing", {}), ("/v1/models/gpt-4", None)
    )
    assert (model.status_code, model.json()["error"]["param"]) == (404, "model")
    assert (path.status_code, path.json()["error"]["code"]) == (404, 404)
    assert (card.status_code, card.json()["error"]["type"]) == (404, "not_found_error")


def test_wrong_method_is_405_and_says_which_are_allowed(served: Any) -> None:
    (refused,) = served.talk(("/v1/completions", None))
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"
    assert refused.json()["error"]["code"] == 405


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", **{"messages": CHAT["messages"]}}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
)
def test_tokenization_names_the_field(served: Any, path: str, body: dict[str, Any], param: str) -> None:
    (refused,) = served.talk((path, body))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_request_id_in_flight_cannot_be_used_twice(served: Any) -> None:
    served.engine.gate.clear()
    body = {**COMPLETION, "request_id": "same"}

    async def run() -> list[int]:
        async with served.running() as client:
            first = asyncio.create_task(client.post("/v1/completions", json=body))
            while not served.async_engine.num_in_flight:
                await asyncio.sleep(0.01)
            second = await client.post("/v1/completions", json=body)
            assert second.json()["error"]["param"] == "request_id"
            served.engine.gate.set()
            third = await first and await client.post("/v1/completions", json=body)
            return [(await first).status_code, second.status_code, third.status_code]

    assert asyncio.run(run()) == [200, 400, 200]


def test_request_id_header_that_cannot_be_a_header_again_is_ignored(served: Any) -> None:
    async def run() -> Any:
        async with served.running() as client:
            headers = {b"X-Request-Id": "é".encode("latin-1")}
            return await client.post("/v1/completions", json=COMPLETION, headers=headers)

    response = asyncio.run(run())
    assert response.status_code == 200
    assert response.headers["x-request-id"].isascii()
