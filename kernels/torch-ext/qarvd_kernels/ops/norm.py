"""Normalization, modulation and gated residuals that end in the next layer's int8 activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..operator import operator


@operator(
    "Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, float eps, Tensor channel_order, "
    "SymInt num_outliers, Tensor input_scale, Tensor input_zero_point",
    "Tensor",
)
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
    """LayerNorm over C in float32, times `1 + scale[g]`, plus `shift[g]`, then `quantize_static`.

    Args:
        x: float `[M, C]`.
        weight: float32 `[C]` of an affine LayerNorm, or None.
        norm_bias: float32 `[C]` likewise; given together with `weight`.
        scale: float32 `[G, C]` modulation or None; row m uses `g = m // (M / G)`, e.g. one row per latent frame.
        shift: float32 `[G, C]` likewise; given together with `scale`.
        eps: added to the variance.
        channel_order: int32 `[C]`; stored channel j is channel `channel_order[j]`.
        num_outliers: size of group 0.
        input_scale: float32 `[2]` of the layer that follows.
        input_zero_point: int32 `[2]` likewise.

    Returns:
        int8 `[M, C]` in stored order.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.normalization(x, weight, norm_bias, scale, shift)
    checks.activation(x, channel_order, num_outliers)
    checks.input_quantizer(input_scale, input_zero_point)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@operator(
    "Tensor x, Tensor y, Tensor? gate, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, float eps, "
    "Tensor channel_order, SymInt num_outliers, Tensor input_scale, Tensor input_zero_point",
    "(Tensor, Tensor)",
)
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
    """The gated residual `x + gate[g] * y` and `norm_quantize` of it, taken of the float32 sum.

    Args:
        x: float `[M, C]`, the residual stream.
        y: float `[M, C]`, what is added.
        gate: float32 `[G, C]`, or None for a plain sum.
        weight, norm_bias, scale, shift, eps, channel_order, num_outliers, input_scale, input_zero_point: as in
            `norm_quantize`.

    Returns:
        The sum `[M, C]` in the dtype of x; int8 `[M, C]` in stored order.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.residual(x, y, gate)
    checks.normalization(x, weight, norm_bias, scale, shift)
    checks.activation(x, channel_order, num_outliers)
    checks.input_quantizer(input_scale, input_zero_point)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
    )


@operator("Tensor x, Tensor y, Tensor? gate", "Tensor")
def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + gate[g] * y` computed in float32; arguments as in `add_norm_quantize`.

    Returns:
        `[M, C]` in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.residual(x, y, gate)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
