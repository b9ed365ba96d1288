"""Team: all ranks as one thing that runs steps. Finds out that one is lost, says so, and brings the group back.

States: starting -> ready -> recovering -> ready ... -> stopped or failed. A thread watches for lost ranks whether
or not a step runs. Collectives cannot outlive a member, so after a loss every rank starts again. Knows messages
and processes; knows no plans.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from enum import StrEnum
from typing import Any, TypeVar

from expert_cache.report import ExpertReport
from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.errors import CheckpointChangedError, EngineDeadError, MoEServeError
from moe_serve.parallel.front.gathering import Gathering
from moe_serve.parallel.front.links import Link, RankLostError
from moe_serve.parallel.front.spawner import Spawner
from moe_serve.parallel.wire.channel import ChannelClosed
from moe_serve.parallel.wire.messages import (
    Answer,
    Ask,
    Counted,
    Failed,
    FromFront,
    Order,
    Outcome,
    Ready,
    StepDone,
    Stop,
    encode,
)

Kind = TypeVar("Kind", bound=Outcome)
log = logging.getLogger(__name__)

WATCH_S = 0.2
MAX_RESTARTS = 5
"""In RESTART_WINDOW_S seconds; after more the team fails for good."""
RESTART_WINDOW_S = 300.0


class TeamState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


class Team:
    """The ranks of one server."""

    def __init__(
        self,
        parallel: ParallelConfig,
        gathering: Gathering,
        spawner: Spawner | None,
    ) -> None:
        """`spawner`: None where a launcher starts the ranks; then a loss is final here and the launcher's to mend."""
        self.parallel = parallel
        self.num_ranks = parallel.devices
        self.state = TeamState.STARTING
        self.trouble = ""
        """What is wrong, in words, while the state is not ready."""
        self.failed = False
        """The ranks are lost and will not come back by themselves."""
        self._files_changed = False
        """That is why."""
        self.generation = 0
        """Counts groups: what ranks of an older one remembered is lost."""
        self.engine_config: EngineConfig | None = None
        """As the ranks resolved it."""
        self.layers: tuple[int, ...] = ()
        """The model's decoder layers with experts."""
        self.counted: dict[int, Counted] = {}
        """By rank, as of the last step."""
        self._gathering = gathering
        self._spawner = spawner
        self._links: dict[int, Link] = {}
        self._changed = threading.Condition()
        self._losses: list[float] = []
        self._next_number = 0
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    # ---- starting ---------------------------------------------------------------------------------

    def start(self) -> EngineConfig:
        """Start all ranks and wait until they are ready. ConfigError is the first rank's that has one."""
        try:
            self._gather()
        except BaseException:
            self.stop()
            raise
        self._watcher.start()
        assert self.engine_config is not None
        return self.engine_config

    def _gather(self) -> None:
        """A new group in place of the one before."""
        for link in self._links.values():
            link.channel.close()
        self._links = {}
        self._links, self.engine_config, self.layers = self._gathering.run(lambda: self.state is TeamState.STOPPED)
        with self._changed:
            self.generation += 1
            self.state, self.trouble = TeamState.READY, ""
            self._changed.notify_all()

    # ---- steps ------------------------------------------------------------------------------------

    def wait_until_ready(self) -> int:
        """The generation that is ready. EngineDeadError if none will be, CheckpointChangedError if that is why."""
        with self._changed:
            while self.state in (TeamState.STARTING, TeamState.RECOVERING):
                self._changed.wait(1.0)
            if self.state is not TeamState.READY:
                kind = CheckpointChangedError if self._files_changed else EngineDeadError
                raise kind(self.trouble or "the ranks have been stopped")
            return self.generation

    def ask_all(self, order: Order, kind: type[Kind]) -> list[Kind]:
        """Send to every rank and wait for every answer, which is of this kind, by rank.

        RankLostError, CheckpointChangedError.
        """
        generation = self.generation
        self._next_number += 1
        number = self._next_number
        try:
            self._send_all(Ask(number, order))
        except ChannelClosed:
            self._raise_lost(generation)
        answers: dict[int, Kind] = {}
        deadline = time.monotonic() + self.parallel.rank_step_s
        while len(answers) < self.num_ranks:
            if self.state is not TeamState.READY or self.generation != generation:
                self._raise_lost(generation)
            for rank, link in self._links.items():
                if rank in answers:
                    continue
                answer = link.next(WATCH_S)
                if answer is not None:
                    answers[rank] = self._checked(rank, answer, number, kind)
            if time.monotonic() > deadline:
                self._lose(f"a step took longer than {self.parallel.rank_step_s:g} s (--rank-step-s)")
        self.counted |= {rank: answer.counted for rank, answer in answers.items() if isinstance(answer, StepDone)}
        return [answers[rank] for rank in range(self.num_ranks)]

    def _checked(self, rank: int, answer: Ready | Failed | Answer, number: int, kind: type[Kind]) -> Kind:
        if isinstance(answer, Failed):
            time.sleep(WATCH_S)  # a rank often fails because another has just died, and that one is the news
            dead = self._first_dead()
            is_cause = dead is None or dead[1] >= 0
            self._lose(f"rank {rank} failed: {answer.message}" if is_cause else self._find_trouble())
            raise self._loss()
        assert isinstance(answer, Answer), f"rank {rank} is ready again"
        assert answer.number == number, f"rank {rank} answers {answer.number} instead of {number}"
        assert isinstance(answer.outcome, kind), f"rank {rank} answers {answer.outcome} instead of {kind.__name__}"
        return answer.outcome

    def _raise_lost(self, generation: int) -> None:
        """Wait until the watcher has said what happened, then raise it."""
        deadline = time.monotonic() + 2 * self.parallel.rank_stall_s
        while self.state is TeamState.READY and self.generation == generation and time.monotonic() < deadline:
            time.sleep(WATCH_S / 4)
        raise self._loss()

    def _loss(self) -> MoEServeError:
        """What has become of the step."""
        if self._files_changed:
            return CheckpointChangedError(self.trouble)
        return RankLostError(self.trouble or "the ranks were lost and have started again")

    def _send_all(self, message: FromFront) -> None:
        raw = encode(message)
        for _, link in sorted(self._links.items()):
            link.channel.send(raw)

    # ---- watching ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        while self.state not in (TeamState.STOPPED, TeamState.FAILED):
            if self.state is TeamState.READY:
                trouble = self._find_trouble()
                if trouble:
                    self._lose(trouble)
            if self.state is TeamState.RECOVERING:
                self._recover()
            time.sleep(WATCH_S)

    def _find_trouble(self) -> str:
        now = time.monotonic()
        dead = self._first_dead()
        if dead is not None:
            return f"rank {dead[0]} died (exit status {dead[1]})"
        for rank, link in self._links.items():
            if link.closed:
                return f"rank {rank} has gone"
            if now - link.heard_s > self.parallel.rank_stall_s:
                return f"rank {rank} has given no sign of life for {self.parallel.rank_stall_s:g} s"
        return ""

    def _first_dead(self) -> tuple[int, int] | None:
        """See Spawner.first_dead."""
        return self._spawner.first_dead() if self._spawner is not None else None

    def _lose(self, trouble: str) -> None:
        dead = self._first_dead()
        if dead is not None and dead[0] in self._links:
            self._links[dead[0]].hear_out()
        changed = next((link.changed_file for link in self._links.values() if link.changed_file), None)
        with self._changed:
            if self.state is not TeamState.READY:
                return
            self.trouble = trouble = changed or trouble
            self._files_changed = changed is not None
            may_restart = self._may_restart() and not self._files_changed
            self.state = TeamState.RECOVERING if may_restart else TeamState.FAILED
            self._changed.notify_all()
        log.error("%s; %s", trouble, "all ranks start again" if may_restart else "the server stops serving")
        if not may_restart:
            self._give_up()

    def _may_restart(self) -> bool:
        """Count a loss; whether there were few lately."""
        now = time.monotonic()
        self._losses = [t for t in self._losses if now - t < RESTART_WINDOW_S] + [now]
        return self._spawner is not None and len(self._losses) <= MAX_RESTARTS

    def _give_up(self) -> None:
        """The ranks that are left end. Under a launcher the process does, so that the launcher can start everything
        again, unless that would be another model."""
        self.failed = True
        if self._spawner is not None:
            self._spawner.stop()
        elif not self._files_changed:
            os.kill(os.getpid(), signal.SIGTERM)

    def _recover(self) -> None:
        started = time.monotonic()
        try:
            self._gather()
        except Exception as error:
            log.error("the ranks could not be started again: %s", error)
            with self._changed:
                if self.state is not TeamState.STOPPED:
                    self.state = TeamState.FAILED
                self.failed = self.state is TeamState.FAILED
                self.trouble = f"{self.trouble}; starting again failed: {error}"
                self._changed.notify_all()
        else:
            log.info("all ranks are back after %.1f s", time.monotonic() - started)

    # ---- stopping ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End every rank. Idempotent."""
        with self._changed:
            self.state = TeamState.STOPPED
            self._changed.notify_all()
        for link in self._links.values():
            with contextlib.suppress(ChannelClosed):  # it may have gone already
                link.channel.send(encode(Stop()))
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join()
        for link in self._links.values():
            link.channel.close()
        if self._spawner is not None:
            self._spawner.stop()
        self._gathering.close()

    def reports(self) -> tuple[int, dict[int, ExpertReport]]:
        """The generation, and what each rank's experts have done; nothing while ranks are lost. Any thread may ask."""
        if self.state is not TeamState.READY:
            return self.generation, {}
        links = self._links.items()
        return self.generation, {rank: link.report for rank, link in sorted(links) if link.report is not None}

    def describe(self) -> dict[str, Any]:
        """State and each rank's process and counts, for /health and metrics."""
        ranks = [
            {"rank": rank, "pid": link.pid, "heard_s_ago": round(time.monotonic() - link.heard_s, 1)}
            for rank, link in sorted(self._links.items())
        ]
        return {"state": str(self.state), "trouble": self.trouble, "generation": self.generation, "ranks": ranks}
