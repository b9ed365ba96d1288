"""Fixtures of scheduler and engine tests."""

from __future__ import annotations

import pytest

from .driving import MakeDriver, MakeSeq, SchedulerDriver
from .driving import make_seq as make


@pytest.fixture(scope="session")
def make_seq() -> MakeSeq:
    return make


@pytest.fixture(scope="session")
def make_driver() -> MakeDriver:
    return SchedulerDriver
