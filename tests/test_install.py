"""A release as its user gets it: the source distribution, the wheel made from it, installed and run elsewhere.

The wheel is compiled as `pip install` would. The environment is a fresh one that sees this one's libraries, but none
of the checkout; nothing is downloaded.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

from moe_serve import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LEFT_OUT = (
    ".git",
    ".venv*",
    ".gpu-wheels",
    "build",
    "dist",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "*.so",
    "site",
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
ON_TOP = ("Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "setup.py")
FOLDERS = ("docs", "deploy", "examples", "benchmarks", "tests", "tools", ".ci")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"moe_serve", "expert_cache", "placement", "predictors", "moe_serve_base", "moe_serve_kernels"}


def build(kind: str, tree: Path, target: Path) -> Path:
    """A distribution, made by our build backend without a warning."""
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(target)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line or "no files found" in line]
    assert not warnings, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))
    packed = build("build_sdist", folder / "checkout", folder)
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def contents(wheel: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel) as archive:
        yield archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, env=without_checkout())
    packages = next((folder / "venv/lib").glob("python*")) / "site-packages"
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(installed: Path, folder: Path, *command: str) -> str:
    """Output of an installed program, run in another folder."""
    program = [str(installed / command[0]), *command[1:]]
    done = subprocess.run(program, cwd=folder, env=without_checkout(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_source(path: Path) -> bool:
    """Written by hand: .ci/run has no suffix."""
    return path.is_file() and path.suffix in ("", ".py", ".md", ".sh")


def test_the_source_holds_what_its_makefile_needs(source: Path) -> None:
    assert not [name for name in ON_TOP if not (source / name).is_file()]
    for folder in FOLDERS:
        files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if is_source(path)}
        assert files
        assert not [path for path in files if not (source / path).is_file()], folder
    assert not [*source.rglob("*.so"), *source.rglob("*.pyc")]


def test_the_wheel_serves_every_python(wheel: Path) -> None:
    """Its library is loaded by ctypes and needs no Python of one version."""
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert (name, str(version)) == (PROJECT["name"], __version__)
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    assert all(tag.platform.startswith("linux") for tag in tags)


def test_the_wheel_holds_what_runs_and_nothing_else(contents: zipfile.ZipFile) -> None:
    names = [name for name in contents.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == OURS
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".o", ".a"))]
    assert "moe_serve/demo/model/model.safetensors" in names
    assert {f"moe_serve/server/static/{page}" for page in ("index.html", "app.js", "style.css")} <= set(names)


def test_its_metadata_is_what_an_index_accepts(contents: zipfile.ZipFile) -> None:
    """Checked by the library that PyPI checks uploads with."""
    (path,) = [name for name in contents.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Metadata.from_email(contents.read(path), validate=True)
    assert metadata.name == PROJECT["name"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.license_expression == "MIT"
    assert set(metadata.provides_extra or []) == set(PROJECT["optional-dependencies"])


def test_pipx_finds_the_command(contents: zipfile.ZipFile) -> None:
    """`pipx run NAME` looks in this group for a command with the distribution's name."""
    (path,) = [name for name in contents.namelist() if name.endswith(".dist-info/entry_points.txt")]
    points = configparser.ConfigParser()
    points.read_string(contents.read(path).decode())
    assert dict(points["pipx.run"]) == {PROJECT["name"]: points["console_scripts"]["moe-serve"]}


def test_it_is_the_wheel_that_runs(installed: Path, tmp_path: Path) -> None:
    home = run(installed, tmp_path, "python", "-c", "import moe_serve; print(moe_serve.__file__)")
    assert Path(home.strip()).is_relative_to(installed.parent)
    assert run(installed, tmp_path, "moe-serve", "--version").split() == ["moe-serve", __version__]
    assert "--moe-cache-mib" in run(installed, tmp_path, "moe-serve", "serve", "--help")


def test_the_demo_model_answers(installed: Path, tmp_path: Path) -> None:
    flags = ("--prompt", "Once upon a time", "--max-tokens", "4", "--temperature", "0", "--ignore-eos")
    assert run(installed, tmp_path, "moe-serve", "generate", *flags, "--kv-cache-mib", "16").strip()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_its_kernels_are_compiled(installed: Path, contents: zipfile.ZipFile, tmp_path: Path) -> None:
    """And need no source at run time."""
    assert len([name for name in contents.namelist() if name.endswith(".so")]) == 1
    for path in installed.parent.rglob("*.cpp"):
        path.unlink()
    code = "from moe_serve_kernels.cpu import library; print(library.load() is not None)"
    assert run(installed, tmp_path, "python", "-c", code).strip() == "True"
