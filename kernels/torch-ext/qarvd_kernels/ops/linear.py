"""Linear layers straight from a stored layer: no preparation, exact for every zero-point. The truth of the prepared path."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..operator import operator


@operator(
    "Tensor weight_packed, int bits",
    "Tensor",
)
def unpack_weight(weight_packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8 `[N, K * bits / 8]` to uint8 codes `[N, K]` (4 bits: low nibble first).

    Raises:
        ValueError: bits is not 4 or 8, or the tensor is not a two-dimensional uint8 tensor.
    """
    k = checks.packed_weight(weight_packed, bits)
    return torch.empty((weight_packed.shape[0], k), dtype=torch.uint8, device=weight_packed.device)


@operator(
    "Tensor a, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor input_scale, "
    "Tensor input_zero_point, Tensor? bias, int bits, SymInt num_outliers, ScalarType out_dtype",
    "Tensor",
)
def dual_scale_linear_static(
    a: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on an activation of `quantize_static`: exact int32 sums per group, scaled and added in float32.

    Args:
        a: int8 `[..., K]`.
        weight_packed: uint8 `[N, K * bits / 8]`, permuted channels.
        weight_scale: float32 `[N, 2]`.
        weight_zero_point: int16 `[N, 2]`.
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
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers)
    checks.integer_activation(a, k, out_dtype)
    checks.input_quantizer(input_scale, input_zero_point)
    return torch.empty((*a.shape[:-1], weight_packed.shape[0]), dtype=out_dtype, device=a.device)


@operator(
    "Tensor a, Tensor a_scale, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor? bias, "
    "int bits, SymInt num_outliers, ScalarType out_dtype",
    "Tensor",
)
def dual_scale_linear_dynamic(
    a: Tensor,
    a_scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on the pair of `quantize_dynamic`; arguments as in `dual_scale_linear_static`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers)
    checks.integer_activation(a, k, out_dtype)
    checks.tensor("a_scale", a_scale, (*a.shape[:-1], 2), torch.float32)
    return torch.empty((*a.shape[:-1], weight_packed.shape[0]), dtype=out_dtype, device=a.device)


@operator(
    "Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor channel_order, int bits, "
    "SymInt num_outliers, ScalarType out_dtype",
    "Tensor",
)
def dequantize_weight(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    channel_order: Tensor,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The float weight `[N, K]` in its original channel order; arguments as in `dual_scale_linear_static`.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, None, bits, num_outliers)
    checks.tensor("channel_order", channel_order, (k,), torch.int32)
    return torch.empty((weight_packed.shape[0], k), dtype=out_dtype, device=weight_packed.device)


@operator(
    "Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor channel_order, "
    "Tensor? bias, int bits, SymInt num_outliers",
    "Tensor",
)
def weight_only_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
) -> Tensor:
    """Linear layer on a float activation `[..., K]` (original channel order) with the de-quantized weight.

    Returns:
        `[..., N]` in the dtype of x.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers)
    checks.activation(x, channel_order, num_outliers)
    checks.require(x.shape[-1] == k, "shape of the activation", tuple(x.shape), f"[..., {k}]")
    return torch.empty((*x.shape[:-1], weight_packed.shape[0]), dtype=x.dtype, device=x.device)
