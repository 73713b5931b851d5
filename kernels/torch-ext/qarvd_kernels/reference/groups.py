"""Split permuted channels into the two groups of a dual-scale layer."""

from __future__ import annotations

import torch
from torch import Tensor

# 8-bit codes are unsigned, integer matrix products take signed bytes: the difference between the two.
CODE_OFFSET = 128
DYNAMIC_LEVELS = 127


def group_slices(in_features: int, num_outliers: int) -> tuple[slice, slice]:
    """Return the slices of both groups on a permuted channel axis."""
    return slice(0, num_outliers), slice(num_outliers, in_features)


def spread(values: Tensor, in_features: int, num_outliers: int) -> Tensor:
    """Expand `[..., 2]` values per group to `[..., in_features]` values per permuted channel."""
    outlier, normal = values[..., :1], values[..., 1:]
    shape = values.shape[:-1]
    return torch.cat([outlier.expand(*shape, num_outliers), normal.expand(*shape, in_features - num_outliers)], dim=-1)
