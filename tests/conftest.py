"""What runs first, and what is skipped: tests marked `gpu` where there is none, which they say."""

from __future__ import annotations

import hypothesis
import pytest

LONGEST = (
    "test_gpu_interpreted.py",
    "test_compile_check.py",
    "test_fuzzers.py",
    "test_install.py",
    "test_parallel.py",
)
"""Minutes in one file: begun last, they would leave all processes but one without work."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("spanning") and not _spans(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONGEST)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def pytest_configure() -> None:
    """Examples have no time limit of their own: what a busy machine does to them says nothing."""
    hypothesis.settings.register_profile(
        "beside other work", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("beside other work")


def _spans(item: pytest.Item) -> bool:
    """Its `case`, a tiny model, is one of the few that have all features between them."""
    from tests.families.tiny_configs import SPANNING

    assert isinstance(item, pytest.Function)
    return item.callspec.params["case"] in SPANNING


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
