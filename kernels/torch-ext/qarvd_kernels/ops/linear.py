"""Run linear layers on stored tensors, exact for every zero-point: the reference of the prepared path."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..declare import Constant, operator
from .arguments import StoredWeight


@operator()
def unpack_weight(weight_packed: Tensor, bits: Constant) -> Tensor:
    """Unpack uint8 `[N, K * bits / 8]` to uint8 codes `[N, K]` (4 bits: low nibble first).

    Raises:
        ValueError: bits is not 4 or 8, or the tensor is not a two-dimensional uint8 tensor.
    """
    k = checks.packed_weight(weight_packed, bits)
    return torch.empty((weight_packed.shape[0], k), dtype=torch.uint8, device=weight_packed.device)


@operator()
def dual_scale_linear_static(
    a: Tensor,
    weight: StoredWeight,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    bits: Constant,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Apply a linear layer to the result of `quantize_static`: exact int32 sums per group, added in float32.

    Args:
        a: int8 `[..., K]`.
        weight: the fields of `StoredWeight`.
        input_scale: float32 `[2]`.
        input_zero_point: int32 `[2]`.
        bias: float `[N]` or None.
        bits: 4 or 8.
        num_outliers: size of group 0, 0 to K.
        out_dtype: floating dtype of the result.

    Returns:
        `[..., N]` in `out_dtype`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(*weight, bias, bits, num_outliers)
    checks.integer_activation(a, k, out_dtype)
    checks.input_quantizer(input_scale, input_zero_point)
    return torch.empty((*a.shape[:-1], weight.weight_packed.shape[0]), dtype=out_dtype, device=a.device)


@operator()
def dual_scale_linear_dynamic(
    a: Tensor,
    a_scale: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    bits: Constant,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Apply a linear layer to the results of `quantize_dynamic`; arguments as in `dual_scale_linear_static`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(*weight, bias, bits, num_outliers)
    checks.integer_activation(a, k, out_dtype)
    checks.tensor("a_scale", a_scale, (*a.shape[:-1], 2), torch.float32)
    return torch.empty((*a.shape[:-1], weight.weight_packed.shape[0]), dtype=out_dtype, device=a.device)


@operator()
def dequantize_weight(
    weight: StoredWeight, channel_order: Tensor, bits: Constant, num_outliers: int, out_dtype: torch.dtype
) -> Tensor:
    """Return the float weight `[N, K]` in its original channel order; arguments as in `dual_scale_linear_static`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(*weight, None, bits, num_outliers)
    checks.tensor("channel_order", channel_order, (k,), torch.int32)
    return torch.empty((weight.weight_packed.shape[0], k), dtype=out_dtype, device=weight.weight_packed.device)


@operator()
def weight_only_linear(
    x: Tensor, weight: StoredWeight, channel_order: Tensor, bias: Tensor | None, bits: Constant, num_outliers: int
) -> Tensor:
    """Apply a linear layer with the dequantized weight to a float activation `[..., K]` (original channel order).

    Returns:
        `[..., N]` in the dtype of x.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(*weight, bias, bits, num_outliers)
    checks.activation(x, channel_order, num_outliers)
    checks.require(x.shape[-1] == k, "shape of the activation", tuple(x.shape), f"[..., {k}]")
    return torch.empty((*x.shape[:-1], weight.weight_packed.shape[0]), dtype=x.dtype, device=x.device)
