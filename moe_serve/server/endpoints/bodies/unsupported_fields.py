"""Fields of the OpenAI and vLLM APIs that are refused by name, with the values that change nothing.

Data only; parsing.py enforces it and docs/api.md lists it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused, and which values of it are harmless and therefore accepted."""

    why: str
    harmless: tuple[Any, ...] = (None,)
    is_planned: bool = False


BOTH = MappingProxyType(
    {
        "best_of": Refusal("deprecated by OpenAI; use n", (None, 1)),
        "use_beam_search": Refusal("no beam search", (None, False)),
        "length_penalty": Refusal("belongs to beam search", (None, 1, 1.0)),
        "early_stopping": Refusal("belongs to beam search", (None, False)),
        "spaces_between_special_tokens": Refusal("spaces are the tokenizer's own", (None, True)),
        "guided_decoding_backend": Refusal("the one backend is llguidance", (None, "auto", "guidance")),
        "guided_whitespace_pattern": Refusal("white space is bounded by the server"),
        "lora_request": Refusal("no LoRA adapters"),
        "kv_transfer_params": Refusal("no disaggregated prefill"),
        "logits_processors": Refusal("a client must not bring code"),
        "service_tier": Refusal("one tier; use priority", (None, "auto", "default")),
    }
)
COMPLETION = MappingProxyType({**BOTH, "suffix": Refusal("no fill-in-the-middle", (None, ""))})
CHAT = MappingProxyType(
    {
        **BOTH,
        "functions": Refusal("deprecated by OpenAI; use tools", (None, [])),
        "function_call": Refusal("deprecated by OpenAI; use tool_choice", (None, "none", "auto")),
        "audio": Refusal("text only"),
        "modalities": Refusal("text only", (None, ["text"])),
        "mm_processor_kwargs": Refusal("text only"),
        "prediction": Refusal("no predicted outputs"),
        "store": Refusal("answers are not kept", (None, False)),
        "web_search_options": Refusal("no web search"),
        "verbosity": Refusal("ask for it in a message", (None, "medium")),
        "moderation": Refusal("nothing is moderated"),
        "echo": Refusal("no echo of a conversation", (None, False)),
        "chat_template": Refusal("a client must not bring code; start with --chat-template"),
        "documents": Refusal("put them into a message", (None, [])),
    }
)
MESSAGES = MappingProxyType(
    {
        "container": Refusal("no tools run here"),
        "mcp_servers": Refusal("the client calls its own MCP servers", (None, [])),
        "fallbacks": Refusal("one model is served", (None, [])),
        "compaction": Refusal("nothing is compacted"),
        "thread": Refusal("conversations are not kept; send the whole of it as messages"),
    }
)
RESPONSES = MappingProxyType(
    {
        "conversation": Refusal("conversations are not kept; use previous_response_id"),
        "background": Refusal("an answer ends with its connection", (None, False)),
        "prompt": Refusal("no stored prompts"),
        "truncation": Refusal("a conversation that is too long is an error", (None, "disabled")),
        "max_tool_calls": Refusal("no built-in tools"),
        "context_management": Refusal("nothing is compacted"),
        "stream_options": Refusal("events have no options", (None, {}, *({"include_obfuscation": b} for b in (0, 1)))),
        "moderation": Refusal("nothing is moderated"),
        "service_tier": BOTH["service_tier"],
    }
)
