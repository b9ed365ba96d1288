"""Names of answer formats, as the settings give them: vLLM's. Imports no transformers, so that a wrong name is told at
once. Knows formats' names; knows no tokenizer and no answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.errors import ConfigError
from moe_serve.text.answer_format import AnswerFormat
from moe_serve.text.answer_formats import FORMATS


@dataclass(frozen=True, slots=True)
class ParserNames:
    """What the server's settings say of answers; None: the tokenizer tells."""

    tool_calls: str | None = None
    """Of the format in which calls are read."""
    reasoning: str | None = None
    """Of the format in which reasoning is read, where it is another."""

    def check(self) -> None:
        """ConfigError lists the known names for another."""
        for flag, name, known in (
            ("--tool-call-parser", self.tool_calls, tool_parser_names()),
            ("--reasoning-parser", self.reasoning, reasoning_parser_names()),
        ):
            if name is not None and name not in known:
                raise ConfigError(f"{flag}: {name!r} is not one of {', '.join(known)}")


def tool_parser_names() -> list[str]:
    """Values of --tool-call-parser."""
    return sorted({name for form in formats() for name in form.tool_parsers})


def reasoning_parser_names() -> list[str]:
    """Values of --reasoning-parser."""
    return sorted({name for form in formats() for name in form.reasoning_parsers})


def formats() -> list[AnswerFormat]:
    """Every known one."""
    return [FORMATS.find(name) for name in FORMATS.names()]
