"""LayerNorm, modulation and gated residual that end in int8 codes, on Hopper GPUs; what they compute: `ops.norm`."""

from __future__ import annotations

from torch import Tensor

from .rows import launch, refuses  # noqa: F401  (`refuses` is looked up here)


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
    """16-bit `[M, C]` -> int8 `[M, C]`, permuted."""
    quantizer = (channel_order, num_outliers, input_scale, input_zero_point)
    return launch(x, None, None, (weight, norm_bias, scale, shift), eps, quantizer)[1]


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
    quantizer = (channel_order, num_outliers, input_scale, input_zero_point)
    return launch(x, y, gate, (weight, norm_bias, scale, shift), eps, quantizer)
