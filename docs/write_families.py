"""Write README's table of model families anew: `python docs/write_families.py`. It stands between the two marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_serve.hf.families import family_names
from moe_serve.hf.family import find

BEGIN, END = "<!-- written by docs/write_families.py -->\n", "<!-- end of what it writes -->\n"


def table() -> str:
    """How many families there are, and which of them decode in which way."""
    names = family_names()
    plain = [name for name in names if find(name).plain_layers]
    rows = [
        f"{len(names)} of transformers' architectures are supported, named by `model_type` in config.json:\n",
        "| | `model_type` |",
        "|---|---|",
        _row("decoding in one kernel call on CPUs", plain),
        _row("through transformers' modules", (name for name in names if name not in plain)),
    ]
    return "\n".join(rows) + "\n"


def _row(kind: str, names: Iterable[str]) -> str:
    return f"| {kind} | {', '.join(names)} |"


def renewed(text: str) -> str:
    """README with the table of today."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{table()}{END}{tail}"


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "README.md"
    path.write_text(renewed(path.read_text()))
