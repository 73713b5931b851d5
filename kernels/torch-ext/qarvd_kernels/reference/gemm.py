"""Reference implementations of `ops.gemm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.arguments import Product
from .groups import CODE_OFFSET, group_slices, spread
from .linear import int_matmul, integer_weight
from .norm import expand_groups


def accumulate(a: Tensor, weight: Tensor, num_outliers: int, ratio: Tensor) -> Tensor:
    """Return int32 `[M, N]`: the outlier sum, rescaled and rounded, plus the normal sum."""
    outlier, normal = (int_matmul(a[:, part], weight[:, part]) for part in group_slices(a.shape[1], num_outliers))
    return (outlier.to(torch.float32) * ratio).round_().to(torch.int32) + normal


def _scaled(product: Product) -> Tensor:
    """Return float32 `[M, N]`: the scaled sums, bias, and the remainder of the weight zero-points."""
    y = accumulate(*product[:4]).to(torch.float32)
    if product.row_scale is not None:
        y *= product.row_scale[:, None]
    y = y * product.scale + product.bias
    if product.row_sums is not None:
        for g in (0, 1):
            y -= product.row_sums[:, g, None].to(torch.float32) * product.row_sum_scale[g]
    return y


def dual_scale_gemm(*arguments: Any) -> Tensor:
    """Return `[M, N]` in `out_dtype`; int32 is the sum before the epilogue."""
    *product, out_dtype = arguments
    out = torch.empty(Product(*product).shape, dtype=out_dtype, device=product[0].device)
    dual_scale_gemm_out(*product, out)
    return out


def dual_scale_gemm_out(*arguments: Any) -> None:
    """Write `dual_scale_gemm` in the dtype of `out` to `out`."""
    *product, out = arguments
    out.copy_(accumulate(*product[:4]) if out.dtype == torch.int32 else _scaled(Product(*product)))


def dual_scale_gemm_gelu(*arguments: Any) -> Tensor:
    """Return int8 `[M, N]`: GELU and static quantization of the product."""
    *product, out_scale, out_zero_point, out_outliers = arguments
    y = F.gelu(_scaled(Product(*product)), approximate="tanh")
    codes = y.div_(spread(out_scale, y.shape[1], out_outliers)).round_()
    codes = codes.add_(spread(out_zero_point, y.shape[1], out_outliers)).clamp_(0, 255)
    return codes.sub_(CODE_OFFSET).to(torch.int8)


def dual_scale_gemm_residual(*arguments: Any) -> Tensor:
    """Return `[M, N]` in the dtype of `residual`: the residual plus the gated product."""
    *product, residual, gate = arguments
    y = _scaled(Product(*product))
    if gate is not None:
        y *= expand_groups(gate, y.shape[0])
    return (residual.to(torch.float32) + y).to(residual.dtype)


def expand_int4(weight_packed: Tensor, weight_zero_point: Tensor, num_outliers: int, out: Tensor) -> None:
    """Write the int8 operand `[N, K]` of a 4-bit weight into `out`."""
    out.copy_(integer_weight(weight_packed, weight_zero_point, 4, num_outliers)[0])
