"""vLLM's `prompt_logprobs`: what the model thought of each token of a prompt, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_serve.scheduling.sequence import TokenLogprob
from moe_serve.server.endpoints.answers.answer_merger import json_logprob
from moe_serve.text.tokenizer import Tokenizer


def prompt_scores(scores: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """One entry per prompt token: null for the first, then by token id the token itself and the likeliest."""
    return [None, *(_entry(score, tokenizer) for score in scores)]


def _entry(score: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    likeliest = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(score.top, 1)]
    entry: dict[str, Any] = {}
    for token_id, logprob, rank in [(score.token_id, score.logprob, score.rank), *likeliest]:
        text = tokenizer.token_text(token_id)
        entry.setdefault(str(token_id), {"logprob": json_logprob(logprob), "rank": rank, "decoded_token": text})
    return entry
