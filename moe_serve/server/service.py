"""Service: what the endpoints share, made once with the application instead of kept in globals.

Knows the engine's face, the tokenizer and the metrics; knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.errors import ModelNotFoundError
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.server.monitoring.metrics import Metrics
from moe_serve.server.preparation import Preparation
from moe_serve.text.answer_format import Template
from moe_serve.text.parser_names import ParserNames
from moe_serve.text.response_templates import template_of
from moe_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Service:
    """One served model: its engine, its names, and how the server was told to treat requests."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    metrics: Metrics
    preparation: Preparation
    model_name: str
    model_path: str = ""
    version: str = "0"
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's own sampling parameters."""
    log_requests: bool = False
    """Prompts may be logged."""
    with_dashboard: bool = True
    recording_dir: Path | None = None
    """Where recordings of routing are written; None: they are refused."""
    recording_buffer_tokens: int = 65536
    stored_responses_mib: int = 64
    """For the answers of /v1/responses; 0: none are kept."""
    parsers: ParserNames = field(default_factory=ParserNames)
    """How answers are to be read, where the settings say it."""
    ranks: ParallelEngine | None = None
    """The engine over ranks; None on one device."""
    started_s: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def response_template(self) -> Template | None:
        """How the model writes reasoning and tool calls, if that is known."""
        return template_of(self.tokenizer, self.parsers)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.core.max_model_len

    def check_model(self, name: str | None) -> None:
        """ModelNotFoundError unless the name, where one is given, is this model's."""
        if name not in (None, "", self.model_name, self.model_path):
            raise ModelNotFoundError(f"the model {name!r} does not exist; this server serves {self.model_name!r}")
