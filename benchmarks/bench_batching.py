"""Expert-aware batching on recorded routes: the real scheduler, with a trace in the place of the model.

    python benchmarks/bench_batching.py TRACE.npz ...

Every sequence of the trace becomes a request: its first tokens the prompt, the others what it generates. 64 of them
run at a time and 8 decode in a step. Sides: first come, first served; turns (the longest waiting, no forecast);
and expert-aware, for several bounds on waiting. For each: distinct experts per layer and step, misses of a cache
of a quarter of the experts, and what it does to waiting. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.shadow import ShadowCache
from moe_serve.expert_routes.usage_forecast import UsageForecast
from moe_serve.scheduling.batch_choice import BatchChoice, ExpertAware, FirstComeFirstServed
from moe_serve.scheduling.batch_plan import BatchPlan, StepResult, StepRoutes
from moe_serve.scheduling.kv_pages import PagePool
from moe_serve.scheduling.scheduler import Scheduler
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence
from moe_serve.scheduling.step_draft import SchedulerLimits
from predictors.predictor import RouterShape
from predictors.trace import RoutingTrace, load, merge


@dataclass(frozen=True)
class Row:
    """One side. Waits are in steps."""

    side: str
    distinct: float
    """Experts per layer and step, of the steps in which all places were taken."""
    misses_per_token: float
    """Of a cache, summed over the layers."""
    wait_p50: float
    """Steps between two tokens of a sequence in which others decoded."""
    wait_p95: float
    wait_max: float
    finish_mean: float
    """Step in which a sequence ends."""
    extra_finish_p95: float
    """How much later than with first come, first served."""
    choice_ms: float
    """Time to choose, per step."""


class Replay:
    """A scheduler over the sequences of a trace."""

    def __init__(self, trace: RoutingTrace, args: argparse.Namespace) -> None:
        self.trace, self.args = trace, args
        self.rows: dict[Sequence, slice] = {}
        order = np.random.default_rng(args.seed).permutation(trace.num_sequences)
        slices = list(trace.sequence_slices())
        for number in order.tolist():
            length = min(slices[number].stop - slices[number].start, args.prompt + args.generate)
            if length > args.prompt:
                rows = slice(slices[number].start, slices[number].start + length)
                prompt = tuple(range(args.prompt))
                request = Request(f"{number}", prompt, SamplingParams(max_tokens=length - args.prompt))
                self.rows[Sequence(request, 0, list(prompt), length)] = rows

    def run(self, side: str, choice: BatchChoice, forecast: UsageForecast) -> tuple[Row, dict[str, int]]:
        """One pass over all sequences; also the step in which each ended, by request."""
        limits = SchedulerLimits(
            self.args.running, 1 << 20, enable_prefix_caching=False, max_num_batched_seqs=self.args.width
        )
        scheduler = Scheduler(limits, PagePool(4096, 64))
        scheduler.choice = timed = Timed(choice)
        fresh = {Sequence(s.request, 0, list(s.token_ids), s.max_total_tokens): r for s, r in self.rows.items()}
        for seq in fresh:
            scheduler.add(seq)
        account, step = Account(self.trace, self.args.cache_frac), 0
        while scheduler.has_work():
            plan = scheduler.schedule()
            result = self._result(plan, fresh)
            scheduler.update(plan, result)
            forecast.on_routes(plan, result)
            account.add(step, plan, result)
            step += 1
        return account.row(side, self.args.width, 1000 * timed.seconds / step), account.ended

    def _result(self, plan: BatchPlan, fresh: dict[Sequence, slice]) -> StepResult:
        ids, rows, first = [], [], 0
        for item in plan.scheduled:
            start = fresh[item.seq].start
            ids.append(self.trace.ids[start + item.start : start + item.end])
            rows.append(slice(first, first + item.count))
            first += item.count
        sampled = sum(item.needs_sample for item in plan.scheduled)
        routes = StepRoutes(np.concatenate(ids), None, tuple(rows))
        return StepResult((7,) * sampled, (None,) * sampled, routes=routes)


class Account:
    """What the decoded tokens of all steps needed, and how long they waited."""

    def __init__(self, trace: RoutingTrace, cache_frac: float) -> None:
        shape = trace.num_layers, trace.num_experts
        self.ended: dict[str, int] = {}
        self._cache = ShadowCache(find_policy("affinity")(*shape), Capacity.of_frac(cache_frac, *shape), *shape, True)
        self._widths: list[int] = []
        self._distinct: list[float] = []
        self._waits: list[int] = []
        self._last: dict[Sequence, int] = {}

    def add(self, step: int, plan: BatchPlan, result: StepResult) -> None:
        assert result.routes is not None
        decoded = [i for i, item in enumerate(plan.scheduled) if item.count == 1]
        self._waits += [step - self._last.get(plan.scheduled[i].seq, step - 1) - 1 for i in decoded]
        for item in plan.scheduled:
            self._last[item.seq] = step
            if item.seq.is_finished:
                self.ended[item.seq.request.request_id] = step
        if not decoded:
            return
        ids = result.routes.ids[[result.routes.rows[i].start for i in decoded]]
        used = [np.unique(ids[:, layer], return_counts=True) for layer in range(ids.shape[1])]
        for layer, (experts, counts) in enumerate(used):
            self._cache.event(layer, experts.astype(np.int64), counts)
        self._widths.append(len(decoded))
        self._distinct.append(float(np.mean([len(experts) for experts, _ in used])))

    def row(self, side: str, width: int, choice_ms: float) -> Row:
        p50, p95, most = (float(np.percentile(self._waits, q)) for q in (50, 95, 100))
        return Row(
            side=side,
            distinct=float(np.mean([d for d, w in zip(self._distinct, self._widths, strict=True) if w == width])),
            misses_per_token=sum(self._cache.misses) / sum(self._widths),
            wait_p50=p50,
            wait_p95=p95,
            wait_max=most,
            finish_mean=float(np.mean(list(self.ended.values()))),
            extra_finish_p95=0.0,
            choice_ms=choice_ms,
        )


class Timed:
    """A BatchChoice and the time it takes."""

    def __init__(self, choice: BatchChoice) -> None:
        self._choice = choice
        self.seconds = 0.0

    def choose(self, decoding: list[Sequence], width: int) -> list[Sequence]:
        start = time.perf_counter()
        chosen = self._choice.choose(decoding, width)
        self.seconds += time.perf_counter() - start
        return chosen


def main() -> None:
    args = parse()
    trace = merge([load(path) for path in args.traces])
    replay = Replay(trace, args)
    shape = RouterShape(tuple(trace.layer_ids.tolist()), trace.num_experts, trace.top_k)
    print(
        f"{len(replay.rows)} sequences, {trace.num_layers} layers of {trace.num_experts} experts, top {trace.top_k};"
        f" {args.width} of {args.running} decode in a step\n"
    )
    print("| side | distinct per layer and step | misses per token | wait p50 / p95 / max | mean end | later end p95 |")
    print("|---|---|---|---|---|---|")
    rows: list[Row] = []
    base: dict[str, int] = {}
    for side in ("first come", "turns", *(f"expert-aware, at most {n}" for n in args.max_skipped)):
        forecast = UsageForecast(shape)
        row, ended = replay.run(side, choice_of(side, forecast), forecast)
        base = base or ended
        later = float(np.percentile([ended[name] - base[name] for name in base], 95))
        rows.append(Row(**(asdict(row) | {"extra_finish_p95": later})))
        print_row(rows[-1], rows[0])
    print(json.dumps({"traces": [Path(p).name for p in args.traces], "rows": [asdict(row) for row in rows]}))


def choice_of(side: str, forecast: UsageForecast) -> BatchChoice:
    if side == "first come":
        return FirstComeFirstServed()
    if side == "turns":
        return ExpertAware(forecast, 1 << 30, can_pay=lambda width: False)
    return ExpertAware(forecast, int(side.split()[-1]))


def print_row(row: Row, base: Row) -> None:
    print(
        f"| {row.side} | {row.distinct:.2f} ({row.distinct / base.distinct - 1:+.1%})"
        f" | {row.misses_per_token:.1f} ({row.misses_per_token / base.misses_per_token - 1:+.1%})"
        f" | {row.wait_p50:.0f} / {row.wait_p95:.0f} / {row.wait_max:.0f}"
        f" | {row.finish_mean:.0f} | {row.extra_finish_p95:+.0f} |",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--running", type=int, default=64, help="sequences that hold KV pages")
    parser.add_argument("--width", type=int, default=8, help="of these, N decode in a step")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a sequence that are its prompt")
    parser.add_argument("--generate", type=int, default=128, help="at most N more")
    parser.add_argument("--max-skipped", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--cache-frac", type=float, default=0.25, help="of the experts that fit the cache")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
