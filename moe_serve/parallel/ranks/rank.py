"""A rank's process: meet the front, meet the other ranks, load, then run steps until the front has gone.

    python -m moe_serve.parallel.ranks.rank        with RANK, WORLD_SIZE, MASTER_ADDR ... in the environment

Waiting for a step is waiting at a socket: an idle rank uses no CPU. A second thread says every second
that the process is alive. Knows no HTTP and no scheduling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_serve.config import EngineConfig
from moe_serve.errors import MoEServeError
from moe_serve.openmp import spin_briefly
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.wire.channel import Channel, ChannelClosed, connect
from moe_serve.parallel.wire.environment import SECRET, RankAddress, front_address, read_place

log = logging.getLogger("moe_serve.rank")

BEAT_S = 1.0


def main() -> int:
    """Exit status 0 when the front said so or went away, 1 after an error that was reported to it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    place = read_place()
    host, port = front_address(place)
    channel = connect(host, port, timeout_s=60)
    channel.send({"op": "hello", "rank": place.rank, "pid": os.getpid(), "secret": os.environ.get(SECRET, "")})
    heart = Heart(channel)
    threading.Thread(target=heart.beat, daemon=True).start()
    try:
        settings = channel.receive(timeout_s=60)
        config, parallel = EngineConfig.from_dict(settings["engine"]), ParallelConfig.from_dict(settings["parallel"])
        _serve(channel, heart, place, config, parallel)
    except (ChannelClosed, TimeoutError):
        return 0
    except Exception as error:
        _report(channel, error)
        return 1
    return 0


class Heart:
    """Signs of life, with what the experts have done since the last one if they did anything."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._last: dict[str, Any] = {}
        self.report: Callable[[], dict[str, Any]] = dict
        """What to add; nothing until the model is loaded."""

    def beat(self) -> None:
        """On a thread of its own. A rank whose front has gone ends, even out of a collective."""
        while True:
            report = self.report()
            news = {} if report == self._last else {"report": report}
            self._last = report
            try:
                self._channel.send({"op": "alive", **news})
            except ChannelClosed:
                os._exit(0)
            time.sleep(BEAT_S)


def _report(channel: Channel, error: Exception) -> None:
    kind = "config" if isinstance(error, MoEServeError) else "crash"
    log.error("the rank ends: %s", error, exc_info=kind == "crash")
    text = f"{error}" if kind == "config" else f"{type(error).__name__}: {error}"[:200]
    with contextlib.suppress(ChannelClosed):  # the front may have gone
        channel.send({"op": "failed", "kind": kind, "message": text})


def _serve(channel: Channel, heart: Heart, place: RankAddress, config: EngineConfig, parallel: ParallelConfig) -> None:
    worker = _load(place, config, parallel)
    facts = {"engine": dataclasses.asdict(worker.config), "layers": worker.layers}
    channel.send({"op": "ready", **facts, "report": worker.report()})
    heart.report = worker.report
    while True:
        message = channel.receive()
        if message["op"] == "stop":
            return
        channel.send({"op": "done", "n": message["n"], **worker.answer(message)})


def _load(place: RankAddress, config: EngineConfig, parallel: ParallelConfig) -> Any:
    """The worker; torch is imported only now, so that a wrong environment is found at once."""
    from moe_serve.parallel.ranks.rank_model import join_group
    from moe_serve.parallel.ranks.worker import Worker

    join_group(place, parallel, config)
    return Worker(place, config, parallel)


if __name__ == "__main__":
    spin_briefly(os.environ)
    status = main()
    sys.stderr.flush()
    os._exit(status)  # collectives of other ranks must not hold up the end of this one
