"""Quantize weights to integers: outlier channels first, a range per output row and group, rounding to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import QARVDConfig
from .factors import search_factors
from .grid import WeightGrid
from .outliers import OutlierSet
from .ranges import search_rows

# Weights that are processed together: float32 copies of a whole layer would be larger than a block of the model.
SLAB = 1 << 24


def quantize_weight(
    weight: Tensor, outliers: OutlierSet, config: QARVDConfig, name: str = "", group: int = 0
) -> tuple[Tensor, WeightGrid]:
    """Quantize a weight by range search and rounding to nearest; no data needed.

    Args:
        weight: float `[N, K]`, finite.
        outliers: its outlier channels.
        config: scheme, bits of the layer, percentiles, and whether zero-points are clamped.
        name: of the layer.
        group: see `QuantizedModule.group`.

    Returns:
        Codes uint8 `[N, K]`, columns in permuted order, and the grid they are on.
    """
    slabs = weight.detach().split(max(1, SLAB // weight.shape[1]))
    codes, grids = zip(*(_quantize_rows(slab, outliers, config, name, group) for slab in slabs), strict=True)
    scale, zero_point = (torch.cat([getattr(g, field) for g in grids]) for field in ("scale", "stored_zero_point"))
    return torch.cat(codes), WeightGrid.stored(scale, zero_point, outliers.num_outliers, grids[0].bits)


def _quantize_rows(
    weight: Tensor, outliers: OutlierSet, config: QARVDConfig, name: str, group: int
) -> tuple[Tensor, WeightGrid]:
    """Quantize some rows of a weight; see `quantize_weight`."""
    scheme = config.scheme_of(name)
    permuted = outliers.arrange_weight(weight)
    if group:
        grid = search_factors(permuted, outliers.num_outliers, group)
        return grid.quantize(permuted).to(torch.uint8), grid
    qparams = [
        search_rows(
            part,
            scheme.weight_bits,
            config.percentiles,
            symmetric=scheme.symmetric_weights,
            clamp=config.recipe.clamp_zero_points,
        )
        for part in permuted.tensor_split([outliers.num_outliers], dim=1)
    ]
    scale, zero_point = (torch.cat(values, dim=1) for values in zip(*qparams, strict=True))
    grid = WeightGrid(scale, zero_point, outliers.num_outliers, scheme.weight_bits)
    return grid.quantize(permuted).to(torch.uint8), grid
