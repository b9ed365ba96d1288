"""A few seconds of each fuzzer; minutes of them: `python tests/fuzz/fuzz_<name>.py --minutes 10`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import fuzz_checkpoints, fuzz_detokenizer, fuzz_grammars, fuzz_protocol, fuzz_quantization

EXAMPLES = 60
LOADS = 12
"""Examples that load a checkpoint."""
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


@pytest.mark.parametrize("vocabulary", ["byte_level", "byte_fallback"])
def test_detokenizer(detokenizer: Properties, vocabulary: str) -> None:
    assert detokenizer[vocabulary](0, EXAMPLES) >= EXAMPLES


@pytest.mark.parametrize("body", [body.__name__ for body in fuzz_protocol.GOOD])
def test_protocol(protocol: Properties, body: str) -> None:
    assert protocol[body](0, EXAMPLES) >= EXAMPLES
