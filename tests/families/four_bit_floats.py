"""Matrices as e2m1 values under shared scales: MXFP4 and NVFP4, from their specifications. Knows no file."""

from __future__ import annotations

import torch

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def mxfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[.., K] -> blocks uint8 [.., K / 32, 16], scales uint8 [.., K / 32], and the values."""
    parts = w.unflatten(-1, (-1, 32))
    exponent = (parts.abs().amax(-1) / 6).log2().ceil()
    codes = (parts / exponent.exp2()[..., None])[..., None].sub(FP4).abs().argmin(-1)
    values = FP4[codes] * exponent.exp2()[..., None]
    return (
        (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
        (exponent + 127).to(torch.uint8),
        values.flatten(-2),
    )


def nvfp4(w: torch.Tensor, divides: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] -> codes uint8 [N, K / 2], scales e4m3 [N, K / 16], the matrix's factor [], and the values.

    `divides`: scales are divided by the factor (compressed-tensors); else multiplied by it (ModelOpt).
    """
    parts = w.unflatten(1, (-1, 16))
    most = parts.abs().amax(2) / 6
    factor = 448 / most.amax() if divides else most.amax() / 448
    scale = (most * factor if divides else most / factor).clamp(min=2**-6).to(torch.float8_e4m3fn)
    wide = scale.float() / factor if divides else scale.float() * factor
    codes = (parts / wide[:, :, None])[..., None].sub(FP4).abs().argmin(-1)
    flat = codes.flatten(1)
    return (
        (flat[:, ::2] + 16 * flat[:, 1::2]).to(torch.uint8),
        scale,
        factor,
        (FP4[codes] * wide[:, :, None]).flatten(1),
    )
