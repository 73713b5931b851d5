"""Choose integer factors and zero-points of 4-bit weights in groups of neighbouring columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import LARGEST_FACTOR, WeightGrid

BITS = 4
LARGEST_STEPS = 127
SHRINKS = (1.0, 0.9, 0.8)  # of the range of a group: what is cut off costs less, in some, than a coarser step


def search_factors(weight: Tensor, num_outliers: int, group: int) -> WeightGrid:
    """Choose the grid of a weight whose columns have a range per group (QServe, arXiv 2405.04532).

    The scale of a row is the smallest with which every group fits the factors and int8. Of every group, the factor and
    zero-point with the smallest squared error are chosen among those of its range and of a few narrower ones.

    Args:
        weight: float32 `[N, K]`, in the form that is quantized; `group` divides K.
        num_outliers: columns that have a scale of their own.
        group: columns of a group.
    """
    groups = weight.unflatten(1, (-1, group))  # [N, G, group]
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    levels = 2**BITS - 1
    step = (high - low) / levels
    needed = torch.maximum(step / LARGEST_FACTOR, torch.maximum(high, -low) / LARGEST_STEPS)
    # A group that lies across the border between outliers and others counts in both.
    parts = needed[:, : -(-num_outliers // group)], needed[:, num_outliers // group :]
    scale = torch.stack([part.amax(1) if part.shape[1] else part.new_ones(len(part)) for part in parts], dim=1)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    own = WeightGrid(scale, scale, num_outliers, BITS).spread(scale, weight.shape[1]).unflatten(1, (-1, group)).amax(2)
    for shrink in SHRINKS:
        for rounded in (torch.floor, torch.ceil):
            factor = rounded(shrink * step / own).clamp(1, LARGEST_FACTOR)
            zero_point = torch.round(-shrink * low / (factor * own)).clamp(0, levels)
            grid = WeightGrid(scale, zero_point, num_outliers, BITS, factor)
            error = (grid.dequantize(grid.quantize(weight)) - weight).square().unflatten(1, (-1, group)).sum(2)
            if best is None:
                best = error, factor, zero_point
            else:
                better = error < best[0]
                chosen = zip((error, factor, zero_point), best, strict=True)
                best = tuple(torch.where(better, new, old) for new, old in chosen)
    assert best is not None
    return WeightGrid(scale, best[2], num_outliers, BITS, best[1])
