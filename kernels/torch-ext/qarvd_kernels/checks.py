"""Argument checks shared by the eager and the traced operators: shapes, dtypes and ranges, never tensor values."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise a ValueError `qarvd_kernels: <name> is <got>, expected <expected>` unless the condition holds."""
    if not condition:
        raise ValueError(f"qarvd_kernels: {name} is {got}, expected {expected}")


def tensor(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Exact shape and dtype."""
    require(tuple(value.shape) == shape, f"shape of {name}", tuple(value.shape), str(shape))
    require(value.dtype == dtype, f"dtype of {name}", value.dtype, str(dtype))


def activation(x: Tensor, channel_order: Tensor, num_outliers: int) -> None:
    """A float activation `[..., K]` and the permutation of its channels."""
    require(x.is_floating_point(), "dtype of the activation", x.dtype, "a floating-point dtype")
    require(x.ndim >= 1, "the activation", "a scalar", "at least one dimension")
    tensor("channel_order", channel_order, (x.shape[-1],), torch.int32)
    outlier_count(num_outliers, x.shape[-1])


def outlier_count(num_outliers: int, in_features: int) -> None:
    """A count of outlier channels, from none to all."""
    require(0 <= num_outliers <= in_features, "num_outliers", num_outliers, f"0 to {in_features} (the input channels)")


def packed_weight(weight_packed: Tensor, bits: int) -> int:
    """A packed weight; returns its number of input channels K."""
    require(bits in BITS, "bits", bits, "4 or 8")
    require(weight_packed.dtype == torch.uint8, "dtype of weight_packed", weight_packed.dtype, "torch.uint8")
    require(
        weight_packed.ndim == 2, "shape of weight_packed", tuple(weight_packed.shape), "two dimensions [N, K*bits/8]"
    )
    return weight_packed.shape[1] * 8 // bits


def weight(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
) -> int:
    """A packed weight with its scales, zero-points and bias; returns K."""
    in_features, out_features = packed_weight(weight_packed, bits), weight_packed.shape[0]
    tensor("weight_scale", weight_scale, (out_features, 2), torch.float32)
    tensor("weight_zero_point", weight_zero_point, (out_features, 2), torch.int16)
    outlier_count(num_outliers, in_features)
    if bias is not None:
        require(tuple(bias.shape) == (out_features,), "shape of bias", tuple(bias.shape), f"({out_features},)")
        require(bias.is_floating_point(), "dtype of bias", bias.dtype, "a floating-point dtype")
    return in_features


def input_quantizer(input_scale: Tensor, input_zero_point: Tensor) -> None:
    """Static activation scale and zero-point, one per group."""
    tensor("input_scale", input_scale, (2,), torch.float32)
    tensor("input_zero_point", input_zero_point, (2,), torch.int32)


def integer_activation(a: Tensor, in_features: int, out_dtype: torch.dtype) -> None:
    """A quantized activation `[..., K]`."""
    require(a.dtype == torch.int8, "dtype of the quantized activation", a.dtype, "torch.int8")
    require(
        a.ndim >= 1 and a.shape[-1] == in_features,
        "shape of the quantized activation",
        tuple(a.shape),
        f"[..., {in_features}]",
    )
    require(out_dtype.is_floating_point, "out_dtype", out_dtype, "a floating-point dtype")


def accumulator(in_features: int, input_zero_point: Tensor | None, weight_zero_point: Tensor, bits: int) -> None:
    """Refuse zero-points so far outside the code range that a sum of K products could leave int32.

    Reads tensor values, so it belongs where a layer is built, not into an operator.
    """

    def reach(zero_point: Tensor, levels: int) -> int:
        return max(int(zero_point.max()), levels - int(zero_point.min()))

    a = 127 if input_zero_point is None else reach(input_zero_point, 255)
    w = reach(weight_zero_point, 2**bits - 1)
    require(
        in_features * a * w < 2**31,
        "the largest integer sum of this layer",
        f"{in_features} * {a} * {w}",
        "less than 2**31; zero-points clamped to the code range stay below it up to 33000 input channels",
    )
