"""Fuzz the loading of checkpoints: a damaged folder still gives finite scores, or is refused in one line.

    python tests/fuzz/fuzz_checkpoints.py --minutes 10

Tiny checkpoints of several families. Fields of their JSON files are missing, of a wrong type or extreme; headers and
files of tensors are cut or overwritten. Each folder is loaded in a child process with a limit on memory and time.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.families.relayout import WEIGHTS, reshard
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES
from tests.fuzz.harness import fuzz_for_minutes
from tests.fuzz.loader import Loader, run_examples

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "glm4_moe")
INDEX = f"{WEIGHTS}.index.json"
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX)
ABSENT = "absent"
SIZES = [-1, 0, 1, 2, 3, 7, 64, 257, 10**6, 10**9, 10**12, 2**63]
VALUES = st.sampled_from(
    [
        *(ABSENT, None, True, False, "", "x", "float16", "yarn", [], [1], ["x"], {}, {"a": 1}, {"rope_type": "yarn"}),
        *(1.5, -0.5, 1e-30, 1e30, 1e300, float("nan"), float("inf"), *SIZES),
    ]
)
ENTRIES: list[Any] = [
    *("F32", "F16", "BF16", "I8", "I64", "BOOL", "F8_E4M3", "X", ABSENT, None, 3, [], [0, 0], [64, 64], [-1, 1]),
    *([2**40, 2**40], [0, 2**63], [8, 64], [4096], ["a"], {}),
]
"""Types, shapes and places of tensors."""
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
FURTHER_FIELDS = (
    *("quantization_config", "rope_scaling", "rope_theta", "torch_dtype", "auto_map", "num_nextn_predict_layers"),
    *("attention_chunk_size", "layer_types", "text_config", "id2label", "max_new_tokens", "temperature", "do_sample"),
)
"""Fields that the tiny configs lack and that people's have."""


@dataclass(frozen=True)
class Damage:
    """What becomes of a checkpoint: a file of it changes."""

    family: str
    file: str
    change: Callable[[Path], object]
    what: str
    """For the report of a failure."""

    def __repr__(self) -> str:
        return f"{self.family}/{self.file}: {self.what}"


def with_field(family: str, file: str, field: str, value: Any) -> Damage:
    """A field of a JSON object is missing or another; dots lead into objects."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text()) if path.is_file() else {}
        *parents, last = field.split(".")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner.pop(last, None)
        if value is not ABSENT:
            inner[last] = value
        path.write_text(json.dumps(content))

    return Damage(family, file, change, f"{field} = {value!r}")


def with_text(family: str, file: str, text: str) -> Damage:
    return Damage(family, file, lambda path: path.write_text(text), f"the text {text[:40]!r}")


def with_bytes(family: str, place: int, junk: bytes) -> Damage:
    """Some bytes of the header of the tensors' file are others."""

    def change(path: Path) -> None:
        with path.open("r+b") as stream:
            stream.seek(place % (8 + int.from_bytes(stream.read(8), "little")))
            stream.write(junk)

    return Damage(family, WEIGHTS, change, f"{junk!r} at {place} of the header")


def with_entry(family: str, number: int, key: str, value: Any) -> Damage:
    """An entry of that header says something else of a tensor."""

    def change(path: Path) -> None:
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        entry = header[sorted(header)[number % len(header)]]
        entry.pop(key, None)
        if value is not ABSENT:
            entry[key] = value
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return Damage(family, WEIGHTS, change, f"{key} of tensor {number} = {value!r}")


def cut(family: str, length: int) -> Damage:
    def change(path: Path) -> None:
        with path.open("r+b") as stream:
            stream.truncate(length % path.stat().st_size)

    return Damage(family, WEIGHTS, change, f"cut at {length}")


class Checkpoints:
    """Good checkpoints, and copies that are damaged one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loader = Loader()
        self._target = folder / "damaged"
        for family in FAMILIES:
            write_checkpoint(CASES[family], folder / family)
        reshard(folder / FAMILIES[0], folder / "sharded", 2)

    def fields(self, family: str) -> list[str]:
        """Of config.json, and of the objects in it."""
        config = json.loads((self._folder / family / "config.json").read_text())
        inner = [f"{name}.{key}" for name, value in config.items() if isinstance(value, dict) for key in value]
        return [*config, *inner, *(f"rope_scaling.{key}" for key in ROPE), *FURTHER_FIELDS]

    def side_fields(self, file: str) -> list[str]:
        path = self._folder / "sharded" / file
        found = list(json.loads(path.read_text())) if path.is_file() else []
        return [*found, "eos_token_id", "temperature", "top_p", "top_k", "do_sample", "max_new_tokens", "weight_map.x"]

    def check(self, damage: Damage) -> None:
        """LoadingFault where the damaged folder does what none may do."""
        shutil.rmtree(self._target, ignore_errors=True)
        shutil.copytree(self._folder / damage.family, self._target)
        damage.change(self._target / damage.file)
        self._loader.refusal(self._target)

    def close(self) -> None:
        self._loader.close()


def configs(checkpoints: Checkpoints) -> st.SearchStrategy[Damage]:
    return st.sampled_from(FAMILIES).flatmap(
        lambda family: st.builds(
            with_field,
            st.just(family),
            st.just("config.json"),
            st.sampled_from(checkpoints.fields(family)),
            VALUES,
        )
    )


def side_files(checkpoints: Checkpoints) -> st.SearchStrategy[Damage]:
    def of(file: str) -> st.SearchStrategy[Damage]:
        fields = st.sampled_from(checkpoints.side_fields(file))
        texts = st.sampled_from(["", "{", "[]", "null", "[" * 100_000, '{"weight_map": {"a": 3}}', '"\\ud800"'])
        family, name = st.just("sharded"), st.just(file)
        return st.builds(with_field, family, name, fields, VALUES) | st.builds(with_text, family, name, texts)

    return st.sampled_from([*SIDE_FILES, "config.json"]).flatmap(of)


def weights(_: Checkpoints) -> st.SearchStrategy[Damage]:
    families, places = st.sampled_from(FAMILIES), st.integers(0, 1 << 24)
    keys = st.sampled_from(["dtype", "shape", "data_offsets"])
    entries = st.builds(with_entry, families, places, keys, st.sampled_from(ENTRIES))
    junk = st.builds(with_bytes, families, places, st.binary(min_size=1, max_size=8))
    return entries | entries | entries | junk | st.builds(cut, families, places)


KINDS = {"config": configs, "side_files": side_files, "weights": weights}


def run(checkpoints: Checkpoints, kind: str, seed: int, examples: int) -> int:
    return run_examples(KINDS[kind](checkpoints), checkpoints.check, seed, examples)


@contextmanager
def opened() -> Iterator[dict[str, Callable[[int, int], int]]]:
    """What fuzzes each kind of file, over a child process that ends with the block."""

    def of(kind: str) -> Callable[[int, int], int]:
        return lambda seed, examples: run(checkpoints, kind, seed, examples)

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        try:
            yield {kind: of(kind) for kind in KINDS}
        finally:
            checkpoints.close()


if __name__ == "__main__":
    with opened() as properties:
        fuzz_for_minutes(properties)
