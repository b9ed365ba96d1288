"""Gathering: a new group of ranks comes together: they say hello, get their settings, load, and say ready.

Knows messages and processes; knows no steps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.errors import ConfigError, EngineDeadError, MoEServeError
from moe_serve.parallel.front.links import Link, RankLostError, open_link
from moe_serve.parallel.front.spawner import Spawner
from moe_serve.parallel.wire.door import Door, word_of
from moe_serve.parallel.wire.messages import Failed, Ready, Start, encode

WAIT_S = 0.2
"""Until the next look at whether a rank has died or time is up."""


class Group(NamedTuple):
    """Ranks that are ready."""

    links: dict[int, Link]
    """By rank."""
    config: EngineConfig
    """As the ranks resolved it."""
    layers: tuple[int, ...]
    """The model's decoder layers with experts."""


def _door_at(address: tuple[str, int]) -> Door:
    try:
        return Door(address)
    except (OSError, OverflowError) as error:
        host, port = address
        raise ConfigError(f"cannot listen for ranks on {host} port {port} ({error}); see --rank-port") from error


class Gathering:
    """Brings groups together, one after the other."""

    def __init__(
        self,
        config: EngineConfig,
        parallel: ParallelConfig,
        address: tuple[str, int],
        spawner: Spawner | None,
        secret: str = "",
    ) -> None:
        """`address`: (host, port) where ranks call, port 0 for any.

        `secret`: what a launcher's ranks know; ranks of a spawner get a new one for each group.
        """
        self._config = config
        self._parallel = parallel
        self._door = _door_at(address)
        self._spawner = spawner
        self._secret = secret

    @property
    def host(self) -> str:
        """Where ranks call, as an address."""
        return self._door.address[0]

    def close(self) -> None:
        """No rank can call any more."""
        self._door.close()

    def run(self, is_over: Callable[[], bool]) -> Group:
        """The next group. `is_over`: the server is shutting down.

        ConfigError: the first rank's that has one. RankLostError: a rank died, or time is up. EngineDeadError.
        """
        deadline = time.monotonic() + self._parallel.rank_start_s
        links: dict[int, Link] = {}

        def check() -> None:
            if is_over():
                raise EngineDeadError("the server is shutting down")
            self._check(links, deadline)

        try:
            self._meet(links, check)
            raw = encode(Start(self._config, self._parallel))
            for _, link in sorted(links.items()):
                link.channel.send(raw)
            return self._wait_ready(links, check)
        except BaseException:
            for link in links.values():
                link.channel.close()
            raise

    def _meet(self, links: dict[int, Link], check: Callable[[], None]) -> None:
        """Fill `links` with every rank that says hello."""
        secret = secrets.token_hex(16) if self._spawner is not None else self._secret
        self._door.open(word_of(secret))
        try:
            if self._spawner is not None:
                self._spawner.start(self._door.address, secret)
            while len(links) < self._parallel.devices:
                newcomer = next_link(self._door, WAIT_S)
                if newcomer is not None and newcomer.rank < self._parallel.devices and newcomer.rank not in links:
                    links[newcomer.rank] = newcomer
                elif newcomer is not None:  # a rank of another server with the same secret
                    newcomer.channel.close()
                check()
        finally:
            self._door.shut()

    def _wait_ready(self, links: dict[int, Link], check: Callable[[], None]) -> Group:
        """All are asked in turn: one that fails may leave the others waiting for it."""
        ready: dict[int, Ready] = {}
        while len(ready) < len(links):
            for rank, link in links.items():
                answer = None if rank in ready else link.next(WAIT_S / len(links))
                if isinstance(answer, Failed):
                    raise _error_of(rank, answer)
                if answer is not None:
                    assert isinstance(answer, Ready), f"rank {rank} says {answer} before it is ready"
                    ready[rank] = answer
            check()
        return Group(links, ready[0].engine, ready[0].layers)

    def _check(self, links: dict[int, Link], deadline: float) -> None:
        dead = self._spawner.first_dead() if self._spawner is not None else None
        if dead is not None and (dead[0] not in links or links[dead[0]].answers.empty()):
            raise RankLostError(f"rank {dead[0]} ended with status {dead[1]} while starting; its log says why")
        missing = [r for r in range(self._parallel.devices) if r not in links]
        if time.monotonic() > deadline:
            raise RankLostError(
                f"the ranks were not ready in {self._parallel.rank_start_s:g} s (--rank-start-s);"
                + (f" ranks {missing} never connected" if missing else " loading takes longer")
            )


def _error_of(rank: int, answer: Failed) -> MoEServeError:
    """What a rank could not start with: the user's mistake as it said it, else a crash."""
    if answer.is_users:
        return ConfigError(answer.message)
    return RankLostError(f"rank {rank} failed while starting: {answer.message}; its log says more")


def next_link(door: Door, timeout_s: float) -> Link | None:
    """The next rank that `door` lets in, or None if none came in time."""
    caller = door.next(timeout_s)
    return None if caller is None else open_link(caller.rank, caller.pid, caller.connected)
