"""Write the tables of docs/api.md anew: `python docs/write_api.py`. What stands above the mark is kept."""

from __future__ import annotations

from pathlib import Path

from moe_serve.server.endpoints.reference.api_tables import tables

MARK = "<!-- Below: written by docs/write_api.py from the code. -->\n"


def renewed(text: str) -> str:
    """The file with its tables replaced."""
    head = text.partition(MARK)[0]
    return f"{head}{MARK}\n{tables()}"


if __name__ == "__main__":
    path = Path(__file__).with_name("api.md")
    path.write_text(renewed(path.read_text()))
