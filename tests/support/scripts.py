"""Scripts loaded by path, because their folder is no package: those in docs/ that write tables, and examples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def docs_script(name: str) -> Any:
    """The module docs/NAME.py."""
    return script(DOCS / f"{name}.py")


def script(path: Path) -> Any:
    """The module in this file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
