"""Fuzz the reading of quantisation configs: any keys and values load with finite scores, or are refused by name.

    python tests/fuzz/fuzz_quantization.py --minutes 10

A checkpoint of every format, whose note has a key missing, another value, or one more key. Loaded in a child process
with a limit on memory and time.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.families.quantized_checkpoints import FORMATS, write_mxfp4_pair, write_pair
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES
from tests.fuzz.fuzz_checkpoints import ABSENT, VALUES
from tests.fuzz.harness import fuzz_for_minutes
from tests.fuzz.loader import Loader, run_examples

Keys = tuple[Any, ...]
"""The way to a value in nested objects and lists."""
NAMES = (*FORMATS, "mxfp4")
MORE_KEYS = ("transform_config", "dynamic", "adapter", "quant_algo", "quantization", "ignore", "kv_cache_scheme", "x")
LIKELY = st.sampled_from(
    [
        *("gptq", "awq", "fp8", "mxfp4", "modelopt", "compressed-tensors", "bitsandbytes", "e5m2", "block", "tensor"),
        *("channel", "group", "int", "float", "int-quantized", "float-quantized", "pack-quantized", "nvfp4", "FP8"),
        *(2, 3, 4, 8, 16, 32, 128, -1, [1, 1], [128, 128], [0, 0], [48, 64], [48, 64, 1], [10**12, 1], "4", 4.0),
    ]
)


def ways(value: Any, way: Keys = ()) -> Iterator[Keys]:
    """To every value in `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*way, key)
        yield from ways(inner, (*way, key))


def changed(note: dict[str, Any], way: Keys, value: Any) -> dict[str, Any]:
    """A copy in which the value at `way` is another, or absent."""
    result = copy.deepcopy(note)
    inner: Any = result
    for key in way[:-1]:
        inner = inner[key]
    if value is not ABSENT:
        inner[way[-1]] = value
    elif isinstance(inner, list) or way[-1] in inner:
        del inner[way[-1]]
    return result


class Quantized:
    """A checkpoint of every format."""

    def __init__(self, folder: Path) -> None:
        self._loader = Loader()
        plain = write_checkpoint(CASES["mixtral"], folder / "plain")
        self._folders: dict[str, Path] = {}
        for name in NAMES:
            (folder / name).mkdir()
            if name == "mxfp4":
                source = write_checkpoint(CASES["gpt_oss"], folder / "gpt_oss")
                self._folders[name] = write_mxfp4_pair(source, folder / name)[0]
            else:
                self._folders[name] = write_pair(plain, folder / name, FORMATS[name])[0]
        self._configs = {name: (path / "config.json").read_text() for name, path in self._folders.items()}

    def note(self, name: str) -> dict[str, Any]:
        note: dict[str, Any] = json.loads(self._configs[name])["quantization_config"]
        return note

    def check(self, name: str, note: Any) -> None:
        """LoadingFault where a checkpoint with this note does what none may do."""
        config = json.loads(self._configs[name]) | {"quantization_config": note}
        (self._folders[name] / "config.json").write_text(json.dumps(config))
        self._loader.refusal(self._folders[name])

    def close(self) -> None:
        self._loader.close()


def run(quantized: Quantized, name: str, seed: int, examples: int) -> int:
    note = quantized.note(name)
    places = [*ways(note), *((key,) for key in MORE_KEYS)]
    notes = st.builds(changed, st.just(note), st.sampled_from(places), VALUES | LIKELY)
    generated = notes | notes | notes | VALUES.map(lambda value: None if value is ABSENT else value)
    return run_examples(generated, partial(quantized.check, name), seed, examples)


@contextmanager
def opened() -> Iterator[dict[str, Callable[[int, int], int]]]:
    """What fuzzes each format's note, over a child process that ends with the block."""

    def of(name: str) -> Callable[[int, int], int]:
        return lambda seed, examples: run(quantized, name, seed, examples)

    with tempfile.TemporaryDirectory() as folder:
        quantized = Quantized(Path(folder))
        try:
            yield {name: of(name) for name in NAMES}
        finally:
            quantized.close()


if __name__ == "__main__":
    with opened() as properties:
        fuzz_for_minutes(properties)
