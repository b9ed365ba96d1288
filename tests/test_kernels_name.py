"""Guard: our folder `kernels/` never stands in for Hugging Face's package of the same name.

transformers asks whether a distribution `kernels` in its version range is installed, and if so
imports names from whatever package answers to `kernels`. Were that ours, every model file would
fail to import. The package is rebuilt here in a folder: metadata that claims an in-range version,
and exactly the names that transformers imports, read from its sources.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.dependency_versions_table import deps

ROOT = Path(__file__).parent.parent
MODELS = ["transformers.models.mixtral.modeling_mixtral", "transformers.models.qwen3_moe.modeling_qwen3_moe"]


def _names_transformers_imports() -> set[str]:
    source = Path(transformers.__file__).with_name("integrations") / "hub_kernels.py"
    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "kernels"]
    return {alias.name for node in froms for alias in node.names}


def _lowest_version_in_range() -> str:
    found = re.search(r">=([\d.]+)", deps["kernels"])
    assert found, deps["kernels"]
    return found.group(1)


@pytest.fixture
def hf_kernels(tmp_path: Path) -> Path:
    """A site folder where Hugging Face's `kernels` is installed, as far as transformers can tell."""
    version = _lowest_version_in_range()
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    package = tmp_path / "kernels"
    package.mkdir()
    body = "\n".join(f"class {name}:\n    pass" for name in sorted(_names_transformers_imports()))
    decorator = "def use_kernel_forward_from_hub(name):\n    return lambda cls: cls"
    function = "def use_kernelized_func(*args, **kwargs):\n    return lambda cls: cls"
    (package / "__init__.py").write_text(f"{body}\n{decorator}\n{function}\n")
    return tmp_path


def _import_in_repo_root(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with the repository root first on sys.path, as `python -c` and `python -m` have it."""
    env = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_transformers_imports_beside_our_folder(hf_kernels: Path) -> None:
    code = (
        "import moe_serve_kernels, transformers.utils.import_utils as u\n"
        f"assert u.is_kernels_available()\nimport {', '.join(MODELS)}\nimport kernels\nprint(kernels.__file__)"
    )
    done = _import_in_repo_root(code, hf_kernels)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(hf_kernels / "kernels" / "__init__.py")


def test_without_theirs_kernels_is_not_ours_either(tmp_path: Path) -> None:
    code = "import kernels; print(getattr(kernels, '__file__', None))"
    done = _import_in_repo_root(code, tmp_path)
    assert done.returncode != 0 or done.stdout.strip() == "None", "a bare folder must stay a bare folder"


@pytest.mark.slow
def test_the_guard_notices_a_package_named_kernels(hf_kernels: Path, tmp_path: Path) -> None:
    """The same import with an importable `kernels` of ours in front: it must fail, or the guard is blind."""
    shadow = tmp_path / "root"
    (shadow / "kernels").mkdir(parents=True)
    (shadow / "kernels" / "__init__.py").touch()
    env = os.environ | {"PYTHONPATH": str(hf_kernels)}
    done = subprocess.run(
        [sys.executable, "-c", f"import {MODELS[0]}"], cwd=shadow, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "cannot import name" in done.stderr
