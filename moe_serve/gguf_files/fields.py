"""Fields: reading a GGUF checkpoint's numbers by short names, for the functions that make a config of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from moe_serve.errors import CheckpointError
from moe_serve.gguf_files.reading import Gguf

Config = dict[str, Any]


class Fields:
    """The metadata under the architecture's own prefix, and the tensors' shapes."""

    def __init__(self, gguf: Gguf, where: str) -> None:
        """`where`: the file's path, for errors."""
        self.gguf, self.where = gguf, where

    def get(self, name: str, default: Any = None) -> Any:
        """The value under ARCHITECTURE.name. A float is the shortest decimal that its float32 stands for."""
        value = self.gguf.metadata.get(f"{self.gguf.architecture}.{name}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, name: str) -> Any:
        """The same; CheckpointError where it is not there."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.where}: the metadata has no {self.gguf.architecture}.{name}")
        return value

    def largest(self, name: str, default: int) -> int:
        """The same for a number that a file may give layer by layer: the largest of them."""
        value = self.get(name, default)
        return max(value, default=default) if isinstance(value, list) else int(value)

    def layers_with(self, ending: str) -> list[int]:
        """Numbers of the layers that have such a tensor, in order."""
        pattern = re.compile(rf"blk\.(\d+)\.{re.escape(ending)}$")
        return sorted({int(match[1]) for name in self.gguf.tensors if (match := pattern.match(name))})

    def has(self, ending: str) -> bool:
        """Whether a tensor of any layer ends so."""
        return any(name.endswith(ending) for name in self.gguf.tensors)

    def shape(self, ending: str) -> tuple[int, ...]:
        """The shape of the first such tensor. CheckpointError where there is none."""
        for name, tensor in self.gguf.tensors.items():
            if name.endswith(ending):
                return tensor.shape
        raise CheckpointError(f"{self.where}: no tensor {ending}; moe-serve reads Mixture-of-Experts models only")

    def token(self, name: str) -> int | None:
        """A special token's id, such as that of `eos`."""
        value = self.gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if value is None else int(value)
