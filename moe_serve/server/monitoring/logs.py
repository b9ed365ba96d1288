"""Log lines: for people, or one JSON object each for a collector. Knows logging; knows no requests."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FIELDS = "fields"
"""`extra={FIELDS: {...}}` on a log call: what the line says, by name."""


class TextFormatter(logging.Formatter):
    """The message, then `name=value` words, then the record's traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {})
        words = "".join(f" {name}={_one_word(value)}" for name, value in fields.items())
        return super().formatMessage(record) + words


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message"}, then the record's own fields, then its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _one_word(value: object) -> str:
    """Paths and prompts are the client's: no line break of theirs may start a line of ours."""
    text = str(value)
    return text if text.isprintable() and " " not in text else ascii(text)


def set_up(log_format: str) -> None:
    """Send every logger's lines to stderr, uvicorn's too, which would otherwise print its own way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
