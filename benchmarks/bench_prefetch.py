"""Prefetching under its audit beside no prefetching: the same decoding, sides in turn, in one process.

    python benchmarks/make_checkpoint.py qwen3-moe-500m /tmp/q500
    python benchmarks/bench_prefetch.py /tmp/q500 --cache-frac 0.25 --rounds 8

Each side is an engine of its own with a cache of the same size; every round each decodes a few steps, in changing
order. The side `wrong` expects experts that this layer did not choose. `speed` is off's time over a side's, in all
steps; `quiet` the same of steps that nothing else on the machine disturbed: the lower quartile of steps with
prefetching and of those without, each as often as the audit allowed it. Tokens must be equal. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import fix_environment, hardware, median, versions

from predictors.shape import MoELayer


def main() -> None:
    args = parse()
    fix_environment(args.threads)
    sides = {name: Side(name, args) for name in dict.fromkeys(["off", *args.sides])}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0)
    for _ in range(args.rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(sides[name].decode(args.steps))
    report = {name: side.report(seconds[name], seconds["off"], sides["off"].quiet_s) for name, side in sides.items()}
    assert all(side.tokens == sides["off"].tokens for side in sides.values()), "tokens differ"
    print("\n| side | over off: all, median round, quiet | layers on | last probe | recall | useful | wasted MB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in report.items():
        speeds = ", ".join(f"{row[key]:.3f}" for key in ("speed", "median_speed", "quiet_speed"))
        print(
            f"| {name} | {speeds} | {row['layers_on']} of {row['layers']} | {row['last_ratio']} | {row['recall']:.2f}"
            f" | {row['useful']} | {row['wasted_mb']:.1f} |"
        )
    print(json.dumps({"sides": report, "hardware": hardware(), "versions": versions(), "args": str(args)}))


def cache_mib(model: str, cache_frac: float) -> int:
    from moe_serve.hf.checkpoint import open_all_experts

    store = open_all_experts(model)
    return -(-int(store.num_total * cache_frac) * store.slot_bytes // (1 << 20))


class AlwaysWrong:
    """Expects in the next layer, as many as this one used, experts that this layer's router did not choose."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_layers, self._num_experts = num_layers, num_experts

    def advise(self, layer: int, experts: Sequence[int], hidden: Any) -> list[Any]:
        from expert_cache.prefetch.advisors import Advice

        if layer + 1 == self._num_layers:
            return []
        others = tuple(e for e in range(self._num_experts) if e not in experts)[: len(experts)]
        return [Advice(MoELayer(layer + 1), others, (1.0,) * len(others))]


class Side:
    """One engine, decoding a batch of sequences that does not end."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        from moe_serve import LLM
        from moe_serve.cli.flags import default_model

        kind = name.removesuffix("-unaudited")
        length = args.steps * args.rounds + 64
        model = args.model or default_model()
        self.llm = LLM(
            model,
            num_threads=args.threads,
            max_model_len=length,
            max_num_seqs=args.batch,
            moe_cache_mib=cache_mib(model, args.cache_frac),
            moe_prefetch="next-gate" if kind == "wrong" else kind,
            moe_prefetch_audit=not name.endswith("-unaudited"),
            **json.loads(args.settings),
        )
        from expert_cache.host_managed.experts import HostManagedExperts

        experts = self.llm.engine.runner.experts
        assert isinstance(experts, HostManagedExperts)
        self.experts = experts
        cache = self.experts.cache
        if kind == "wrong":
            self.experts.advisor = AlwaysWrong(len(cache.store.layers), cache.store.num_experts)
        self.tokens: list[int] = []
        self.steps_s: list[tuple[float, bool]] = []
        """(time, prefetching)."""
        self._start(args.batch, length)

    def _start(self, batch: int, length: int) -> None:
        from moe_serve import SamplingParams
        from moe_serve.scheduling.sequence import Request

        params = SamplingParams(temperature=0, max_tokens=length - 17, ignore_eos=True)
        for i in range(batch):
            prompt = tuple(3 + (37 * i + 11 * j) % 4000 for j in range(16))
            self.llm.engine.add_request(Request(f"r{i}", prompt, params))
        for _ in range(4):
            self.llm.engine.step()

    def decode(self, steps: int) -> float:
        """Seconds of that number of steps."""
        first = len(self.steps_s)
        for _ in range(steps):
            on = self.experts.audit is not None and self.experts.audit.is_prefetching
            start = time.perf_counter()
            self.tokens += [t for output in self.llm.engine.step() for t in output.token_ids]
            self.steps_s.append((time.perf_counter() - start, on))
        self.experts.cache.cancel_prefetches()  # or they would go on while another side is timed
        return sum(seconds for seconds, _ in self.steps_s[first:])

    @property
    def quiet_s(self) -> float:
        """A step that nothing disturbed, on average over those with and without prefetching."""
        kinds = [[t for t, on in self.steps_s if on == wanted] for wanted in (False, True)]
        return sum(len(times) * quantiles(times, n=4)[0] for times in kinds if len(times) > 1) / len(self.steps_s)

    def report(self, own: list[float], off: list[float], quiet_off_s: float) -> dict[str, Any]:
        counters, audit = self.experts.counters, self.experts.audit
        predictions = self.experts.usage.predictions()
        right, missed = (int(predictions[name].sum()) for name in ("predicted_used", "unpredicted"))
        return {
            "speed": sum(off) / sum(own),
            "quiet_speed": quiet_off_s / self.quiet_s,
            "median_speed": median([o / s for o, s in zip(off, own, strict=True)]),
            "tokens_per_s": len(self.tokens) / sum(own),
            "layers_on": int(counters.prefetch_on.sum()) if audit or self.experts.advisor else 0,
            "layers": len(counters.hits),
            "last_ratio": None if audit is None or audit.last_ratio is None else round(audit.last_ratio, 3),
            "recall": right / max(1, right + missed),
            "useful": int(counters.prefetch_hits.sum() + counters.late_prefetches.sum()),
            "wasted_mb": float(counters.wasted_bytes.sum() / 1e6),
            "steps_with": sum(on for _, on in self.steps_s),
            "hit_frac": counters.num_hits / (counters.num_hits + counters.num_misses),
            "rounds_s": own,
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="FOLDER", help="default: the demo model")
    parser.add_argument("--sides", nargs="+", default=["next-gate", "affinity", "wrong"], metavar="NAME")
    parser.add_argument("--cache-frac", type=float, default=0.25, help="of the experts that fit the cache")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=12, help="of one side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", default="{}", help="more EngineConfig fields, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
