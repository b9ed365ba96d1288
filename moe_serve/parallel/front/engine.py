"""ParallelEngine: the engine over a team of ranks. Gives sequences their homes, and outlives the loss of a rank.

After a loss, everything that ran is recomputed on the new group from the tokens the engine still has, so a
client sees a pause. A request that sees MAX_LOSSES of them ends with an error: it may be the cause.
"""

from __future__ import annotations

from concurrent.futures import Future

from moe_serve.engine.engine import Engine
from moe_serve.engine.trouble import Trouble
from moe_serve.errors import CheckpointChangedError, EngineDeadError, InvalidRequestError, MoEServeError
from moe_serve.grammars.matcher import Place
from moe_serve.parallel.front.links import RankLostError
from moe_serve.parallel.front.team import TeamState
from moe_serve.parallel.front.team_runner import TeamRunner
from moe_serve.scheduling.sequence import Request, SampleOutput, Sequence
from moe_serve.spec import ModelSpec
from moe_serve.text.tokenizer import Tokenizer
from placement.plan import PlacementPlan

MAX_LOSSES = 2


class ParallelEngine(Engine):
    """As Engine, with sequences on several ranks."""

    def __init__(
        self,
        runner: TeamRunner,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        eos_token_ids: frozenset[int],
        plan: PlacementPlan,
    ) -> None:
        """`plan`: the one that ranks start with."""
        super().__init__(runner, tokenizer, spec, eos_token_ids)
        self.team = runner.team
        self.expert_reports = runner.reports
        self.plan = plan
        """In force; see `place`."""
        self.num_placements = 0
        """Times that another plan came into force."""
        self._team_runner = runner
        self._generation = runner.team.generation
        self._losses: dict[Sequence, int] = {}

    def trouble(self) -> Trouble | None:
        """What ranks are missing; None while all are there."""
        if self.team.state is TeamState.READY:
            return None
        return Trouble(str(self.team.state), self.team.trouble, self.team.failed)

    def begin_check(self, request: Request) -> Future[Place] | None:
        """As Engine.begin_check. Ranks send no scores of prompts: those have a row of logits per token."""
        if request.params.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs", "log-probabilities of prompts work on one device only so far")
        return super().begin_check(request)

    def place(self, plan: PlacementPlan) -> None:
        """Between two steps: experts live where `plan` says, on all ranks or, after an error, on none.

        Requests go on and their tokens stay the same. `plan` must fit (plans.check_fit). RankLostError.
        """
        self._team_runner.place(plan.layout)
        self.plan = plan
        self.num_placements += 1

    def add_request(self, request: Request) -> None:
        """All samples of a request live on one rank, so that they can share its prompt's pages."""
        home = self._team_runner.prescheduler.home(request.prompt_token_ids, self._tokens_at_home())
        super().add_request(request)
        for seq in self._sequences[request.request_id]:
            seq.home_rank = home
            seq.prefix_root += self._pages_known_to(home).to_bytes(4, "big")

    def _pages_known_to(self, home: int) -> int:
        """A number that sequences share whose ranks have each other's pages: the home, or its group."""
        parallel = self.team.parallel
        return home if parallel.ep_mode == "conventional" else parallel.group_of(home)

    def _tokens_at_home(self) -> list[int]:
        """Tokens to compute or to attend to, by rank."""
        tokens = [0] * self.team.num_ranks
        for seq in self.scheduler.live():
            tokens[seq.home_rank] += seq.num_tokens
        return tokens

    def step(self) -> list[SampleOutput]:
        """As Engine.step. A lost rank costs time; if the ranks cannot be brought back, every request ends.
        CheckpointChangedError."""
        try:
            generation = self.team.wait_until_ready()
            if generation != self._generation:
                self._start_over(generation)
            return super().step()
        except CheckpointChangedError:
            raise
        except EngineDeadError as error:
            return [self._fail(seq, error) for seq in list(self.scheduler.live())]
        except RankLostError as error:
            return self._count_loss(error)

    def _start_over(self, generation: int) -> None:
        """The ranks are new: what they had computed is gone, and they have the plan that they started with."""
        self._generation = generation
        self._team_runner.forget()
        self.scheduler.requeue_running()
        if self.num_placements:
            self._team_runner.place(self.plan.layout)

    def _count_loss(self, error: RankLostError) -> list[SampleOutput]:
        losses = {seq: self._losses.get(seq, 0) + 1 for seq in self.scheduler.running}
        self._losses = {seq: count for seq, count in losses.items() if count < MAX_LOSSES}
        message = f"ranks were lost {MAX_LOSSES} times while this request ran; the last time: {error.message}"
        return [self._fail(seq, MoEServeError(message)) for seq, count in losses.items() if count >= MAX_LOSSES]
