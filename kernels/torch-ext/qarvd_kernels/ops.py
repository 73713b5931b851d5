"""The operators: one schema each, shape functions for tracing, and the implementation that runs.

Registered with `torch.library` under the namespace `qarvd`, so `torch.compile` sees each as one opaque node and other
implementations can be added beside the reference. Semantics: `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference


@torch.library.custom_op("qarvd::quantize_static", mutates_args=())
def quantize_static(
    x: Tensor, channel_order: Tensor, num_outliers: int, input_scale: Tensor, input_zero_point: Tensor
) -> Tensor:
    """Quantize an activation with calibrated scales.

    Args:
        x: float `[..., K]`.
        channel_order: int32 `[K]`; permuted channel j is channel `channel_order[j]` of x.
        num_outliers: size of group 0.
        input_scale: float32 `[2]`, positive.
        input_zero_point: int32 `[2]`, in codes 0..255.

    Returns:
        int8 `[..., K]`, permuted: `clamp(round(x / scale) + zero_point, 0, 255) - 128`, ties to even.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.activation(x, channel_order, num_outliers)
    checks.input_quantizer(input_scale, input_zero_point)
    return reference.quantize_static(x, channel_order, num_outliers, input_scale, input_zero_point)


@quantize_static.register_fake
def _(x, channel_order, num_outliers, input_scale, input_zero_point):
    checks.activation(x, channel_order, num_outliers)
    checks.input_quantizer(input_scale, input_zero_point)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("qarvd::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: Tensor, channel_order: Tensor, num_outliers: int) -> tuple[Tensor, Tensor]:
    """Quantize an activation symmetrically, with one scale per token and group found on the spot.

    Args:
        x: float `[..., K]`.
        channel_order: int32 `[K]`, as in `quantize_static`.
        num_outliers: size of group 0.

    Returns:
        int8 `[..., K]`, permuted, in -127..127; float32 `[..., 2]` scales (1 where a group is empty or all zero).

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.activation(x, channel_order, num_outliers)
    return reference.quantize_dynamic(x, channel_order, num_outliers)


@quantize_dynamic.register_fake
def _(x, channel_order, num_outliers):
    checks.activation(x, channel_order, num_outliers)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


@torch.library.custom_op("qarvd::unpack_weight", mutates_args=())
def unpack_weight(weight_packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8 `[N, K * bits / 8]` to uint8 codes `[N, K]` (4 bits: low nibble first).

    Raises:
        ValueError: bits is not 4 or 8, or the tensor is not a two-dimensional uint8 tensor.
    """
    checks.packed_weight(weight_packed, bits)
    return reference.unpack_weight(weight_packed, bits)


@unpack_weight.register_fake
def _(weight_packed, bits):
    return weight_packed.new_empty((weight_packed.shape[0], checks.packed_weight(weight_packed, bits)))


@torch.library.custom_op("qarvd::dual_scale_linear_static", mutates_args=())
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
    return reference.dual_scale_linear_static(
        a,
        weight_packed,
        weight_scale,
        weight_zero_point,
        input_scale,
        input_zero_point,
        bias,
        bits,
        num_outliers,
        out_dtype,
    )


@dual_scale_linear_static.register_fake
def _(
    a,
    weight_packed,
    weight_scale,
    weight_zero_point,
    input_scale,
    input_zero_point,
    bias,
    bits,
    num_outliers,
    out_dtype,
):
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers)
    checks.integer_activation(a, k, out_dtype)
    checks.input_quantizer(input_scale, input_zero_point)
    return a.new_empty((*a.shape[:-1], weight_packed.shape[0]), dtype=out_dtype)


@torch.library.custom_op("qarvd::dual_scale_linear_dynamic", mutates_args=())
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
    return reference.dual_scale_linear_dynamic(
        a, a_scale, weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers, out_dtype
    )


@dual_scale_linear_dynamic.register_fake
def _(a, a_scale, weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers, out_dtype):
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers)
    checks.integer_activation(a, k, out_dtype)
    checks.tensor("a_scale", a_scale, (*a.shape[:-1], 2), torch.float32)
    return a.new_empty((*a.shape[:-1], weight_packed.shape[0]), dtype=out_dtype)


@torch.library.custom_op("qarvd::dequantize_weight", mutates_args=())
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
    return reference.dequantize_weight(
        weight_packed, weight_scale, weight_zero_point, channel_order, bits, num_outliers, out_dtype
    )


@dequantize_weight.register_fake
def _(weight_packed, weight_scale, weight_zero_point, channel_order, bits, num_outliers, out_dtype):
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, None, bits, num_outliers)
    checks.tensor("channel_order", channel_order, (k,), torch.int32)
    return weight_packed.new_empty((weight_packed.shape[0], k), dtype=out_dtype)


@torch.library.custom_op("qarvd::weight_only_linear", mutates_args=())
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
    return reference.weight_only_linear(
        x, weight_packed, weight_scale, weight_zero_point, channel_order, bias, bits, num_outliers
    )


@weight_only_linear.register_fake
def _(x, weight_packed, weight_scale, weight_zero_point, channel_order, bias, bits, num_outliers):
    k = checks.weight(weight_packed, weight_scale, weight_zero_point, bias, bits, num_outliers)
    checks.activation(x, channel_order, num_outliers)
    checks.require(x.shape[-1] == k, "shape of the activation", tuple(x.shape), f"[..., {k}]")
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))
