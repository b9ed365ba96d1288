"""The layer rule, checked on the syntax tree of every file: no import is executed to check it.

A rule is a function from all imports of a source tree to complaints, so that the same rules run on
this repository and on small trees with a planted violation.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tools.count_arrows import FOLDER_OF, Graph, Import, arrows, circles, file_graph, module_files, read_imports

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "moe_serve": {"moe_serve", "expert_cache", "placement", "predictors", "moe_serve_kernels", "moe_serve_base"},
    "expert_cache": {"expert_cache", "predictors", "moe_serve_kernels", "moe_serve_base"},
    "placement": {"placement", "moe_serve_base"},
    "predictors": {"predictors", "moe_serve_base"},
    "moe_serve_base": {"moe_serve_base"},
    "moe_serve_kernels": {"moe_serve_kernels"},
}
# Library -> the only modules (with everything below them) that may import it.
ONLY_IN = {
    "fastapi": ("moe_serve.server", "moe_serve.scale"),
    "pydantic": ("moe_serve.server",),
    "starlette": ("moe_serve.server", "moe_serve.scale"),
    "uvicorn": ("moe_serve.server",),
    "prometheus_client": ("moe_serve.server", "moe_serve.scale"),
    "ray": ("moe_serve.scale",),
    "transformers": ("moe_serve",),
    "triton": ("moe_serve_kernels",),
    "torch": ("moe_serve", "expert_cache", "moe_serve_kernels", "predictors.methods"),
    "pulp": ("placement",),
}
# Importing one of these must not load a heavy library, not even through another of our modules.
TORCH_FREE = (
    "moe_serve.scheduling.admission",
    "moe_serve.scheduling.batch_choice",
    "moe_serve.scheduling.batch_plan",
    "moe_serve.scheduling.kv_pages",
    "moe_serve.scheduling.scheduler",
    "moe_serve.scheduling.sequence",
    "moe_serve.scheduling.stats",
    "moe_serve.expert_routes.route_recorder",
    "moe_serve.expert_routes.usage_forecast",
    "moe_serve.errors",
    "moe_serve.config",
    "moe_serve.cli",
    "expert_cache.policies",
    "expert_cache.simulation",
    "predictors.trace",
    "predictors.formats",
    "placement",
    "moe_serve_base",
)
# The first column of the table in the docs: what lies directly in moe_serve/; each imports only from those before it.
TABLE_ROWS = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
MOE_SERVE_ORDER = re.findall(r"`(\w+)`", " ".join(TABLE_ROWS))
# Package -> most arrows between its rooms (tools/count_arrows.py).
MOST_ARROWS = {"expert_cache": 60, "moe_serve.parallel": 30, "moe_serve.server": 25, "moe_serve_kernels": 9}
HEAVY = {"torch", "transformers", "triton", "fastapi", "pydantic"}


Rule = Callable[[list[Import]], Iterable[str]]


@cache
def our_imports() -> list[Import]:
    return read_imports(ROOT)


def top(name: str) -> str:
    return name.split(".")[0]


def inside(module: str, homes: Iterable[str]) -> bool:
    return any(module == home or module.startswith(home + ".") for home in homes)


def layers(imports: list[Import]) -> Iterator[str]:
    for item in imports:
        if top(item.target) in FOLDER_OF and top(item.target) not in MAY_IMPORT[top(item.module)]:
            yield f"{item}: {top(item.module)} may not import {top(item.target)}"


def _level(name: str) -> int | None:
    """Where in MOE_SERVE_ORDER a dotted name belongs; None for other packages and moe_serve's own public names."""
    parts = name.split(".")
    known = len(parts) > 1 and parts[0] == "moe_serve" and parts[1] in MOE_SERVE_ORDER
    return MOE_SERVE_ORDER.index(parts[1]) if known else None


def order(imports: list[Import]) -> Iterator[str]:
    for item in imports:
        importer, imported = _level(item.module), _level(item.target)
        if importer is not None and imported is not None and imported > importer:
            yield f"{item}: {MOE_SERVE_ORDER[imported]} comes after {MOE_SERVE_ORDER[importer]}"


def kernels_name(imports: list[Import]) -> Iterator[str]:
    for item in imports:
        if top(item.target) == "kernels":
            yield f"{item}: ours is moe_serve_kernels; `kernels` is Hugging Face's"


def libraries(imports: list[Import]) -> Iterator[str]:
    for item in imports:
        homes = ONLY_IN.get(top(item.target))
        if homes and not inside(item.module, homes):
            yield f"{item}: {top(item.target)} belongs in {', '.join(homes)}"


def _loaded_with(module: str) -> list[str]:
    """Importing a.b.c runs a and a.b as well."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def torch_free(imports: list[Import]) -> Iterator[str]:
    """Follow load-time imports from each TORCH_FREE module; complain where a heavy library is met."""
    by_module: dict[str, list[Import]] = {}
    for item in imports:
        if item.at_load:
            by_module.setdefault(item.module, []).append(item)
    for start in TORCH_FREE:
        starts = {m for m in by_module if inside(m, [start])} | set(_loaded_with(start))
        yield from _heavy_reached(start, sorted(starts), by_module)


def _heavy_reached(start: str, queue: list[str], by_module: dict[str, list[Import]]) -> Iterator[str]:
    seen = set(queue)
    while queue:
        for item in by_module.get(queue.pop(), []):
            if top(item.target) in HEAVY:
                yield f"{item}, which importing {start} reaches"
            new = set(_loaded_with(item.target)) - seen
            seen |= new
            queue.extend(new)


RULES: list[Rule] = [layers, order, kernels_name, libraries, torch_free]


def prints(root: Path) -> Iterator[str]:
    for module, path in module_files(root).items():
        if inside(module, ["moe_serve.cli"]):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{module}:{node.lineno} prints; use logging, or return what the CLI should print"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
def test_imports_keep_the_rule(rule: Rule) -> None:
    assert sorted(set(rule(our_imports()))) == []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return file_graph(our_imports(), module_files(ROOT))


def test_no_file_imports_itself_through_others(graph: Graph) -> None:
    assert circles(graph) == []


@pytest.mark.parametrize("package", MOST_ARROWS)
def test_the_rooms_of_a_package_import_little_of_one_another(graph: Graph, package: str) -> None:
    assert len(arrows(graph, package)) <= MOST_ARROWS[package]


def test_the_table_in_the_docs_names_everything_in_the_folder() -> None:
    found = {module.split(".")[1] for module in module_files(ROOT) if module.startswith("moe_serve.")}
    assert sorted(MOE_SERVE_ORDER) == sorted(found)


def test_only_the_command_line_prints() -> None:
    assert list(prints(ROOT)) == []


def test_tests_and_kernels_folder_are_no_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_really_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(
            line
            for name in ("gpu", "distributed", "plot", "otel", "ray", "sentencepiece", "tiktoken")
            for line in extras[name]
        ),
    ]
    return {_normal(re.split(r"[^\w.-]", line)[0]) for line in lines}


def _normal(distribution: str) -> str:
    """Distribution names are equal up to case and punctuation."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_imported_library_is_declared() -> None:
    outside = {top(i.target) for i in our_imports()} - set(sys.stdlib_module_names) - set(FOLDER_OF)
    owner = importlib.metadata.packages_distributions()
    missing = {name for name in outside if not {_normal(d) for d in owner.get(name, [name])} & _declared()}
    # starlette and anyio come with fastapi, which re-exports the one and runs on the other.
    assert missing - {"starlette", "anyio"} == set()


PLANTED = {
    "kernels/moe_serve_kernels/op.py": ("import expert_cache.storage.store", layers, "may not import expert_cache"),
    "placement/solve.py": ("from predictors import trace", layers, "may not import predictors"),
    "expert_cache/cache.py": (
        "def f():\n    from moe_serve import engine",
        layers,
        "may not import moe_serve",
    ),
    "moe_serve/scheduling/pages.py": ("from moe_serve.engine import engine", order, "engine comes after scheduling"),
    "moe_serve/text/words.py": ("def f():\n    from moe_serve import llm", order, "llm comes after text"),
    "predictors/methods/a.py": ("from kernels import x", kernels_name, "is Hugging Face's"),
    "moe_serve/engine/engine.py": ("from fastapi import FastAPI", libraries, "belongs in moe_serve.server"),
    "predictors/trace.py": ("import torch.nn", libraries, "belongs in"),
    "moe_serve/scheduling/scheduler.py": ("from moe_serve import helper", torch_free, "imports torch"),
    "moe_serve/cli/serve.py": ("from ..helper import f", torch_free, "imports torch"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_violation_is_caught(tmp_path: Path, where: str) -> None:
    source, rule, complaint = PLANTED[where]
    helper = tmp_path / "moe_serve" / "helper.py"
    for path, text in ((helper, "import torch"), (tmp_path / where, source)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [line for line in rule(read_imports(tmp_path)) if complaint in line]


def test_a_planted_circle_and_its_arrows_are_found(tmp_path: Path) -> None:
    sources = {
        "placement/a/one.py": "from placement.b.two import f\nimport placement.a.inner",
        "placement/a/inner.py": "",
        "placement/b/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from placement.c import g",
        "placement/c.py": "def g():\n    from placement.a import one",
    }
    for where, source in sources.items():
        (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / where).write_text(source)
    graph = file_graph(read_imports(tmp_path), module_files(tmp_path))
    assert circles(graph) == [["placement.a.one", "placement.b.two", "placement.c"]]
    assert len(arrows(graph, "placement")) == 3


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "def run():\n    import torch",
    ],
)
def test_an_import_that_does_not_happen_at_load_is_allowed(tmp_path: Path, source: str) -> None:
    scheduler = tmp_path / "moe_serve" / "scheduling" / "scheduler.py"
    scheduler.parent.mkdir(parents=True)
    scheduler.write_text(source)
    assert list(torch_free(read_imports(tmp_path))) == []


def test_a_planted_print_is_caught(tmp_path: Path) -> None:
    for folder in ("moe_serve", "moe_serve/cli"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "noisy.py").write_text("print('hello')")
    assert [line.split(":")[0] for line in prints(tmp_path)] == ["moe_serve.noisy"]
