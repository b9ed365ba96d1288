"""Write the tables of model families anew: `python docs/write_families.py`. The one in README stands between two marks;
docs/families.md is written whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from moe_serve.hf.families import MISSING, family_names
from moe_serve.hf.family import Family, find

BEGIN, END = "<!-- written by docs/write_families.py -->\n", "<!-- end of what it writes -->\n"
EXPERTS = re.compile(r"^class (\w+Experts)\(", re.MULTILINE)
MODEL_TYPE = re.compile(r'model_type = "([\w-]+)"')
PAGE = """# Model families

Written by `python docs/write_families.py` from the installed transformers: every model of it that has experts, and
whether it is served. Steps are whole where a CPU runs a decoding step in one kernel call. Elsewhere transformers'
modules run it, which takes about 2.5 times as long.

Every served family has the same tests. In float32 its greedy tokens are those of transformers' `generate`: alone,
batched, in chunks, preempted, from the prefix cache, and with room for half of the experts.

{served} of {all} are served. Another model is refused by name when it is loaded. So is one with a layer, an activation
or a tensor that is not known.

| Model in transformers | `model_type` served | Whole steps on CPUs | Missing |
|---|---|---|---|
{rows}
"""


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


def page() -> str:
    """docs/families.md."""
    served = families_by_model()
    rows = [_page_row(model, served.get(model, [])) for model in models_with_experts()]
    return PAGE.format(
        served=sum(bool(served.get(m)) for m in models_with_experts()), all=len(rows), rows="\n".join(rows)
    )


def _page_row(model: str, names: list[str]) -> str:
    if not names:
        return f"| {model} | - | - | {missing_of(model)} |"
    steps = dict.fromkeys(whole_steps(find(name)) for name in names)
    return f"| {model} | {', '.join(names)} | {'; '.join(steps)} | |"


def whole_steps(family: Family) -> str:
    """Whether the CPU's kernel runs a family's decoding steps, and else why not."""
    if family.plain_layers:
        return "yes"
    if family.recurrence is not None:
        return "no: states in some layers"
    if family.adapt is not None:
        return "no: attention or experts of another kind"
    return "no: norms, gates or windows that the kernel does not know"


def missing_of(model: str) -> str | None:
    """What MISSING says of a model of transformers; None: nothing."""
    types = MODEL_TYPE.findall("".join(f.read_text() for f in sorted((_models() / model).glob("configuration_*.py"))))
    return next((MISSING[name] for name in [model, *types] if name in MISSING), None)


def models_with_experts() -> dict[str, list[str]]:
    """transformers' folder of each model that has experts -> the classes of these."""
    files = sorted(_models().glob("*/modeling_*.py"))
    found = {file.parent.name: EXPERTS.findall(file.read_text()) for file in files}
    return {model: classes for model, classes in found.items() if classes}


def families_by_model() -> dict[str, list[str]]:
    """transformers' folder -> our families of that name, or whose experts are defined there."""
    owner = {name: model for model, classes in models_with_experts().items() for name in classes}
    served: dict[str, list[str]] = {}
    for name in family_names():
        model = name if name in owner.values() else owner.get(find(name).experts_class, "")
        served.setdefault(model, []).append(name)
    return served


def _models() -> Path:
    spec = find_spec("transformers.models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    readme, families = Path(__file__).parents[1] / "README.md", Path(__file__).with_name("families.md")
    readme.write_text(renewed(readme.read_text()))
    families.write_text(page())
