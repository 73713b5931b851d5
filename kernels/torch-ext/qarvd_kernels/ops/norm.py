"""Normalize, modulate and add gated residuals, and quantize the result for the next layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..declare import operator
from .arguments import InputQuantizer, Norm, RowQuantizer


@operator()
def norm_quantize(x: Tensor, norm: Norm, quantizer: InputQuantizer) -> Tensor:
    """Apply LayerNorm over C in float32, times `1 + scale[g]`, plus `shift[g]`, then `quantize_static`.

    Args:
        x: float `[M, C]`.
        norm: the fields of `Norm`.
        quantizer: the fields of the next layer's `InputQuantizer`.

    Returns:
        int8 `[M, C]` in stored order.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.normalization(x, *norm[:4])
    quantizer.check(x)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@operator()
def add_norm_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, quantizer: InputQuantizer
) -> tuple[Tensor, Tensor]:
    """Compute the gated residual sum `x + gate[g] * y`, and `norm_quantize` of that sum in float32.

    Args:
        x: float `[M, C]`, the residual stream.
        y: float `[M, C]`, what is added.
        gate: float32 `[G, C]`, or None for a plain sum.
        norm: as in `norm_quantize`.
        quantizer: as in `norm_quantize`.

    Returns:
        The sum `[M, C]` in the dtype of x; int8 `[M, C]` in stored order.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.residual(x, y, gate)
    checks.normalization(x, *norm[:4])
    quantizer.check(x)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
    )


@operator(mutates=["x"])
def add_norm_quantize_(x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, quantizer: InputQuantizer) -> Tensor:
    """Replace x by the gated residual sum of `add_norm_quantize`, and return the codes of its norm.

    Args:
        x: float `[M, C]`, overwritten. Compiled implementations need it contiguous.
        y: as in `add_norm_quantize`; so are the other arguments.

    Returns:
        int8 `[M, C]` in stored order.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.residual(x, y, gate)
    checks.normalization(x, *norm[:4])
    quantizer.check(x)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@operator()
def norm_quantize_rows(x: Tensor, norm: Norm, quantizer: RowQuantizer) -> tuple[Tensor, Tensor]:
    """Apply the LayerNorm and modulation of `norm_quantize`, then `quantize_rows`.

    Args:
        x: float `[M, C]`.
        norm: the fields of `Norm`.
        quantizer: as in `quantize_rows`.

    Returns:
        int8 `[M, C]`; float32 `[M]` scales.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.normalization(x, *norm[:4])
    quantizer.check(x)
    return _rows_of(x)


@operator(mutates=["x"])
def add_norm_quantize_rows_(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, quantizer: RowQuantizer
) -> tuple[Tensor, Tensor]:
    """Replace x by the gated residual sum of `add_norm_quantize`, and return `norm_quantize_rows` of that sum.

    Args:
        x: float `[M, C]`, overwritten. Compiled implementations need it contiguous.
        y: as in `add_norm_quantize`; so are `gate` and `norm`.
        quantizer: as in `quantize_rows`.

    Returns:
        int8 `[M, C]`; float32 `[M]` scales.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.residual(x, y, gate)
    checks.normalization(x, *norm[:4])
    quantizer.check(x)
    return _rows_of(x)


def _rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty codes and scales of the rows of x."""
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:1], dtype=torch.float32, device=x.device),
    )


@operator()
def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Compute `x + gate[g] * y` in float32; arguments as in `add_norm_quantize`.

    Returns:
        `[M, C]` in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.residual(x, y, gate)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator(mutates=["x"])
def add_gated_(x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    """Replace x by `add_gated`; arguments as in `add_norm_quantize_`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    checks.residual(x, y, gate)
