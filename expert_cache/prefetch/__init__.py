"""Experts brought ahead of time: who advises, and the audit of whether it pays."""

from __future__ import annotations

from expert_cache.prefetch.advisors import Advisor
from expert_cache.prefetch.audit import PrefetchAudit

__all__ = ["Advisor", "PrefetchAudit"]
