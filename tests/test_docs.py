"""docs/architecture.md points at files and names that exist, so a reader finds each step where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = r"(?:moe_serve|expert_cache|kernels|predictors|placement|tests)"
POINTERS = re.findall(rf"`({FOLDERS}/[\w/]+\.py)`,\s+`([\w.]+)`", TEXT)
PATHS = re.findall(rf"`({FOLDERS}/[\w/]*[\w.]*)`", TEXT)


def defined_names(path: Path) -> set[str]:
    """Functions, classes and methods (as Class.method) of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(inner.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def test_the_walk_is_long_enough_to_be_one() -> None:
    assert len(POINTERS) >= 20


@pytest.mark.parametrize(("path", "name"), POINTERS)
def test_every_step_is_where_the_walk_says(path: str, name: str) -> None:
    assert name in defined_names(ROOT / path)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()
