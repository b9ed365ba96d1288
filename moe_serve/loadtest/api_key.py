"""The key that a client sends: from a flag, or from the variables that server and OpenAI's clients read."""

from __future__ import annotations

import argparse
import os

VARIABLES = ("MOE_SERVE_API_KEY", "OPENAI_API_KEY")


def add_key_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"Key to send to the server. Default: the variable {' or '.join(VARIABLES)}, which other users of this"
        " machine cannot read.",
    )


def key_of(key: str | None) -> str | None:
    """`key`, else the first variable that is set."""
    return key or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)


def headers_of(key: str | None) -> dict[str, str]:
    """The Authorization header for `key`, else for the first variable that is set; empty without a key."""
    found = key_of(key)
    return {"Authorization": f"Bearer {found}"} if found else {}
