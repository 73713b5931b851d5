"""Multiply int8 activations by dual-scale weights of prepared layers (see `prepare`); expand 4-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..declare import operator
from .arguments import Product


@operator()
def dual_scale_gemm(product: Product, out_dtype: torch.dtype) -> Tensor:
    """Compute `a @ weight.T` with outlier channels first in K; the int32 sum is rescaled once, between the groups.

        acc = sum_{k < num_outliers} a w                    int32
        acc = rint(float32(acc) * ratio[n])                 int32, ties to even
        acc = acc + sum_{k >= num_outliers} a w             int32
        y   = float32(acc) * row_scale[m] * scale[n] + bias[n] - sum_g row_sums[m, g] * row_sum_scale[g, n]

    Args:
        product: the fields of `Product`.
        out_dtype: bfloat16, float16 or float32; int32 returns `acc` itself, without the epilogue.

    Returns:
        `[M, N]` in `out_dtype`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(*product)
    checks.require(
        out_dtype in checks.GEMM_DTYPES, "out_dtype", out_dtype, "bfloat16, float16, float32 or (raw sums) int32"
    )
    return torch.empty(product.shape, dtype=out_dtype, device=product.a.device)


@operator(mutates=["out"])
def dual_scale_gemm_out(product: Product, out: Tensor) -> None:
    """Write the result of `dual_scale_gemm` to `out`.

    Args:
        product: as in `dual_scale_gemm`.
        out: `[M, N]` in one of the dtypes of `dual_scale_gemm`, overwritten. Compiled implementations need it
            contiguous.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(*product)
    checks.require(
        out.dtype in checks.GEMM_DTYPES, "dtype of out", out.dtype, "bfloat16, float16, float32 or (raw sums) int32"
    )
    checks.tensor("out", out, product.shape, out.dtype)


@operator()
def dual_scale_gemm_gelu(product: Product, out_scale: Tensor, out_zero_point: Tensor, out_outliers: int) -> Tensor:
    """Compute `dual_scale_gemm`, then GELU (tanh form) and the static quantizer of the next layer.

    The rows of `weight` (and its scales) are in the stored channel order of that next layer, and so is the result.

    Args:
        product: as in `dual_scale_gemm`.
        out_scale: float32 `[2]`, `input_scale` of the next layer.
        out_zero_point: int32 `[2]`, its `input_zero_point`.
        out_outliers: its number of outliers; columns below it use group 0.

    Returns:
        int8 `[M, N]`: `clamp(round(gelu(y) / out_scale) + out_zero_point, 0, 255) - 128`. Compiled implementations
        approximate tanh and the division: a code may differ by one where the value lies next to a boundary.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(*product)
    checks.tensor("out_scale", out_scale, (2,), torch.float32)
    checks.tensor("out_zero_point", out_zero_point, (2,), torch.int32)
    checks.require(
        0 <= out_outliers <= product.shape[1], "out_outliers", out_outliers, f"0 to {product.shape[1]} (the columns)"
    )
    return torch.empty(product.shape, dtype=torch.int8, device=product.a.device)


@operator()
def dual_scale_gemm_residual(product: Product, residual: Tensor, gate: Tensor | None) -> Tensor:
    """Compute `residual + gate[m // (M / G)] * y` in float32, with y of `dual_scale_gemm`.

    Args:
        product: as in `dual_scale_gemm`.
        residual: bfloat16, float16 or float32 `[M, N]`.
        gate: float32 `[G, N]`, or None for a plain sum.

    Returns:
        `[M, N]` in the dtype of `residual`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(*product)
    checks.matrix("residual", residual, None, product.shape)
    checks.per_group("gate", gate, residual)
    return torch.empty(residual.shape, dtype=residual.dtype, device=product.a.device)


@operator(mutates=["out"])
def expand_int4(weight_packed: Tensor, weight_zero_point: Tensor, num_outliers: int, out: Tensor) -> None:
    """Write the int8 operand of a 4-bit weight into `out`.

    That is `code - clamp(zero_point, 0, 15)`; or `factor * (code - zero_point)` of a weight in groups.

    Args:
        weight_packed: uint8 `[N, K / 2]`, low nibble first, stored channel order.
        weight_zero_point: as in `StoredWeight`.
        num_outliers: size of group 0.
        out: int8 `[N, K]`, overwritten; all layers of a model can share one buffer in turn.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.packed_weight(weight_packed, 4)
    n = weight_packed.shape[0]
    checks.zero_points(weight_zero_point, n, k, 4)
    checks.outlier_count(num_outliers, k)
    checks.tensor("out", out, (n, k), torch.int8)
