"""Normalization, modulation and gated residuals, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantize import quantize_static


def expand_groups(table: Tensor, rows: int) -> Tensor:
    """`[G, C]` -> `[rows, C]`; row m takes entry `m // (rows / G)`."""
    return table.repeat_interleave(rows // table.shape[0], dim=0)


def _sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """float32 `x + gate * y`."""
    y = y.to(torch.float32)
    return x.to(torch.float32) + (y if gate is None else expand_groups(gate, x.shape[0]) * y)


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    channel_order: Tensor,
    num_outliers: int,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    """Float `[M, C]` -> int8 `[M, C]`, permuted: LayerNorm, modulation, static quantization."""
    normed = F.layer_norm(x.to(torch.float32), x.shape[1:], weight, norm_bias, eps)
    if scale is not None:
        normed = normed * (1 + expand_groups(scale, x.shape[0])) + expand_groups(shift, x.shape[0])
    return quantize_static(normed, channel_order, num_outliers, input_scale, input_zero_point)


def add_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    channel_order: Tensor,
    num_outliers: int,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gated sum in the dtype of x, and int8 `[M, C]` of its norm."""
    total = _sum(x, y, gate)
    quantizer = (channel_order, num_outliers, input_scale, input_zero_point)
    return total.to(x.dtype), norm_quantize(total, weight, norm_bias, scale, shift, eps, *quantizer)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + gate * y` in the dtype of x."""
    return _sum(x, y, gate).to(x.dtype)
