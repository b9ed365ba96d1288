"""A few seconds of each fuzzer; minutes of them: `python tests/fuzz/fuzz_<name>.py --minutes 10`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import (
    fuzz_checkpoints,
    fuzz_detokenizer,
    fuzz_grammars,
    fuzz_http,
    fuzz_protocol,
    fuzz_quantization,
)
from tests.fuzz.watched_server import MAY_GROW_MIB

EXAMPLES = 60
LOADS = 12
"""Examples that load a checkpoint."""
LATE_S = 5.0
"""For /live while other tests run beside this one."""
Properties = fuzz_protocol.Properties


@pytest.fixture(scope="module")
def detokenizer() -> Properties:
    return fuzz_detokenizer.properties()


@pytest.fixture(scope="module")
def protocol() -> Properties:
    return fuzz_protocol.properties()


@pytest.fixture(scope="module")
def grammars() -> Iterator[Properties]:
    with fuzz_grammars.opened() as properties:
        yield properties


@pytest.fixture(scope="module")
def checkpoints() -> Iterator[Properties]:
    with fuzz_checkpoints.opened() as properties:
        yield properties


@pytest.fixture(scope="module")
def quantization() -> Iterator[Properties]:
    with fuzz_quantization.opened() as properties:
        yield properties


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz_checkpoints.KINDS)
def test_checkpoints(checkpoints: Properties, kind: str) -> None:
    assert checkpoints[kind](0, LOADS * 4) >= LOADS


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz_quantization.NAMES)
def test_quantization(quantization: Properties, name: str) -> None:
    assert quantization[name](0, LOADS) >= LOADS // 2


@pytest.mark.parametrize("kind", [kind.value for kind in fuzz_grammars.TEXTS])
def test_grammars(grammars: Properties, kind: str) -> None:
    assert grammars[kind](0, EXAMPLES) >= EXAMPLES


@pytest.mark.slow
def test_http() -> None:
    """As long as a few hundred connections take; LATE_S is far above what /live takes on a quiet machine."""
    with fuzz_http.opened() as fuzzer:
        assert fuzzer.run(0, 5 * EXAMPLES) >= 5 * EXAMPLES
        found = fuzzer.report()
    assert found["live"]["asked"]
    assert not found["live"]["failed"]
    assert found["live"]["max_s"] < LATE_S
    assert found["grown_mib"] < MAY_GROW_MIB


@pytest.mark.slow
def test_grammars_over_http() -> None:
    with fuzz_grammars.served() as (properties, report):
        for run in properties.values():
            assert run(0, EXAMPLES // 3)
        found = report()
    assert not found["live"]["failed"]
    assert found["live"]["max_s"] < LATE_S


@pytest.mark.parametrize("vocabulary", ["byte_level", "byte_fallback"])
def test_detokenizer(detokenizer: Properties, vocabulary: str) -> None:
    assert detokenizer[vocabulary](0, EXAMPLES) >= EXAMPLES


@pytest.mark.parametrize("body", [body.__name__ for body in fuzz_protocol.GOOD])
def test_protocol(protocol: Properties, body: str) -> None:
    assert protocol[body](0, EXAMPLES) >= EXAMPLES
