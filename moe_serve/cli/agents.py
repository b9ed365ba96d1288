"""Coding agents that `moe-serve launch` starts: what each reads from its environment and its command line.

Knows no server and starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NO_KEY = "none"
"""Agents insist on a key; a server without keys takes any."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a server, as an agent must know it."""

    url: str
    """Without a path."""
    model: str
    max_model_len: int
    """Tokens of prompt and answer together."""
    key: str = field(default=NO_KEY, repr=False)

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent. Its name is its executable's."""

    install: str
    """A command that installs it."""
    environment: Callable[[Served], Mapping[str, str]]
    arguments: Callable[[Served], list[str]] = lambda served: []
    """What goes before the user's own arguments."""


def environment_of(agent: Agent, served: Served) -> dict[str, str]:
    """Variables to set: those that OpenAI's clients read, and the agent's own."""
    common = {"OPENAI_BASE_URL": served.openai_url, "OPENAI_API_KEY": served.key}
    return {**common, **agent.environment(served)}


def _claude(served: Served) -> dict[str, str]:
    roles = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL")
    return {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key,
        "ANTHROPIC_API_KEY": "",  # one for Anthropic's own servers would go first
        **{f"ANTHROPIC_{role}": served.model for role in roles},
        "CLAUDE_CODE_SUBAGENT_MODEL": served.model,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _codex_arguments(served: Served) -> list[str]:
    """Codex reads its provider from settings; a TOML string is written as JSON writes it."""
    provider = {"name": "moe-serve", "base_url": served.openai_url, "wire_api": "responses"}
    provider["env_key"] = "OPENAI_API_KEY"
    settings: dict[str, Any] = {f"model_providers.moe-serve.{name}": value for name, value in provider.items()}
    settings |= {"model_provider": "moe-serve", "model": served.model, "model_context_window": served.max_model_len}
    return [word for name, value in settings.items() for word in ("-c", f"{name}={json.dumps(value)}")]


def _opencode(served: Served) -> dict[str, str]:
    limit = {"context": served.max_model_len, "output": served.max_model_len}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "moe-serve",
        "options": {"baseURL": served.openai_url, "apiKey": served.key},
        "models": {served.model: {"name": served.model, "limit": limit}},
    }
    config = {"model": f"moe-serve/{served.model}", "provider": {"moe-serve": provider}}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}


def _aider(served: Served) -> dict[str, str]:
    return {"OPENAI_API_BASE": served.openai_url, "AIDER_MODEL": f"openai/{served.model}"}


AGENTS: Mapping[str, Agent] = MappingProxyType(
    {
        "claude": Agent("npm install -g @anthropic-ai/claude-code", _claude),
        "codex": Agent("npm install -g @openai/codex", lambda served: {}, _codex_arguments),
        "opencode": Agent("npm install -g opencode-ai", _opencode),
        "aider": Agent("pipx install aider-chat", _aider),
    }
)
