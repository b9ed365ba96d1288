"""docs/architecture.md, docs/glossary.md and SECURITY.md point at what exists; the site has every page."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from moe_serve.hf.families import family_names
from tests.support.scripts import docs_script

ROOT = Path(__file__).resolve().parents[1]
WALK = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
PACKAGES = ("moe_serve", "expert_cache", "kernels", "predictors", "placement")
TEXTS = (".md", ".py", ".service", ".yaml", ".txt")
FOLDERS = r"(?:moe_serve|expert_cache|kernels|predictors|placement|tests)"
POINTER = rf"`({FOLDERS}/[\w/]+\.py)`,\s+`([\w.]+)`"
PATHS = re.findall(rf"`({FOLDERS}/[\w/]*[\w.]*)`", WALK + GLOSSARY + SECURITY)
WORDS = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", GLOSSARY, flags=re.MULTILINE)


def texts_of(paths: Iterable[Path]) -> str:
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *paths])


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods (as Class.method) and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(inner.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def test_the_walk_is_long_enough_to_be_one() -> None:
    assert len(re.findall(POINTER, WALK)) >= 20


def test_every_word_of_the_glossary_has_one_meaning_and_a_place() -> None:
    words = [word for word, _ in WORDS if word not in ("Word", "---")]
    assert len(words) >= 40
    assert len(set(words)) == len(words)
    assert [word for word, where in WORDS if word not in ("Word", "---") and not re.search(POINTER, where)] == []


@pytest.mark.parametrize(("path", "name"), sorted(set(re.findall(POINTER, WALK + GLOSSARY + SECURITY))))
def test_every_name_is_where_the_docs_say(path: str, name: str) -> None:
    assert name in defined_names(ROOT / path)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_readme_lists_each_family_by_how_it_decodes() -> None:
    assert docs_script("write_families").renewed(README) == README, "run: python docs/write_families.py"
    assert all(f" {name}," in README or f" {name} |" in README for name in family_names())


def test_the_page_of_families_is_of_today() -> None:
    writer = docs_script("write_families")
    assert writer.page() == (ROOT / "docs" / "families.md").read_text(), "run: python docs/write_families.py"


def test_the_site_lists_every_page() -> None:
    """mkdocs itself would only say so when the site is built."""
    listed = re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text())
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)", README))))
def test_every_link_of_the_readme_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_what_users_are_told_to_install_is_this_distribution() -> None:
    """PyPI's `moe-serve` is another one. An extra that is named exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [p for f in ("docs", "deploy", "examples", *PACKAGES) for p in (ROOT / f).rglob("*") if p.suffix in TEXTS]
    asked = re.findall(r"(?:pip|pipx) (?:install|run)(?: -\S+)* '?(moe-serve[\w-]*)(?:\[(\w+)\])?", texts_of(files))
    assert len(asked) >= 10
    assert {name for name, _ in asked} == {project["name"]}
    assert {extra for _, extra in asked if extra} <= set(project["optional-dependencies"])
