"""Quantize activations; compute the row sums that asymmetric weights need."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..declare import operator
from .arguments import InputQuantizer, RowQuantizer


@operator()
def quantize_static(x: Tensor, quantizer: InputQuantizer) -> Tensor:
    """Quantize an activation with calibrated scales.

    Args:
        x: float `[..., K]`.
        quantizer: the fields of `InputQuantizer`.

    Returns:
        int8 `[..., K]`, permuted: `clamp(round(x / scale) + zero_point, 0, 255) - 128`, ties to even. A compiled
        implementation multiplies by the reciprocal of the scale, which moves a code by one where x lies on a boundary.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    quantizer.check(x)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@operator()
def quantize_dynamic(x: Tensor, channel_order: Tensor, num_outliers: int) -> tuple[Tensor, Tensor]:
    """Quantize an activation symmetrically, with one scale per token and group computed from its values.

    Args:
        x: float `[..., K]`.
        channel_order: int32 `[K]`, as in `InputQuantizer`.
        num_outliers: size of group 0.

    Returns:
        int8 `[..., K]`, permuted, in -127..127; float32 `[..., 2]` scales (1 where a group is empty or all zero).

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.activation(x, channel_order, num_outliers)
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty((*x.shape[:-1], 2), dtype=torch.float32, device=x.device),
    )


@operator()
def quantize_rows(x: Tensor, quantizer: RowQuantizer) -> tuple[Tensor, Tensor]:
    """Scale channels, rotate blocks of them, then quantize every row symmetrically with one scale of its own.

    Args:
        x: float `[..., K]`, channels in their own order.
        quantizer: the fields of `RowQuantizer`.

    Returns:
        int8 `[..., K]` in -127..127; float32 `[...]` scales, largest magnitude / 127 (1 for a row of zeros).

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    quantizer.check(x)
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


@operator()
def row_sums(a: Tensor, num_outliers: int) -> Tensor:
    """Sum the two channel groups of every row; only asymmetric 8-bit weights need this.

    Args:
        a: int8 `[M, K]`, permuted.
        num_outliers: size of group 0.

    Returns:
        int32 `[M, 2]`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.matrix("a", a, torch.int8)
    checks.outlier_count(num_outliers, a.shape[1])
    return torch.empty((a.shape[0], 2), dtype=torch.int32, device=a.device)
