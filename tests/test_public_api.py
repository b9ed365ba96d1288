"""What `import moe_serve` promises."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

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
