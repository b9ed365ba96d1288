"""Scheduler: which tokens of which sequences the next step computes, and where their KV goes.

There are no phases. Each sequence has `num_computed` chasing `num_tokens`; every step, the token
budget is handed out to close gaps: first to sequences with a gap of one (decoding), then to those
in the middle of their prompt, then to waiting ones. Chunked prefill, prefix-cache hits, mixed
batches and recomputation after preemption are all the same rule (idea: vLLM v1's scheduler).

Host integers only: imports no torch, no tokenizer, no HTTP.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from moe_serve.scheduling.batch_choice import BatchChoice, FirstComeFirstServed
from moe_serve.scheduling.batch_plan import BatchPlan, Sampled, ScheduledSequence, StepResult
from moe_serve.scheduling.drafting import Drafter
from moe_serve.scheduling.fair_shares import FairShares
from moe_serve.scheduling.finish import Ending, FinishReason
from moe_serve.scheduling.kv_pages import PagePool
from moe_serve.scheduling.prefixes import Prefixes
from moe_serve.scheduling.seats import NO_SEAT, Seats
from moe_serve.scheduling.sequence import Sequence
from moe_serve.scheduling.step_draft import SchedulerLimits, StepDraft
from moe_serve.scheduling.waiting_line import WaitingLine


class Scheduler:
    """Owns the queues and decides; `schedule` -> BatchPlan, `update` applies what came of it."""

    def __init__(self, limits: SchedulerLimits, pool: PagePool, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.limits = limits
        self.pool = pool
        self.seats = Seats(limits.max_num_seqs)
        self.prefixes = Prefixes(pool, limits.enable_prefix_caching, limits.state_block, limits.num_saved_states)
        self._eos = eos_token_ids
        self.choice: BatchChoice = FirstComeFirstServed()
        """Who decodes when a step is too narrow for all."""
        self.drafter: Drafter | None = None
        """Guesses next tokens; None: there are no guesses."""
        self.shares = FairShares()
        self.waiting = WaitingLine(self.shares)
        self.running: list[Sequence] = []
        """In order of admission: the last one is preempted first."""

    # ---- queues ---------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; moe_serve/scheduling/waiting_line.py says where."""
        self.shares.enter(seq.client)
        self.waiting.add(seq)

    def has_work(self) -> bool:
        """Something can be computed; a paused sequence cannot."""
        return any(not seq.is_paused for seq in self.live())

    def live(self) -> Iterator[Sequence]:
        """Every unfinished sequence."""
        yield from self.running
        yield from self.waiting

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live sequence and free its pages at once."""
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        self._release(seq)
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        else:
            return  # it was never queued
        self.shares.leave(seq.client)

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.page_ids)
        self.seats.give_back(seq.seat)
        self.prefixes.drop(seq)
        seq.page_ids, seq.seat = array("q"), NO_SEAT

    # ---- plan -----------------------------------------------------------------------------------

    def schedule(self) -> BatchPlan:
        """Decide one step. Every sequence in the plan owns the pages its tokens go to.

        Admission comes last, but for clients that were served less than one in the middle of its prompt. There is none
        in a step that had to preempt: a sequence admitted then would take the pages that the preempted one waits for.
        """
        draft = StepDraft(self.limits)
        active = [s for s in self.running if not s.is_paused]
        for seq in self._chosen([s for s in active if s.num_tokens - s.num_computed == 1]):
            self._schedule_running(seq, draft)
        for seq in self._in_turn([s for s in active if s.num_tokens - s.num_computed > 1]):
            if self.shares.are_shared:
                self._admit_waiting(draft, ahead_of=seq)
            self._schedule_running(seq, draft)
        self._admit_waiting(draft)
        if self.drafter is not None:
            self._add_drafts(draft, self.drafter)
        return draft.finish()

    def _in_turn(self, prompts: list[Sequence]) -> Iterable[Sequence]:
        """Sequences in the middle of their prompts: the client that was served least goes first."""
        if not self.shares.are_shared:
            return prompts
        return sorted(prompts, key=lambda seq: self.shares.served(seq.client))

    def _chosen(self, decoding: list[Sequence]) -> list[Sequence]:
        """Of the sequences that could decode, those that do. The others keep their pages."""
        width = self.limits.max_num_batched_seqs
        if width is None or len(decoding) <= width:
            return decoding
        return self.choice.choose(decoding, min(width, self.limits.max_num_batched_tokens))

    def _schedule_running(self, seq: Sequence, draft: StepDraft) -> None:
        if not seq.page_ids:
            return  # preempted by one scheduled before it
        count = self._affordable(seq, draft)
        if count == 0:
            return
        while not self._grow(seq, seq.num_computed + count):
            victim = self._paused() or self.running[-1]
            self._preempt(victim, draft)
            if victim is seq:
                return
        self._plan(seq, count, draft)

    def _plan(self, seq: Sequence, count: int, draft: StepDraft, restored: int | None = None) -> None:
        saves = self.prefixes.saves(seq, seq.num_computed + count)
        draft.add(ScheduledSequence(seq, seq.num_computed, count, restored, saves))

    def _affordable(self, seq: Sequence, draft: StepDraft) -> int:
        """Tokens of `seq` that fit the budgets: all that are missing, a chunk of them, or none."""
        missing = seq.num_tokens - seq.num_computed
        if not self.limits.enable_chunked_prefill:
            return missing if missing <= draft.budget else 0
        if seq.num_unscored > draft.score_budget:
            missing = min(missing, len(seq.prompt_logprobs) + draft.score_budget - seq.num_computed)
        return self.prefixes.whole_blocks(seq, min(missing, draft.budget))

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` pages for `num_tokens` tokens; False, and nothing changed, if there are too few."""
        pages = self.pool.allocate(max(0, self.pool.pages_for(num_tokens) - len(seq.page_ids)))
        if pages is None:
            return False
        seq.page_ids.extend(pages)
        return True

    def _preempt(self, seq: Sequence, draft: StepDraft) -> None:
        """Free everything `seq` holds; it goes to the head of the queue and is recomputed later."""
        draft.drop(seq)
        self._put_back(seq)
        draft.preempted.append(seq)

    def _put_back(self, seq: Sequence) -> None:
        self._release(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.running.remove(seq)
        self.waiting.appendleft(seq)

    def requeue_running(self) -> None:
        """Their keys and values are lost: every running sequence waits again, in order, to be recomputed."""
        for seq in reversed(list(self.running)):
            self._put_back(seq)
        self.pool.clear_cache()

    def _admit_waiting(self, draft: StepDraft, ahead_of: Sequence | None = None) -> None:
        """Give waiting sequences places; with `ahead_of`, only new ones of clients served no more than its."""
        while not draft.preempted and draft.budget > 0 and (seq := self.waiting.next()) is not None:
            if ahead_of is not None and not self._is_ahead(seq, ahead_of):
                return
            if len(self.running) >= self.limits.max_num_seqs:
                self._make_room(draft)
                return
            if self._awaits_leader(seq):
                return
            if not self._admit(seq, draft):
                self._make_room(draft)
                return
            self.waiting.remove(seq)
            self.running.append(seq)

    def _is_ahead(self, new: Sequence, running: Sequence) -> bool:
        is_other = new.client != running.client and not new.num_preemptions
        return is_other and self.shares.served(new.client) <= self.shares.served(running.client)

    def _paused(self) -> Sequence | None:
        return next((seq for seq in reversed(self.running) if seq.is_paused), None)

    def _make_room(self, draft: StepDraft) -> None:
        """Sequences that nothing is computed for hold up no other: the next step finds what one of them held."""
        if (paused := self._paused()) is not None:
            self._preempt(paused, draft)

    def _awaits_leader(self, seq: Sequence) -> bool:
        """True for samples 2..n of a request while the first computes the prompt they will share, or scores it."""
        if seq.index == 0 or not (self.limits.enable_prefix_caching or seq.params.prompt_logprobs is not None):
            return False
        return any(s.request is seq.request and s.num_computed < s.num_prompt for s in self.running)

    def _admit(self, seq: Sequence, draft: StepDraft) -> bool:
        """Put a waiting sequence into the step if pages and budget allow; prefix hits come free."""
        prefix = self.prefixes.find(seq)
        cached = list(prefix.pages)
        num_cached = len(cached) * self.pool.page_size
        seq.num_computed = num_cached
        count = self._affordable(seq, draft)
        needed = self.pool.pages_for(num_cached + count) - len(cached)
        if count == 0 or needed + self.pool.num_evictable(cached) > self.pool.num_free:
            seq.num_computed = 0
            return False
        self.pool.share(cached)
        seq.page_ids = array("q", cached)
        seq.seat = self.seats.take()
        grown = self._grow(seq, num_cached + count)
        assert grown, "admission miscounted the free pages"
        if self.limits.enable_prefix_caching:
            draft.queried += seq.num_tokens
            draft.hits += num_cached
        if seq.num_preemptions == 0:
            seq.num_cached = num_cached
        self._plan(seq, count, draft, prefix.row)
        return True

    def _add_drafts(self, draft: StepDraft, drafter: Drafter) -> None:
        """Let sequences that decode compute guesses too, with the budget and the free pages that nothing else needs.

        A grammar's masks are those of one position, so its sequences get none; nor does a sequence without an answer
        yet, whose first output tells of the prompt.
        """
        able = [i.seq for i in draft.decoding if i.seq.num_generated and i.seq.matcher is None]
        if not able or draft.preempted:
            return
        room = min(draft.budget, draft.score_budget)
        for seq, tokens in drafter.draft(able, draft.num_tokens, room).items():
            most = min(len(tokens), seq.max_total_tokens - seq.num_tokens - 1)
            if most > 0 and self._grow(seq, seq.num_tokens + most):
                draft.add_drafts(seq, tokens[:most])

    # ---- apply ----------------------------------------------------------------------------------

    def update(self, plan: BatchPlan, result: StepResult) -> list[Sequence]:
        """Book the step: computed counts, published pages, sampled tokens, finished sequences.

        Returns the sequences that got a token, or ended without one (max_tokens 0), in plan order.
        Sequences that were aborted while the step ran, or whose results are errors, are skipped. A late one computes
        its last token again in the next step.
        Example: plan with a decode (needs_sample), a prompt chunk (does not) and a prompt end
        (needs_sample) has result.token_ids of length 2.
        """
        advanced = []
        sampled = iter(zip(result.token_ids, result.logprobs, strict=True))
        for item in plan.scheduled:
            token = next(sampled) if item.needs_sample else None
            seq = item.seq
            if seq.is_finished or seq in result.errors:
                seq.num_new = 0
                continue
            is_late = seq in result.late
            tokens = [] if token is None or is_late else self._accepted(item, token, result)
            ending = self._append(seq, tokens)
            self._book(item, result, is_late)
            if not tokens:
                continue
            advanced.append(seq)
            if ending is not None:
                self.finish(seq, *ending)
        return advanced

    def _accepted(self, item: ScheduledSequence, token: Sampled, result: StepResult) -> list[Sampled]:
        """The sampled tokens that count: each as long as the drafts before it are what was sampled."""
        found = [token]
        for draft, behind in zip(item.drafts, result.drafted.get(item.seq, ()), strict=False):
            if found[-1][0] != draft:
                break
            found.append(behind)
        return found

    def _append(self, seq: Sequence, tokens: list[Sampled]) -> Ending | None:
        """Give a sequence its new tokens, up to one that ends it."""
        seq.num_new = 0
        for token, logprob in tokens:
            if seq.params.max_tokens == 0:
                return Ending(FinishReason.LENGTH)
            seq.token_ids.append(token)
            seq.num_new += 1
            if logprob is not None:
                seq.logprobs.append(logprob)
            if (ending := self._ending(seq)) is not None:
                return ending
        return None

    def _book(self, item: ScheduledSequence, result: StepResult, is_late: bool) -> None:
        """What was computed counts, and others may find it."""
        seq = item.seq
        seq.num_computed = item.start + item.num_kept - is_late
        self.shares.charge(seq.client, item.num_kept)
        seq.prompt_logprobs += result.prompt_logprobs.get(seq, ())
        self.prefixes.publish(item)
        if is_late and self.limits.state_block is not None:
            self._put_back(seq)  # its state has the token already

    def _ending(self, seq: Sequence) -> Ending | None:
        """Why its newest token is its last; None: it is not."""
        token = seq.token_ids[-1]
        params = seq.params
        # A grammar that leaves nothing but the end has the last word (SamplingParams.grammar).
        past_min = seq.num_generated >= params.min_tokens or params.grammar is not None
        if past_min and token in params.stop_token_ids:
            return Ending(FinishReason.STOP, token)
        if past_min and not params.ignore_eos and token in self._eos:
            return Ending(FinishReason.STOP)
        return Ending(FinishReason.LENGTH) if seq.num_tokens >= seq.max_total_tokens else None
