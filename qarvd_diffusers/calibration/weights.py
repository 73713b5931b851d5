"""Weights to integers: outlier channels first, a range per output row and group, rounding to nearest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import primitives as P
from ..config import QARVDConfig
from ..packing import pack
from .outliers import OutlierSet
from .ranges import search_rows


class PackedWeight(NamedTuple):
    """`weight_packed`, `weight_scale` and `weight_zero_point` of `linear.LinearQParams`."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor


def quantize_weight(weight: Tensor, outliers: OutlierSet, config: QARVDConfig) -> PackedWeight:
    """Quantize a weight by range search and rounding to nearest; no data needed.

    Args:
        weight: float `[N, K]`, finite.
        outliers: its outlier channels.
        config: scheme, percentiles and `reference_compat` (zero-points free instead of clamped).

    Returns:
        The packed codes in permuted channel order, scales and zero-points.
    """
    scheme = config.resolved_scheme
    permuted = weight.detach().to(torch.float32)[:, outliers.channel_order.long()]
    codes, scales, zero_points = [], [], []
    for group in permuted.tensor_split([outliers.num_outliers], dim=1):
        scale, zero_point = search_rows(
            group,
            scheme.weight_bits,
            config.percentiles,
            symmetric=scheme.symmetric_weights,
            clamp=not config.reference_compat,
        )
        codes.append(P.quantize(group, scale, zero_point, scheme.weight_bits).to(torch.uint8))
        scales.append(scale)
        zero_points.append(zero_point)
    return PackedWeight(
        pack(torch.cat(codes, dim=1), scheme.weight_bits),
        torch.cat(scales, dim=1),
        torch.cat(zero_points, dim=1).to(torch.int16),
    )
