"""A rank's process: meet the front, meet the other ranks, load, then run steps until the front has gone.

    python -m moe_serve.parallel.ranks.rank        with RANK, WORLD_SIZE, MASTER_ADDR ... in the environment

Waiting for a step is waiting at a socket: an idle rank uses no CPU. A second thread says every second
that the process is alive. Knows no HTTP and no scheduling.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from expert_cache.report import ExpertReport
from moe_serve.errors import CheckpointChangedError, MoEServeError
from moe_serve.openmp import spin_briefly
from moe_serve.parallel.wire.channel import Channel, ChannelClosed
from moe_serve.parallel.wire.door import knock, word_of
from moe_serve.parallel.wire.environment import SECRET, RankAddress, front_address, read_place
from moe_serve.parallel.wire.messages import (
    Alive,
    Answer,
    Ask,
    Failed,
    Ready,
    Start,
    Stop,
    encode,
    read_front,
)

if TYPE_CHECKING:
    from moe_serve.parallel.ranks.worker import Worker

log = logging.getLogger("moe_serve.rank")

BEAT_S = 1.0
CONNECT_S = 60.0
"""To find the front."""


def main() -> int:
    """Exit status 0 when the front said so or went away, 1 after an error, which the front is told too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    place = read_place()
    secret = os.environ.get(SECRET, "")
    channel = Channel(knock(front_address(place), word_of(secret), place.rank, CONNECT_S))
    heart = Heart(channel)
    threading.Thread(target=heart.beat, daemon=True).start()
    try:
        settings = read_front(channel.receive())
        assert isinstance(settings, Start)
        _serve(channel, heart, place, settings)
    except ChannelClosed as error:
        log.info("the front has gone, or hung up on a rank that does not know %s: %s", SECRET, error)
        return 0
    except Exception as error:
        _report(channel, error)
        return 1
    return 0


class Heart:
    """Signs of life, with what the experts have done since the last one if they did anything."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.report: Callable[[], ExpertReport | None] = lambda: None
        """What to add; nothing until the model is loaded."""

    def beat(self) -> None:
        """On a thread of its own. A rank whose front has gone ends, even out of a collective."""
        quiet = last = encode(Alive())
        while True:
            news = encode(Alive(self.report()))
            try:
                self._channel.send(quiet if news == last else news)
            except ChannelClosed:
                os._exit(0)
            last = news
            time.sleep(BEAT_S)


def _report(channel: Channel, error: Exception) -> None:
    is_users = isinstance(error, MoEServeError)
    log.error("the rank ends: %s", error, exc_info=not is_users)
    text = f"{error}" if is_users else f"{type(error).__name__}: {error}"[:200]
    with contextlib.suppress(ChannelClosed):  # the front may have gone
        channel.send(encode(Failed(text, is_users, isinstance(error, CheckpointChangedError))))


def _serve(channel: Channel, heart: Heart, place: RankAddress, settings: Start) -> None:
    worker = _load(place, settings)
    channel.send(encode(Ready(worker.config, worker.layers, worker.report())))
    heart.report = worker.report
    while True:
        message = read_front(channel.receive())
        if isinstance(message, Stop):
            return
        assert isinstance(message, Ask), f"the front says {message} to a rank that is ready"
        channel.send(encode(Answer(message.number, worker.answer(message.order))))


def _load(place: RankAddress, settings: Start) -> Worker:
    """torch is imported only now, so that a wrong environment is found at once."""
    from moe_serve.parallel.ranks.rank_model import join_group, load
    from moe_serve.parallel.ranks.worker import Worker

    join_group(place, settings.engine.device, settings.parallel.rank_step_s)
    return Worker(load(place, settings.engine, settings.parallel))


if __name__ == "__main__":
    spin_briefly(os.environ)
    status = main()
    sys.stderr.flush()
    os._exit(status)  # collectives of other ranks must not hold up the end of this one
