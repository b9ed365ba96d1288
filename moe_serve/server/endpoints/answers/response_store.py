"""Responses by id, within a budget of memory: the oldest make room for new ones. Knows JSON; knows no HTTP.

An id is one key's own: no API key reads what another one's client has asked.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import orjson

from moe_serve.errors import InvalidRequestError, ResponseNotFoundError

Item = dict[str, Any]


class ResponseStore:
    """What `store` keeps. Everything is kept as JSON bytes, so that its size is known.

    Long answers are kept from a thread.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._used_bytes = 0
        self._kept: OrderedDict[tuple[str, str], tuple[bytes, bytes]] = OrderedDict()
        """(owner, id) -> (response, the items of the conversation up to its answer); the oldest first."""
        self._lock = threading.RLock()

    def keep(self, owner: str, response: dict[str, Any], items: list[Item]) -> None:
        """Store a response in place of one of the same id. One larger than the budget is not kept."""
        key, entry = (owner, response["id"]), (orjson.dumps(response), orjson.dumps(items))
        with self._lock:
            self._forget(key)
            if _size(entry) > self._budget_bytes:
                return
            self._kept[key] = entry
            self._used_bytes += _size(entry)
            while self._used_bytes > self._budget_bytes:
                self._forget(next(iter(self._kept)))

    def response(self, owner: str, response_id: str) -> dict[str, Any]:
        """The response as it was answered. ResponseNotFoundError."""
        found: dict[str, Any] = orjson.loads(self._entry(owner, response_id)[0])
        return found

    def items(self, owner: str, response_id: str) -> list[Item]:
        """The input items of a response, after those of the responses before it. ResponseNotFoundError."""
        found: list[Item] = orjson.loads(self._entry(owner, response_id)[1])
        return found

    def conversation(self, owner: str, response_id: str) -> list[Item]:
        """Input and output items, for a request to go on from. InvalidRequestError names previous_response_id."""
        try:
            return [*self.items(owner, response_id), *self.response(owner, response_id)["output"]]
        except ResponseNotFoundError as error:
            raise InvalidRequestError(
                "previous_response_id", f"previous_response_id: {error.message}; send the whole conversation as input"
            ) from None

    def delete(self, owner: str, response_id: str) -> None:
        """ResponseNotFoundError."""
        with self._lock:
            self._entry(owner, response_id)
            self._forget((owner, response_id))

    def _entry(self, owner: str, response_id: str) -> tuple[bytes, bytes]:
        if (owner, response_id) not in self._kept:
            raise ResponseNotFoundError(f"no response {response_id[:100]!r} is stored here, or not any more")
        return self._kept[owner, response_id]

    def _forget(self, key: tuple[str, str]) -> None:
        entry = self._kept.pop(key, None)
        if entry is not None:
            self._used_bytes -= _size(entry)


def _size(entry: tuple[bytes, bytes]) -> int:
    return sum(map(len, entry))
