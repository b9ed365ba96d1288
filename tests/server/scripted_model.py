"""A running server whose model says what a test scripts (or noise), and the real openai client of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.engine.engine import Engine
from moe_serve.server.app import create_app
from moe_serve.text.tokenizer import Tokenizer
from tests.fuzz.harness import served
from tests.random_model import RandomRunner, random_engine

ASK: Any = [{"role": "user", "content": "The weather?"}]
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""A chat template without tools, as the demo model's."""
HERMES = (
    "{% if tools %}Tools: {{ tools | tojson }} Write <tool_call>...</tool_call>.\n{% endif %}"
    "{% if reasoning_effort is defined %}Effort: {{ reasoning_effort }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""One with tools, as the Hermes models write calls."""


class Model:
    """A running server of one chat template, its client, and what the model is to say."""

    def __init__(self, engine: Engine, client: openai.OpenAI) -> None:
        self.engine = engine
        self.client = client

    def says(self, text: str) -> None:
        assert isinstance(self.engine.runner, RandomRunner)
        tokenizer = self.engine.tokenizer
        self.engine.runner.script = [*tokenizer.encode(text), *tokenizer.eos_token_ids] if text else []

    def chat(self, **body: Any) -> Any:
        return self.client.chat.completions.create(**({"model": "tiny", "messages": ASK, "seed": 1} | body)).choices[0]

    def stream(self, **body: Any) -> tuple[Any, list[Any]]:
        """(the message put together from the chunks, the chunks)."""
        body = {"model": "tiny", "messages": ASK, "seed": 1, **body}
        with self.client.chat.completions.stream(**body) as events:
            chunks = [e.chunk for e in events if e.type == "chunk"]
            return events.get_final_completion().choices[0], chunks


def start(folder: Path, tmp_path: Path, chat_template: str, response_template: Any = None) -> Iterator[Model]:
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": chat_template}
    if response_template is not None:
        config["response_template"] = response_template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.from_path(str(tmp_path))
    engine = random_engine(tokenizer, max_model_len=1024, num_kv_pages=512)
    app = create_app(AsyncEngine(engine), tokenizer, model_name="tiny")
    with served(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield Model(engine, client)


def refused_param(call: Callable[[], object]) -> str | None:
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    return caught.value.param
