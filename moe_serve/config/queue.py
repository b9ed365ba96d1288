"""QueueConfig: which requests may wait, and how long a request may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, option


@dataclass(frozen=True)
class QueueConfig(Settings):
    """Limits on what clients ask of a server."""

    HEADING: ClassVar[str] = "Queue and limits"

    max_num_queued_reqs: int = option(
        1024, "Most waiting requests; the server refuses further ones with 503.", bound="not negative"
    )
    max_num_queued_tokens: int | None = option(
        None,
        "Most waiting prompt tokens; the server refuses further requests with 503. Default: no limit.",
        bound="not negative",
    )
    max_queue_wait_s: float | None = option(
        None,
        "Longest wait for a place in the batch, in seconds. The server refuses a request with 503 when it would wait"
        " longer, or has waited that long. During an overload, only one request per 16 places may wait"
        " (docs/operation.md). Default: no limit.",
        bound="positive",
        aliases=("max_queue_wait",),
    )
    max_concurrent_per_client: int | None = option(
        None,
        "Most requests that one client may have in flight, each prompt counted; the server refuses further ones with"
        " 429. A client is an API key; without keys, an address. Default: no limit.",
        bound="positive",
    )
    max_prompt_tokens: int | None = option(
        None,
        "Longest prompt, in tokens; the server refuses longer ones with 400. Default: the context length.",
        bound="positive",
    )
    request_timeout_s: float | None = option(
        None,
        "Longest time for one request, in seconds; then it ends with an error. Default: no limit.",
        bound="positive",
        aliases=("request_timeout",),
    )
    grammar_timeout_s: float = option(
        10.0,
        "Most CPU time for compiling one request's grammar or JSON schema, in seconds; then the server refuses it with"
        " 400.",
        bound="positive",
    )
    grammar_memory_mib: int = option(
        1024,
        "Most memory for one grammar's process, in MiB; all of them together may take four times as much.",
        bound="positive",
    )
