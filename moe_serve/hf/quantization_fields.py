"""Reading the fields of a quantisation config: exactly what is documented, or an error that names the field.

A value of another type is refused, not converted. A field that is not known and is set might change the arithmetic.
Knows JSON values; knows no schemes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moe_serve.errors import UnsupportedModelError

MOST = 1 << 31
"""Of a number of columns or rows."""


class Fields:
    """One object of a config. Every reading method raises UnsupportedModelError, which names file and field."""

    def __init__(self, values: object, where: str, path: str = "quantization_config") -> None:
        """`where`: the file. `path`: of the object in it."""
        self.where = where
        self.path = path
        if not isinstance(values, Mapping):
            raise UnsupportedModelError(f"{where}: {path} must be an object, got {_short(values)}")
        self._values = values

    def get(self, name: str) -> Any:
        """As it is; None where it is not there."""
        return self._values.get(name)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        return sorted(map(str, self._values))

    def choice(self, name: str, allowed: Sequence[Any], default: Any = None) -> Any:
        """One of `allowed`, of the same type; `default` for null and for a field that is not there."""
        value = self.get(name)
        value = default if value is None else value
        if not any(value == each and type(value) is type(each) for each in allowed):
            raise self.unsupported(name, " or ".join(map(repr, allowed)))
        return value

    def integer(self, name: str, least: int, default: int | None = None) -> int:
        """`default` for null and for a field that is not there; without one they are refused."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MOST:
            raise self.unsupported(name, f"integers from {least} on")
        return value

    def pair(self, name: str) -> tuple[int, int]:
        """Two numbers, each at least 1."""
        value = self.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            parts = Fields(dict(enumerate(value)), self.where, f"{self.path}.{name}")
            return parts.integer(0, 1), parts.integer(1, 1)  # type: ignore[arg-type]
        raise self.unsupported(name, "two integers")

    def flag(self, name: str, default: bool) -> bool:
        """`default` for null and for a field that is not there."""
        return bool(self.choice(name, (True, False), default))

    def says(self, name: str, default: Any = None) -> str:
        """The field and its value, for an error about tensors that say otherwise."""
        value = self.get(name)
        return f"{self.path}.{name} is {_short(default if value is None else value)}"

    def object(self, name: str) -> Fields:
        """An empty one for null and for a field that is not there."""
        value = self.get(name)
        return Fields({} if value is None else value, self.where, f"{self.path}.{name}")

    def refuse_unknown(self, known: Collection[str]) -> None:
        """A field that is set and might change the arithmetic."""
        for field, value in self._values.items():
            if field not in known and value:
                raise UnsupportedModelError(
                    f"{self.where}: {self.path}.{field} is {_short(value)}, which moe-serve does not follow; use a"
                    " checkpoint without it"
                )

    def unsupported(self, name: str, supported: str) -> UnsupportedModelError:
        """An error about a field's value. `supported`: in words."""
        value = self._values.get(name)
        return UnsupportedModelError(
            f"{self.where}: {self.path}.{name} is {_short(value)}; moe-serve reads {supported}. Use such a checkpoint,"
            " or a bf16 one and `moe-serve quantize`"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
