"""Weights on an eight-bit grid: each row a power of two times whole numbers from -127 to 127.

Such weights are exact in fp16, where the packed file keeps them, and a sum of them has the same float32 bits in units of the row's power
of two: so the native runtime reads bytes and computes what fp16 computes (docs/decisions/017-eight-bit-weights.md). Training sees the
rounded weights and moves those behind them, straight through (Bengio et al. 2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SMALLEST_EXPONENT = -24  # fp16 has no smaller power of two


def scales(rows: Tensor) -> Tensor:
    """rows (R,C) -> (R,1): of the finest power of two that holds a row's largest weight and the next finer one, which cuts it off, that of
    the smaller squared error."""
    mantissa, exponent = torch.frexp(rows.abs().amax(1, keepdim=True) / LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_min(SMALLEST_EXPONENT)
    whole = torch.ldexp(torch.ones_like(mantissa), exponent)
    finer = torch.ldexp(torch.ones_like(mantissa), (exponent - 1).clamp_min(SMALLEST_EXPONENT))
    errors = [(_nearest(rows, scale) - rows).square().sum(1, keepdim=True) for scale in (whole, finer)]
    return torch.where(errors[1] < errors[0], finer, whole)


def _nearest(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round_().clamp_(-LARGEST, LARGEST).mul_(scale)


class _Rounded(torch.autograd.Function):
    """Forward the nearest on the grid, backward the identity."""

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor) -> Tensor:
        return _nearest(weight, scale)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


def rounded(*parts: Tensor) -> tuple[Tensor, ...]:
    """Parts (R,·) of the same rows, on one grid a row. What is on a grid already stays as it is."""
    with torch.no_grad():
        scale = scales(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
    return tuple(_Rounded.apply(part, scale) for part in parts)
