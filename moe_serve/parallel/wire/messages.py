"""What the front and its ranks say to one another: sequences and steps as JSON and back. Knows no torch and no sockets.

Ranks keep a mirror of every live sequence, because sampling needs its parameters and its tokens. A step says
what was added since the step before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence, StepResult
from moe_serve.scheduling.sequence import (
    Closeable,
    GrammarKind,
    GrammarSpec,
    Request,
    SamplingParams,
    Sequence,
    TokenLogprob,
)

Sampled = tuple[int, TokenLogprob | None]


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """Fields that are not the default."""
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    values["logit_bias"] = list(params.logit_bias.items())
    values["grammar"] = params.grammar and dataclasses.asdict(params.grammar)
    default = SamplingParams()
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def params_from_json(data: Mapping[str, Any]) -> SamplingParams:
    values = {name: _frozen(value) for name, value in data.items()}
    values["logit_bias"] = dict(data.get("logit_bias", ()))
    if "grammar" in values:
        values["grammar"] = GrammarSpec(**{**values["grammar"], "kind": GrammarKind(values["grammar"]["kind"])})
    return SamplingParams(**values)


def _frozen(value: Any) -> Any:
    """Lists as tuples, those within lists too: a bad word is a tuple of tokens."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class StepWriter:
    """The front's side: plans as messages, and which sequences the ranks know already."""

    def __init__(self) -> None:
        self._keys: dict[Sequence, int] = {}
        self._known_tokens: dict[Sequence, int] = {}
        self._next_key = 0

    def write(self, plan: BatchPlan, routes: int = 0) -> dict[str, Any]:
        """`routes`: what is wanted of the step's routes, one of the constants in routes.py."""
        gone = [seq for seq in self._keys if seq.is_finished]
        message = {
            "routes": routes,
            "gone": [self._keys.pop(seq) for seq in gone],
            "new": [self._introduce(i.seq) for i in plan.scheduled if i.seq not in self._keys],
            "items": [self._item(i) for i in plan.scheduled],
        }
        for seq in gone:
            del self._known_tokens[seq]
        return message

    def _introduce(self, seq: Sequence) -> dict[str, Any]:
        self._keys[seq] = key = self._next_key
        self._known_tokens[seq] = seq.num_tokens
        self._next_key += 1
        return {
            "key": key,
            "request_id": seq.request.request_id,
            "index": seq.index,
            "num_prompt": seq.num_prompt,
            "tokens": seq.token_ids,
            "max_total_tokens": seq.max_total_tokens,
            "home": seq.home_rank,
            "params": params_to_json(seq.params),
        }

    def _item(self, item: ScheduledSequence) -> list[Any]:
        seq = item.seq
        fresh = seq.token_ids[self._known_tokens[seq] :]
        self._known_tokens[seq] = seq.num_tokens
        return [self._keys[seq], item.start, item.count, fresh, seq.page_ids]


@dataclass(slots=True)
class RankStep:
    """A step as a rank sees it."""

    plan: BatchPlan
    homes: tuple[int, ...]
    """For each item of the plan, the rank where its sequence lives."""
    routes: int = 0
    """What the front wants to know of the routes."""

    def part_of(self, rank: int) -> list[int]:
        """Indices of the items whose home is a rank."""
        return [i for i, home in enumerate(self.homes) if home == rank]


@dataclass
class StepReader:
    """A rank's side: messages as plans over mirrored sequences."""

    start_grammar: Callable[[GrammarSpec], Closeable]
    """Makes the matcher of a sequence with a grammar."""
    _sequences: dict[int, Sequence] = field(default_factory=dict)

    def read(self, message: Mapping[str, Any]) -> RankStep:
        for key in message["gone"]:
            gone = self._sequences.pop(key)
            if gone.matcher is not None:
                gone.matcher.close()
        for entry in message["new"]:
            seq = self._sequences[entry["key"]] = _mirror(entry)
            if seq.params.grammar is not None:
                seq.matcher = self.start_grammar(seq.params.grammar)
        scheduled = []
        for key, start, count, fresh, pages in message["items"]:
            seq = self._sequences[key]
            seq.token_ids += fresh
            seq.page_ids = pages
            seq.num_computed = start
            scheduled.append(ScheduledSequence(seq, start, count))
        homes = tuple(item.seq.home_rank for item in scheduled)
        return RankStep(BatchPlan(tuple(scheduled)), homes, message["routes"])


def _mirror(entry: Mapping[str, Any]) -> Sequence:
    tokens = entry["tokens"]
    request = Request(entry["request_id"], tuple(tokens[: entry["num_prompt"]]), params_from_json(entry["params"]))
    seq = Sequence(request, entry["index"], list(tokens), entry["max_total_tokens"])
    seq.home_rank = entry["home"]
    return seq


def result_to_json(
    sampled: Mapping[int, Sampled], errors: Mapping[int, str], routes: Items[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Tokens and errors by index of the plan's items; `routes`: see routes.py."""
    tokens = [[i, token, None if lp is None else [lp.logprob, lp.top]] for i, (token, lp) in sampled.items()]
    return {"tokens": tokens, "errors": list(errors.items()), "routes": list(routes)}


def merge_results(plan: BatchPlan, answers: Items[Mapping[str, Any]]) -> StepResult:
    """The StepResult that all ranks' answers make together."""
    sampled: dict[int, Sampled] = {}
    errors: dict[Sequence, str] = {}
    for answer in answers:
        for i, token, found in answer["tokens"]:
            logprob = None if found is None else TokenLogprob(token, found[0], tuple((t, v) for t, v in found[1]))
            sampled[i] = token, logprob
        errors.update({plan.scheduled[i].seq: text for i, text in answer["errors"]})
    wanted = [i for i, item in enumerate(plan.scheduled) if item.needs_sample]
    missing = [i for i in wanted if i not in sampled]
    assert not missing, f"no rank sampled items {missing}"
    return StepResult(tuple(sampled[i][0] for i in wanted), tuple(sampled[i][1] for i in wanted), errors)
