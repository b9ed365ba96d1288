"""Interval: what happened to the engine and its experts between two moments, worked out from totals.

Pure arithmetic on what LastMinute has noted. Knows no clock, no HTTP and no metrics library.

Shape alphabet: L layers by dense index, E experts per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_cache.report import ExpertReport

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all steps so far."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_s: float = 0.0
    """Time of the steps that held no part of a prompt."""
    decode_tokens: int = 0
    """Tokens sampled in those."""
    decode_experts: float = 0.0
    """Uses in those whose expert was not resident beforehand: misses, and hits owed to a prefetch."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The totals at some time."""

    time_s: float
    totals: Totals
    experts: ExpertReport | None


@dataclass(frozen=True)
class Interval:
    """From `start` to `end`. Rates are None where nothing happened that could be divided by."""

    start: Moment
    end: Moment

    @property
    def seconds(self) -> float:
        return self.end.time_s - self.start.time_s

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens computed."""
        return self._per_second("prompt_tokens")

    @property
    def generated_tokens_per_s(self) -> float:
        """Tokens sampled."""
        return self._per_second("generated_tokens")

    def _per_second(self, name: str) -> float:
        return self._gained(name) / self.seconds if self.seconds > 0 else 0.0

    def _gained(self, name: str) -> float:
        return float(getattr(self.end.totals, name) - getattr(self.start.totals, name))

    # ---- experts: only where there are reports -----------------------------------------------------

    @cached_property
    def _reports(self) -> tuple[ExpertReport, ExpertReport]:
        assert self.start.experts is not None
        assert self.end.experts is not None
        return self.start.experts, self.end.experts

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """[L, E] (token, choice) pairs that each expert computed."""
        start, end = self._reports
        return end.tokens - start.tokens

    def count(self, name: str) -> Any:
        """[L] what was added to one of ExpertReport.counts."""
        start, end = self._reports
        return end.counts[name] - start.counts[name]

    @property
    def hit_frac(self) -> float | None:
        """Of all uses, those whose expert was there when the router asked."""
        hits, misses = float(self.count("hits").sum()), float(self.count("misses").sum())
        return hits / (hits + misses) if hits + misses else None

    @property
    def hit_fracs(self) -> Floats:
        """[L] `hit_frac` by layer; NaN where a layer was not used."""
        hits = self.count("hits")
        return ratio(hits, hits + self.count("misses"))

    @property
    def recalls(self) -> Floats:
        """[L] of the experts used where there was advice, those that it named; NaN without advice."""
        right = self.count("predicted_used")
        return ratio(right, right + self.count("unpredicted"))

    @property
    def precisions(self) -> Floats:
        """[L] of the experts that were advised, those then used; NaN without advice."""
        right = self.count("predicted_used")
        return ratio(right, right + self.count("predicted_unused"))

    @property
    def balancedness(self) -> Floats:
        """[L] mean over maximum of the experts' tokens, as vLLM and SGLang define it; 1 is even, NaN without tokens."""
        return ratio(self.tokens.mean(axis=1), self.tokens.max(axis=1))

    @property
    def stall_frac(self) -> float:
        """Of the time, the part that the model waited for experts."""
        return float(self.count("stall_s").sum()) / self.seconds if self.seconds > 0 else 0.0

    @property
    def link_bytes_per_s(self) -> float | None:
        """What the link to the slower tier carried while it was busy."""
        start, end = (report.residency for report in self._reports)
        busy_s = end.link_busy_s - start.link_busy_s
        return (end.link_bytes - start.link_bytes) / busy_s if busy_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens over the time of the steps that only decoded: not those of the window, which may be idle."""
        seconds = self._gained("decode_s")
        return self._gained("decode_tokens") / seconds if seconds else None

    @property
    def link_limit_tokens_per_s(self) -> float | None:
        """What decoding could reach if it did nothing but move, at the link's rate, the experts that were not resident.

        None without reads: then the link is no limit.
        """
        needed_bytes = self._gained("decode_experts") * self._reports[1].expert_bytes
        rate = self.link_bytes_per_s
        return self._gained("decode_tokens") * rate / needed_bytes if needed_bytes and rate else None

    @property
    def link_limit_frac(self) -> float | None:
        """How much of that limit decoding reached. Small: it is computing, not reading, that takes the time."""
        limit, reached = self.link_limit_tokens_per_s, self.decode_tokens_per_s
        return reached / limit if limit and reached is not None else None


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """part / whole, NaN where whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
