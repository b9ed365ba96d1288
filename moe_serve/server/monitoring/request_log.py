"""What an endpoint tells the log about its request: counts always, the prompt only where that was asked for."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request as HttpRequest

from moe_serve.scheduling.sequence import Request
from moe_serve.server.monitoring.answered import Answered
from moe_serve.server.monitoring.logs import FIELDS
from moe_serve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def note(http: HttpRequest, answered: Answered, tokenizer: Tokenizer | None) -> None:
    """Let access log and tracing know the request; with a tokenizer, log each prompt as the model sees it."""
    http.state.answered = answered
    http.state.logged = lambda: _counts(answered)
    if tokenizer is not None:
        for request in answered.requests:
            _write(request, tokenizer)


def _counts(answered: Answered) -> dict[str, Any]:
    return {
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in answered.requests),
        "cached_tokens": answered.usage.cached_tokens,
        "completion_tokens": answered.usage.completion_tokens,
    }


def _write(request: Request, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    fields = {"request_id": request.request_id, "prompt": prompt, "params": repr(request.params)}
    log.info("prompt", extra={FIELDS: fields})
