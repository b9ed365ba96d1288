"""What `import moe_serve` promises."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_serve


@pytest.mark.parametrize("name", moe_serve.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(moe_serve, name) is not None


def test_public_names_are_these() -> None:
    assert set(moe_serve.__all__) == {
        *("LLM", "AsyncLLM", "RequestResult", "Completion", "SampleOutput", "SamplingParams", "TokenLogprob"),
        *("EngineConfig", "ExpertCacheConfig", "KVConfig", "QueueConfig", "ParallelConfig"),
        *("ConfigError", "InvalidRequestError", "MoEServeError", "__version__"),
    }
    assert set(moe_serve.__all__) <= set(dir(moe_serve))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = moe_serve.nothing


def test_the_version_is_the_installed_one() -> None:
    """Whatever the installed distribution is called: a checkout's environment may have been made under another name."""
    owners = importlib.metadata.packages_distributions()["moe_serve"]
    assert {importlib.metadata.version(owner) for owner in owners} == {moe_serve.__version__}


def test_importing_the_package_loads_none_of_its_modules() -> None:
    code = "import sys, moe_serve; print([m for m in sys.modules if m.startswith('moe_serve.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LIBRARIES = {
    "expert_cache": {
        *("Capacity", "Events", "ExpertReport", "Policy", "ReplayResult", "ShadowCache", "compare", "events_of"),
        *("find_policy", "global_pool", "per_layer", "policy_names", "replay_belady", "replay_events"),
    },
    "placement": {
        *("PlacementError", "PlacementPlan", "PlacementProblem", "Topology"),
        *("find_plan", "find_solver", "load_plan", "prove", "save_plan"),
    },
    "predictors": {
        *("Predictor", "RouterShape", "RoutingTrace", "Scores", "TraceError", "Training", "evaluate", "find_method"),
        *("load_predictor", "load_trace", "method_names", "save_predictor", "split_sequences"),
    },
    "moe_serve_kernels": {"Activation", "LinearWeights", "MLPWeights", "expert_mlp", "linear", "load_library"},
}
"""Package -> its public names. A name that leaves is an incompatible change."""


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_package_is_a_library_with_these_names(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) == LIBRARIES[name] == set(package.HOMES)
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_library_has_a_page_that_shows_its_names(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "libraries.md").read_text()
    (section,) = re.findall(rf"^## {name}\b.*?(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    missing = {public for public in LIBRARIES[name] if f"`{public}`" not in section}
    assert missing == set()


def test_importing_a_library_loads_no_torch() -> None:
    code = f"import sys; [__import__(name) for name in {list(LIBRARIES)}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
