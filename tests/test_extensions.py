"""Extensions from outside: listed by every command that takes one, used by name, and one line where one is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from expert_cache.policies import find_policy
from moe_serve.errors import UnsupportedModelError
from moe_serve.hf import family
from moe_serve_base.extensions import ExtensionError
from placement.problem import PlacementProblem
from placement.solve import find_plan
from placement.topology import Topology
from predictors import files
from predictors.methods import find_method
from predictors.predictor import RouterShape, Training
from predictors.trace import RoutingTrace, offsets_of

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "examples" / "plugin"
LISTED_BY = {
    "policies": ("serve", "replay"),
    "predictors": ("predictor train", "predictor evaluate"),
    "solvers": ("plan",),
    "families": ("serve", "generate"),
}
CODE = """
from expert_cache.policies.lru import LRU
from moe_serve.hf.families.mixtral import FAMILY
from placement.solvers.round_robin import solve
from predictors.methods.frequency import METHOD

needless = object()
"""
OFFERS = {
    "policies": "outer_policy = outer:LRU",
    "predictors": "outer_method = outer:METHOD",
    "solvers": "outer_solver = outer:solve",
    "families": "outer_family = outer:FAMILY",
}


def install(folder: Path, name: str, offers: dict[str, str], code: str) -> None:
    """What pip leaves of a package with one module: the module, and its entry points."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (f"[moe_serve.{kind}]\n{line}\n" for kind, line in offers.items())
    (info / "entry_points.txt").write_text("\n".join(groups))


def moe_serve(words: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    known = os.pathsep.join([*map(str, paths), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "moe_serve", *words.split()]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": known})


@pytest.fixture
def outer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that offers one extension of each kind."""
    install(tmp_path, "outer", OFFERS, CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("outer", None)


@pytest.mark.parametrize(("kind", "command"), [(k, c) for k, commands in LISTED_BY.items() for c in commands])
def test_help_lists_it(outer: Path, kind: str, command: str) -> None:
    text = moe_serve(f"{command} --help", outer).stdout
    assert OFFERS[kind].split()[0] in "".join(text.split())


def test_each_kind_is_found_by_name(outer: Path) -> None:
    assert find_policy("outer_policy") is find_policy("lru")
    assert find_method("outer_method") is find_method("frequency")
    assert family.find("outer_family") is family.find("mixtral")
    problem = PlacementProblem(np.ones((2, 4)), np.ones((1, 4, 4)), Topology.even(2))
    assert find_plan(problem, "outer_solver").cost == find_plan(problem, "round_robin").cost


def test_help_imports_no_extension(tmp_path: Path) -> None:
    install(tmp_path, "loud", {"policies": "loud = loud:POLICY"}, "raise RuntimeError('imported')")
    done = moe_serve("serve --help", tmp_path)
    assert done.returncode == 0
    assert "loud" in done.stdout


BROKEN: dict[str, str] = {
    "raise ImportError('no such\\nlibrary')": "cannot be imported: ImportError: no such library",
    "POLICY = object()": "has no needs, record, keep_values, keep_values_all",
    "": "cannot be imported: AttributeError: ",
}


@pytest.mark.slow
@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_one_is_one_line_that_names_the_package(tmp_path: Path, code: str) -> None:
    install(tmp_path, "bad", {"policies": "bad = bad:POLICY"}, code)
    done = moe_serve("generate --prompt a --moe-cache-mib 4 --moe-cache-manager host --moe-cache-policy bad", tmp_path)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert "--moe-cache-policy: policy 'bad' of package bad 1.0 (bad:POLICY) " + BROKEN[code] in line
    assert "Traceback" not in done.stderr


def test_a_name_that_is_taken_is_refused(outer: Path) -> None:
    install(outer, "twin", {"policies": "lru = outer:LRU", "families": "mixtral = outer:FAMILY"}, "")
    with pytest.raises(ExtensionError, match=r"policy 'lru' is offered by moe-serve and by package twin 1\.0;"):
        find_policy("lru")
    with pytest.raises(UnsupportedModelError, match="offered by moe-serve and by package twin"):
        family.find("mixtral")


def test_a_predictor_whose_package_left_says_so(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = RouterShape(tuple(range(1)), 2, 1)
    trace = RoutingTrace(np.zeros((4, 1, 1), np.uint8), offsets_of([4]), np.arange(1, dtype=np.int32), 2)
    learnt = find_method("random").fit(Training(trace))
    files.save(outer / "p.safetensors", "outer_method", learnt, shape, None)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(outer)])
    with pytest.raises(files.PredictorFileError, match=r"method 'outer_method' is not one of .*install the package"):
        files.load(outer / "p.safetensors")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/plugin as pip installs it."""
    target = tmp_path_factory.mktemp("site")
    words = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    source = target / "source"
    source.mkdir()
    for file in PLUGIN.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True, capture_output=True)
    return target


def test_the_example_is_listed(example: Path) -> None:
    for command in ("serve", "replay"):
        assert "lru2" in moe_serve(f"{command} --help", example).stdout


@pytest.mark.slow
def test_the_example_serves(example: Path) -> None:
    words = "generate --prompt Hello --temperature 0 --max-tokens 8"
    plain = moe_serve(words, example)
    cached = moe_serve(f"{words} --moe-cache-mib 4 --moe-cache-manager host --moe-cache-policy lru2", example)
    assert cached.returncode == 0
    assert cached.stdout == plain.stdout != ""


def test_the_example_keeps_the_laws(example: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "lru2", "tests/expert_cache/test_policies.py"]
    known = os.pathsep.join([str(example), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": known})
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
