"""Whether the network may be asked: huggingface_hub's own switches, read from the environment that is given."""

from __future__ import annotations

from collections.abc import Mapping

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
ON = {"1", "ON", "YES", "TRUE"}


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether one of Hugging Face's switches forbids the network."""
    return any(environment.get(name, "").upper() in ON for name in SWITCHES)
