"""/v1/chat/completions and the smaller endpoints: the JSON of whole and streamed answers."""

from __future__ import annotations

from typing import Any

from moe_serve.resolve import computing

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]


def test_whole_answer_has_openais_shape(served: Any, sentence: str) -> None:
    answer = served.post(PATH, messages=HELLO, max_tokens=5)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert sentence.startswith(choice["message"]["content"])
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 5


def test_stream_is_role_then_text_then_finish_then_usage(served: Any) -> None:
    chunks = served.stream(PATH, messages=HELLO, max_tokens=6, stream_options={"include_usage": True})
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[1:-1])
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_streamed_text_equals_whole_text(make: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 70, "n": 2, "stop": ["dog", "你好"]}
    whole = make().post(PATH, **body)["choices"]
    texts = ["", ""]
    for chunk in make().stream(PATH, **body):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == [c["message"]["content"] for c in whole]
    assert [c["finish_reason"] for c in whole] == ["stop", "stop"]


def test_every_choice_gets_its_role_chunk(served: Any) -> None:
    chunks = served.stream(PATH, messages=HELLO, max_tokens=3, n=3)
    assert [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]] == [0, 1, 2]


def test_logprobs_carry_exact_bytes(served: Any) -> None:
    choice = served.post(PATH, messages=HELLO, max_tokens=60, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 60
    assert (
        bytes(b for token in content for b in token["bytes"]).decode(errors="replace") == choice["message"]["content"]
    )
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}


def test_logprobs_without_top_have_empty_alternatives(served: Any) -> None:
    chunks = served.stream(PATH, messages=HELLO, max_tokens=3, logprobs=True)
    tokens = [t for c in chunks if c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == 3
    assert tokens[0]["top_logprobs"] == []


def test_token_ids_come_back_when_asked(make: Any) -> None:
    whole = make().post(PATH, messages=HELLO, max_tokens=30, return_token_ids=True)["choices"][0]["token_ids"]
    chunks = make().stream(PATH, messages=HELLO, max_tokens=30, return_token_ids=True)
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == whole


def test_content_parts_are_joined(make: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    whole = make().post(PATH, messages=HELLO, max_tokens=1)
    split = make().post(PATH, messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert whole["usage"] == split["usage"]


def test_max_completion_tokens_wins_over_max_tokens(served: Any) -> None:
    answer = served.post(PATH, messages=HELLO, max_tokens=9, max_completion_tokens=4)
    assert answer["usage"]["completion_tokens"] == 4


def test_no_limit_means_the_rest_of_the_context(make: Any) -> None:
    usage = make(max_model_len=40).post(PATH, messages=HELLO)["usage"]
    assert usage["total_tokens"] == 40


def test_harmless_values_of_unsupported_fields_pass(served: Any) -> None:
    served.post(PATH, messages=HELLO, max_tokens=1, tools=[], response_format={"type": "text"}, tool_choice="none")


def test_tokenize_and_detokenize_are_inverse(make: Any) -> None:
    tokens = make().post("/tokenize", prompt="lazy 你好", return_token_strs=True)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert make().post("/detokenize", tokens=tokens["tokens"]) == {"prompt": "lazy 你好"}
    chat = make().post("/tokenize", messages=HELLO)
    usage = make().post(PATH, messages=HELLO, max_tokens=1)["usage"]
    assert chat["count"] == usage["prompt_tokens"]


def test_information_endpoints(served: Any) -> None:
    health, version, models, model = served.talk(
        ("/health", None), ("/version", None), ("/v1/models", None), ("/v1/models/fake-model", None)
    )
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    assert version.json() == {"version": "1.2.3", **computing(served.engine.config)}
    assert set(version.json()) == {"version", "device", "dtype", "instruction_set", "threads"}
    assert models.json() == {"object": "list", "data": [model.json()]}
    assert model.json()["max_model_len"] == 512
