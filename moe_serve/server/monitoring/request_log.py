"""What an endpoint tells the log about its request: counts always, the prompt only where that was asked for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest

from moe_serve.scheduling.sequence import Request
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger
from moe_serve.server.monitoring.logs import FIELDS

if TYPE_CHECKING:
    from moe_serve.server.app import Service

log = logging.getLogger(__name__)


def note(http: HttpRequest, merger: AnswerMerger, service: Service) -> None:
    """Let access log and tracing know the request; with --log-requests, log each prompt as the model sees it."""
    http.state.merger = merger
    http.state.logged = lambda: _counts(merger)
    if service.log_requests:
        for request in merger.requests:
            _write(request, service)


def _counts(merger: AnswerMerger) -> dict[str, Any]:
    usage = merger.usage
    return {
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in merger.requests),
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def _write(request: Request, service: Service) -> None:
    prompt = service.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    fields = {"request_id": request.request_id, "prompt": prompt, "params": repr(request.params)}
    log.info("prompt", extra={FIELDS: fields})
