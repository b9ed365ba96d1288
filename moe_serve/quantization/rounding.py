"""Rounding a matrix to signed integers with scales: to the nearest, or to what matters for given inputs.

Knows no checkpoints and no models.

Shape alphabet: N rows (outputs), K columns (inputs), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_CANDIDATES = 20
LEAST_SCALE_FRAC = 0.5
"""Of the scale that just covers the largest weight; below it too much is clamped."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes [N, K] int8, scales [N, G] bfloat16: weights are codes * scales."""

    codes: torch.Tensor
    scales: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """[N, K] float32."""
        parts = self.codes.float().view(*self.scales.shape, -1) * self.scales.float()[:, :, None]
        return parts.view_as(self.codes)


def round_matrix(weight: torch.Tensor, bits: int, group: int, importance: torch.Tensor | None = None) -> Rounded:
    """Round [N, K] to `bits` bits with a scale for every `group` columns (0: one per row).

    `importance` [K], the mean square of each input on calibration text: scales are searched for the least
    error of the outputs, as far as inputs are independent of one another; None: each scale covers its largest
    weight. (Weighting by activations: AWQ, Lin et al. 2024; as an error measure also llama.cpp's importance
    matrices.) K must be a multiple of `group`.
    """
    group = group or weight.shape[1]
    parts = weight.float().view(weight.shape[0], -1, group)
    top = 2 ** (bits - 1) - 1
    covering = (parts.abs().amax(2) / (top + 0.5)).clamp(min=torch.finfo(torch.bfloat16).tiny)
    best = _at(parts, covering, top)
    if importance is not None:
        best = _search(parts, covering, top, importance.float().view(-1, group), best)
    return Rounded(best[0].to(torch.int8).view_as(weight), best[1])


def _at(parts: torch.Tensor, scales: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, of [N, G, columns] parts and wanted scales [N, G] as they will be stored."""
    stored = scales.to(torch.bfloat16)
    return (parts / stored.float()[:, :, None]).round().clamp(-top - 1, top), stored


def _search(
    parts: torch.Tensor,
    covering: torch.Tensor,
    top: int,
    importance: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = start
    least = _error(parts, codes, scales, importance)
    for i in range(NUM_CANDIDATES):
        frac = LEAST_SCALE_FRAC + (1.15 - LEAST_SCALE_FRAC) * i / (NUM_CANDIDATES - 1)
        rough, _ = _at(parts, covering * frac, top)
        candidate, stored = _at(parts, _fitted(parts, rough, importance, covering * frac), top)
        error = _error(parts, candidate, stored, importance)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better[:, :, None], candidate, codes)
        scales = torch.where(better, stored, scales)
    return codes, scales


def _fitted(
    parts: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor, otherwise: torch.Tensor
) -> torch.Tensor:
    """The scales [N, G] of least weighted error for given codes."""
    weight = (importance * codes.square()).sum(2)
    return torch.where(weight > 0, (importance * codes * parts).sum(2) / weight, otherwise)


def _error(parts: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """[N, G]."""
    return (importance * (codes * scales.float()[:, :, None] - parts).square()).sum(2)
