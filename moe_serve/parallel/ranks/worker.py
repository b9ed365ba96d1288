"""Worker: a rank's steps. Turns messages into runs of its model and the outcome into messages.

Knows one rank; knows no sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from expert_cache.experts import ResizeError
from moe_serve.config import EngineConfig
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.expert_plans import layout_from_json
from moe_serve.parallel.front.reports import report_to_json
from moe_serve.parallel.modes.conventional import ConventionalRunner
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.ownership import Ownership
from moe_serve.parallel.modes.recompute import RecomputingRunner
from moe_serve.parallel.modes.runner import RankRunner
from moe_serve.parallel.ranks import rank_model
from moe_serve.parallel.ranks.grouping import GroupRunner
from moe_serve.parallel.ranks.late_grammars import LateGrammars
from moe_serve.parallel.wire.environment import RankAddress
from moe_serve.parallel.wire.messages import StepReader, result_to_json
from moe_serve.parallel.wire.sockets import Wire
from placement.cost import hosts_of

MODES: Mapping[str, Callable[[ModelRunner, ExpertShare], RankRunner]] = {
    "conventional": ConventionalRunner,
    "coherent": RecomputingRunner,
}
"""By --ep-mode."""


class Worker:
    """One rank, loaded; the process group must have been joined (rank_model.join_group)."""

    def __init__(self, place: RankAddress, config: EngineConfig, parallel: ParallelConfig) -> None:
        self._runner, self._shared = rank_model.load(config, parallel, place)
        pages, context = rank_model.smallest(
            [self._runner.config.kv.num_pages or 0, self._runner.config.max_model_len or 0], self._runner.device
        )
        self.config = self._runner.config.replace(num_kv_pages=pages, max_model_len=context)
        self.layers = self._shared.local.store.decoder_layers
        mode = MODES[parallel.ep_mode](self._runner, self._shared)
        size = parallel.ranks_per_group
        self._mode = GroupRunner(mode, parallel.group_of(place.rank) * size, size) if parallel.ep_groups > 1 else mode
        self._reader = StepReader(LateGrammars(self.config).start)

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank has to say to the front's message."""
        match message["op"]:
            case "step":
                return self.step(message)
            case "place":
                return self.place(message)
            case "resize":
                return self.resize(message["mib"])
            case "report":
                return self.report()
        raise AssertionError(f"a rank knows no {message['op']!r}")

    @property
    def wire(self) -> Wire:
        """The way to the other ranks."""
        return self._shared.exchange.wire

    @torch.inference_mode()
    def step(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Run a step's share; the answer has this rank's tokens and what it counted so far."""
        outcome = self._mode.run(self._reader.read(message))
        return {**result_to_json(*outcome), **self._counted()}

    def place(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Another placement from the next step on; experts that are no longer run here leave this rank's cache."""
        shared = self._shared
        hosts = hosts_of(layout_from_json(message), shared.exchange.num_ranks)
        shared.ownership = Ownership(hosts, shared.exchange.rank, self._runner.device)
        shared.local.keep_only(hosts[:, :, shared.exchange.rank])
        return {}

    def report(self) -> dict[str, Any]:
        """What the experts here have done since the start. Any thread may ask."""
        return report_to_json(self._shared.local.report())

    def resize(self, moe_cache_mib: int) -> dict[str, Any]:
        """Change this rank's memory for experts; the answer says why not."""
        try:
            self._shared.local.resize(moe_cache_mib)
        except ResizeError as error:
            return {"refused": error.message}
        return {}

    def _counted(self) -> dict[str, Any]:
        traffic = self._shared.exchange.traffic
        totals = self._shared.local.totals()
        return {
            "traffic": traffic.totals(),
            "layer_bytes": traffic.by_layer(),
            "experts": dataclasses.asdict(totals),
        }
