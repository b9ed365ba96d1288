"""Worker: what a rank does when the front asks. Knows one rank and its messages; knows no sockets."""

from __future__ import annotations

import torch

from expert_cache.report import ExpertReport
from expert_cache.running.experts import ResizeError
from moe_serve.execution.current_device import on_device
from moe_serve.parallel.ranks.late_grammars import late_grammars
from moe_serve.parallel.ranks.rank_model import RankModel
from moe_serve.parallel.ranks.step_reader import StepReader
from moe_serve.parallel.wire.messages import Counted, Order, Outcome, Place, Placed, Resize, Resized, Step, StepDone
from placement.cost import Layout, hosts_of


class Worker:
    """One rank, loaded."""

    def __init__(self, model: RankModel) -> None:
        self.config = model.config
        self._device = torch.device(model.config.device)
        self.layers = model.share.local.store.decoder_layers
        self._share = model.share
        self._mode = model.mode
        self._files = model.files
        self._reader = StepReader(late_grammars(self.config).start)

    def answer(self, order: Order) -> Outcome:
        """Do it on this rank's device, and say what came of it."""
        with on_device(self._device):
            match order:
                case Step():
                    return self.step(order)
                case Place():
                    return self.place(order.layout)
                case Resize():
                    return self.resize(order.mib)

    @torch.inference_mode()
    def step(self, step: Step) -> StepDone:
        """Run this rank's part of a step. CheckpointChangedError."""
        self._files.check()
        return StepDone(*self._mode.run(self._reader.read(step)), self._counted())

    def place(self, layout: Layout) -> Placed:
        """Another placement from the next step on."""
        self._share.place(hosts_of(layout, self._share.exchange.num_ranks))
        return Placed()

    def resize(self, mib: int) -> Resized:
        """Change this rank's memory for experts."""
        try:
            self._share.local.resize(mib)
        except ResizeError as error:
            return Resized(error.message)
        return Resized()

    def report(self) -> ExpertReport:
        """What the experts here have done since the start. Any thread may ask."""
        return self._share.local.report()

    def _counted(self) -> Counted:
        traffic = self._share.exchange.traffic
        return Counted(traffic.totals(), traffic.by_layer(), self._share.local.totals())
