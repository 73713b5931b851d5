"""The dual-scale integer matrix product on prepared layers (see `prepare`), and the expansion of 4-bit weights for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..operator import operator


@operator(
    "Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias, Tensor? row_sums, "
    "Tensor? row_sum_scale, ScalarType out_dtype",
    "Tensor",
)
def dual_scale_gemm(
    a: Tensor,
    weight: Tensor,
    num_outliers: int,
    ratio: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor | None,
    row_sum_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`a @ weight.T` with outlier channels first in K: the int32 sum is re-scaled once, where the groups meet.

        acc = sum_{k < num_outliers} a w                    int32
        acc = rint(float32(acc) * ratio[n])                 int32, ties to even
        acc = acc + sum_{k >= num_outliers} a w             int32
        y   = float32(acc) * scale[n] + bias[n] - sum_g row_sums[m, g] * row_sum_scale[g, n]

    Args:
        a: int8 `[M, K]`, stored channel order.
        weight: int8 `[N, K]`.
        num_outliers: size of group 0.
        ratio: float32 `[N]`, scale of group 0 over scale of group 1.
        scale: float32 `[N]`.
        bias: float32 `[N]`, with the constant part of all zero-points folded in.
        row_sums: int32 `[M, 2]` of the operator of that name, or None.
        row_sum_scale: float32 `[2, N]`; given together with `row_sums`.
        out_dtype: bfloat16, float16 or float32; int32 returns `acc` itself, without the epilogue.

    Returns:
        `[M, N]` in `out_dtype`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(a, weight, num_outliers, ratio, scale, bias, row_sums, row_sum_scale)
    checks.require(
        out_dtype in checks.GEMM_DTYPES, "out_dtype", out_dtype, "bfloat16, float16, float32 or (raw sums) int32"
    )
    return torch.empty((a.shape[0], weight.shape[0]), dtype=out_dtype, device=a.device)


@operator(
    "Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias, Tensor? row_sums, "
    "Tensor? row_sum_scale, Tensor out_scale, Tensor out_zero_point, SymInt out_outliers",
    "Tensor",
)
def dual_scale_gemm_gelu(
    a: Tensor,
    weight: Tensor,
    num_outliers: int,
    ratio: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor | None,
    row_sum_scale: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    out_outliers: int,
) -> Tensor:
    """`dual_scale_gemm`, GELU (tanh form), and the static quantizer of the layer that follows.

    The rows of `weight` (and its scales) stand in the stored channel order of that next layer, so that the result does too.

    Args:
        a, weight, num_outliers, ratio, scale, bias, row_sums, row_sum_scale: as in `dual_scale_gemm`.
        out_scale: float32 `[2]`, `input_scale` of the next layer.
        out_zero_point: int32 `[2]`, its `input_zero_point`.
        out_outliers: its number of outliers; columns below it use group 0.

    Returns:
        int8 `[M, N]`: `clamp(round(gelu(y) / out_scale) + out_zero_point, 0, 255) - 128`. Compiled implementations
        approximate tanh and the division: a code may differ by one where the value lies next to a boundary.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(a, weight, num_outliers, ratio, scale, bias, row_sums, row_sum_scale)
    checks.tensor("out_scale", out_scale, (2,), torch.float32)
    checks.tensor("out_zero_point", out_zero_point, (2,), torch.int32)
    checks.require(
        0 <= out_outliers <= weight.shape[0], "out_outliers", out_outliers, f"0 to {weight.shape[0]} (the columns)"
    )
    return torch.empty((a.shape[0], weight.shape[0]), dtype=torch.int8, device=a.device)


@operator(
    "Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias, Tensor? row_sums, "
    "Tensor? row_sum_scale, Tensor residual, Tensor? gate",
    "Tensor",
)
def dual_scale_gemm_residual(
    a: Tensor,
    weight: Tensor,
    num_outliers: int,
    ratio: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor | None,
    row_sum_scale: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """`residual + gate[m // (M / G)] * y`, y of `dual_scale_gemm`, computed in float32.

    Args:
        a, weight, num_outliers, ratio, scale, bias, row_sums, row_sum_scale: as in `dual_scale_gemm`.
        residual: bfloat16, float16 or float32 `[M, N]`.
        gate: float32 `[G, N]`, or None for a plain sum.

    Returns:
        `[M, N]` in the dtype of `residual`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.dual_scale_gemm(a, weight, num_outliers, ratio, scale, bias, row_sums, row_sum_scale)
    checks.matrix("residual", residual, None, (a.shape[0], weight.shape[0]))
    checks.per_group("gate", gate, residual)
    return torch.empty(residual.shape, dtype=residual.dtype, device=a.device)


@operator("Tensor weight_packed, Tensor weight_zero_point, SymInt num_outliers, Tensor(a!) out", "()")
def expand_int4(weight_packed: Tensor, weight_zero_point: Tensor, num_outliers: int, out: Tensor) -> None:
    """Write the int8 operand of a 4-bit weight, `code - clamp(zero_point, 0, 15)`, into `out`.

    Args:
        weight_packed: uint8 `[N, K / 2]`, low nibble first, stored channel order.
        weight_zero_point: int16 `[N, 2]`.
        num_outliers: size of group 0.
        out: int8 `[N, K]`, overwritten; one scratch serves all layers of a model in turn.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.packed_weight(weight_packed, 4)
    n = weight_packed.shape[0]
    checks.tensor("weight_zero_point", weight_zero_point, (n, 2), torch.int16)
    checks.outlier_count(num_outliers, k)
    checks.tensor("out", out, (n, k), torch.int8)
