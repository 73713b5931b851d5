"""Quantize and dequantize by `value = (code - zero_point) * scale`, code in `[0, 2**bits - 1]`; pure functions.

All functions take and return float32, and are finite for finite input. Callers raise the errors about NaN or infinity,
since they know the name of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Zero-points are stored in 16 bits; a range so far from zero that its zero-point does not fit is treated as
# degenerate.
MAX_ZERO_POINT = 2**15 - 1
TINY = torch.finfo(torch.float32).tiny
# Percentiles sort a copy of their rows: blocks of this many elements bound its memory.
SORT_BLOCK = 2**22


def affine_qparams(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False, clamp: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute scale and zero-point of the range `[low, high]`.

    Args:
        low, high: float32, any equal shapes, low <= high.
        bits: bits of a code.
        symmetric: zero-point fixed at `2**(bits-1)`, range `[-m, m]` with m the larger magnitude.
        clamp: extend the range to include zero, which keeps the zero-point a code. False leaves the zero-point free,
            as the reference implementation does, except where the range is empty or too far from zero to be stored.

    Returns:
        float32 scale (positive; 1 for the range [0, 0]) and float32 zero-point (an integer), shaped like low.
    """
    if symmetric:
        half = 2 ** (bits - 1)
        scale = torch.maximum(low.abs(), high.abs()) / (half - 1)
        return torch.where(scale < TINY, torch.ones_like(scale), scale), torch.full_like(scale, half)
    levels = 2**bits - 1
    scale, zero_point = _asymmetric(low.clamp(max=0), high.clamp(min=0), levels)
    if clamp:
        return scale, zero_point.clamp(0, levels)
    free_scale, free_zero_point = _asymmetric(low, high, levels)
    usable = (high > low) & (free_zero_point.abs() <= MAX_ZERO_POINT)
    return torch.where(usable, free_scale, scale), torch.where(usable, free_zero_point, zero_point)


def _asymmetric(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    scale = (high - low) / levels
    scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Compute the codes of x, as floats: `clamp(round(x / scale) + zero_point, 0, 2**bits - 1)`, ties to even."""
    return torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Compute `(codes - zero_point) * scale`."""
    return (codes - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round x to the grid: `dequantize(quantize(x))`."""
    return dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)


def row_quantiles(x: Tensor, q: float) -> Tensor:
    """Compute a quantile of every row, linear between columns: sorted float32 `[rows, columns]` -> `[rows, 1]`.

    The rank is computed in float64 from q rounded to float32, as torch >= 2.15 does and older versions do not: the
    same weights give the same ranges under every torch.
    """
    rank = torch.tensor(q, dtype=torch.float32).item() * (x.shape[1] - 1)
    below = min(int(rank), x.shape[1] - 1)
    low, high = (x[:, i, None].to(torch.float64) for i in (below, min(below + 1, x.shape[1] - 1)))
    return (low + (high - low) * (rank - below)).to(x.dtype)


def percentile_ranges(x: Tensor, percentiles: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    """Compute for every percentile p the range `[quantile(row, 1 - p), quantile(row, p)]` of every row.

    Args:
        x: float32 `[rows, columns]`, at least one column.
        percentiles: numbers in (0.5, 1].

    Returns:
        One `(low, high)` pair per percentile, each `[rows, 1]`.
    """
    points = [q for p in percentiles for q in (1 - p, p)]
    quantiles = []
    for rows in x.split(max(1, SORT_BLOCK // x.shape[1])):
        ordered = rows.sort(dim=1).values
        quantiles.append(torch.cat([row_quantiles(ordered, q) for q in points], dim=1))
    columns = torch.cat(quantiles).split(1, dim=1)
    return list(zip(columns[0::2], columns[1::2], strict=True))


def mean_squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error per row: `[rows, columns]` twice -> `[rows, 1]`."""
    return (x - y).square().mean(dim=1, keepdim=True)
