"""What `pip install moe-serve-engine` puts into site-packages: six packages, the demo model, no tests.

The wheel is built from a copy, with the weights left out, so that it is quick and leaves no trace.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("moe_serve", "expert_cache", "placement", "predictors", "moe_serve_base")
SOURCES = (*PACKAGES, "kernels", "tests", "benchmarks", "examples")
FILES = ("pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in SOURCES:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    model = tree / "moe_serve" / "demo" / "model"
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").touch()
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_top_level_names(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names if ".dist-info" not in name}
    assert tops == {*PACKAGES, "moe_serve_kernels"}


def test_every_module_and_marker_is_there(wheel_names: list[str]) -> None:
    homes = {folder: folder for folder in PACKAGES} | {"moe_serve_kernels": "kernels/moe_serve_kernels"}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in homes.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected - set(wheel_names) == set()
    assert {f"{package}/py.typed" for package in homes} <= set(wheel_names)


def test_the_demo_model_is_there(wheel_names: list[str]) -> None:
    assert "moe_serve/demo/model/model.safetensors" in wheel_names


def test_the_dashboard_is_there(wheel_names: list[str]) -> None:
    files = {f"moe_serve/server/static/{path.name}" for path in (ROOT / "moe_serve/server/static").iterdir()}
    assert len(files) > 5
    assert files <= set(wheel_names)
