"""Check arguments of eager and traced operators: shapes, dtypes and ranges, never tensor values."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)
GROUP = 16  # channels of a 4-bit weight that share an integer factor and a zero-point
GEMM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)
PLAIN_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED_CACHE_DTYPES = (torch.int8, torch.float8_e4m3fn)


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise a ValueError `qarvd_kernels: <name> is <got>, expected <expected>` unless the condition holds."""
    if not condition:
        raise ValueError(f"qarvd_kernels: {name} is {got}, expected {expected}")


def tensor(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check exact shape and dtype."""
    require(tuple(value.shape) == shape, f"shape of {name}", tuple(value.shape), str(shape))
    require(value.dtype == dtype, f"dtype of {name}", value.dtype, str(dtype))


def activation(x: Tensor, channel_order: Tensor, num_outliers: int) -> None:
    """Check a float activation `[..., K]` and the permutation of its channels."""
    require(x.is_floating_point(), "dtype of the activation", x.dtype, "a floating-point dtype")
    require(x.ndim >= 1, "the activation", "a scalar", "at least one dimension")
    tensor("channel_order", channel_order, (x.shape[-1],), torch.int32)
    outlier_count(num_outliers, x.shape[-1])


def outlier_count(num_outliers: int, in_features: int) -> None:
    """Check a number of outlier channels, from none to all."""
    require(0 <= num_outliers <= in_features, "num_outliers", num_outliers, f"0 to {in_features} (the input channels)")


def packed_weight(weight_packed: Tensor, bits: int) -> int:
    """Check a packed weight; return its number of input channels K."""
    require(bits in BITS, "bits", bits, "4 or 8")
    require(weight_packed.dtype == torch.uint8, "dtype of weight_packed", weight_packed.dtype, "torch.uint8")
    require(
        weight_packed.ndim == 2, "shape of weight_packed", tuple(weight_packed.shape), "two dimensions [N, K*bits/8]"
    )
    return weight_packed.shape[1] * 8 // bits


def zero_points(value: Tensor, out_features: int, in_features: int, bits: int) -> None:
    """Check the zero-points of a weight: two per row, or one byte per 16 channels of a 4-bit weight."""
    if value.dtype == torch.uint8 and bits == 4:
        require(in_features % GROUP == 0, "K of a weight in groups", in_features, f"a multiple of {GROUP}")
        tensor("weight_zero_point", value, (out_features, in_features // GROUP), torch.uint8)
    else:
        tensor("weight_zero_point", value, (out_features, 2), torch.int16)


def rotation(block: int, channels: int) -> None:
    """Check the size of the blocks of channels that a Hadamard rotation mixes."""
    fits = block > 0 and block & (block - 1) == 0 and channels % block == 0
    require(fits, "rotation", block, f"a power of two that divides {channels} (the channels)")


def weight(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
) -> int:
    """Check a packed weight with its scales, zero-points and bias; return K."""
    in_features, out_features = packed_weight(weight_packed, bits), weight_packed.shape[0]
    tensor("weight_scale", weight_scale, (out_features, 2), torch.float32)
    zero_points(weight_zero_point, out_features, in_features, bits)
    outlier_count(num_outliers, in_features)
    if bias is not None:
        require(tuple(bias.shape) == (out_features,), "shape of bias", tuple(bias.shape), f"({out_features},)")
        require(bias.is_floating_point(), "dtype of bias", bias.dtype, "a floating-point dtype")
    return in_features


def input_quantizer(input_scale: Tensor, input_zero_point: Tensor) -> None:
    """Check a static activation scale and zero-point, one per group."""
    tensor("input_scale", input_scale, (2,), torch.float32)
    tensor("input_zero_point", input_zero_point, (2,), torch.int32)


def integer_activation(a: Tensor, in_features: int, out_dtype: torch.dtype) -> None:
    """Check a quantized activation `[..., K]` and the dtype of the result."""
    require(a.dtype == torch.int8, "dtype of the quantized activation", a.dtype, "torch.int8")
    require(
        a.ndim >= 1 and a.shape[-1] == in_features,
        "shape of the quantized activation",
        tuple(a.shape),
        f"[..., {in_features}]",
    )
    require(out_dtype.is_floating_point, "out_dtype", out_dtype, "a floating-point dtype")


def matrix(name: str, value: Tensor, dtype: torch.dtype | None, shape: tuple[int, int] | None = None) -> None:
    """Check for two dimensions, and for `dtype` or, if that is None, any floating dtype."""
    require(value.ndim == 2, f"shape of {name}", tuple(value.shape), "two dimensions")
    if shape is not None:
        require(tuple(value.shape) == shape, f"shape of {name}", tuple(value.shape), str(shape))
    if dtype is None:
        require(value.is_floating_point(), f"dtype of {name}", value.dtype, "a floating-point dtype")
    else:
        require(value.dtype == dtype, f"dtype of {name}", value.dtype, str(dtype))


def all_or_none(**values: Tensor | None) -> bool:
    """Check that either all values are given or none; return whether they are."""
    given = [name for name, value in values.items() if value is not None]
    require(len(given) in (0, len(values)), " and ".join(values), f"{given} only", "given together, or both None")
    return bool(given)


def per_group(name: str, value: Tensor | None, x: Tensor) -> None:
    """Check a float32 table `[G, C]` for the rows of x `[M, C]`, G dividing M; None passes."""
    if value is None:
        return
    rows, columns = x.shape
    require(value.dtype == torch.float32, f"dtype of {name}", value.dtype, "torch.float32")
    fits = value.ndim == 2 and value.shape[1] == columns and value.shape[0] > 0 and rows % value.shape[0] == 0
    require(fits, f"shape of {name}", tuple(value.shape), f"(G, {columns}) with G dividing {rows}")


def normalization(
    x: Tensor, weight: Tensor | None, norm_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> None:
    """Check the input of a LayerNorm, its optional affine parameters and modulation."""
    matrix("x", x, None)
    if all_or_none(weight=weight, norm_bias=norm_bias):
        tensor("weight", weight, (x.shape[1],), torch.float32)
        tensor("norm_bias", norm_bias, (x.shape[1],), torch.float32)
    if all_or_none(scale=scale, shift=shift):
        per_group("scale", scale, x)
        per_group("shift", shift, x)
        require(scale.shape == shift.shape, "shape of shift", tuple(shift.shape), str(tuple(scale.shape)))


def residual(x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    """Check a residual stream, what is added to it, and its gate."""
    matrix("x", x, None)
    matrix("y", y, None, tuple(x.shape))
    per_group("gate", gate, x)


def dual_scale_gemm(
    a: Tensor,
    weight: Tensor,
    num_outliers: int,
    ratio: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor | None,
    row_sum_scale: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """Check the fields of `ops.arguments.Product`."""
    matrix("a", a, torch.int8)
    matrix("weight", weight, torch.int8)
    (m, k), n = a.shape, weight.shape[0]
    require(weight.shape[1] == k, "shape of weight", tuple(weight.shape), f"(N, {k}) for a with {k} channels")
    outlier_count(num_outliers, k)
    for name, value in (("ratio", ratio), ("scale", scale), ("bias", bias)):
        tensor(name, value, (n,), torch.float32)
    if all_or_none(row_sums=row_sums, row_sum_scale=row_sum_scale):
        tensor("row_sums", row_sums, (m, 2), torch.int32)
        tensor("row_sum_scale", row_sum_scale, (2, n), torch.float32)
        require(row_scale is None, "row_scale", "given with row_sums", "one of them")
    if row_scale is not None:
        tensor("row_scale", row_scale, (m,), torch.float32)


def cache(name: str, value: Tensor, scale: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Check keys or values of a cache `[B, S, H, D]`: 8-bit with scales `[H]` or `[B, H]`, or plain without."""
    batch, heads, head_dim = shape
    require(
        value.ndim == 4 and (value.shape[0], *value.shape[2:]) == shape,
        f"shape of the {name} cache",
        tuple(value.shape),
        f"({batch}, S, {heads}, {head_dim})",
    )
    require(
        value.dtype in (*PLAIN_CACHE_DTYPES, *QUANTIZED_CACHE_DTYPES),
        f"dtype of the {name} cache",
        value.dtype,
        "bfloat16, float16, float32, int8 or float8_e4m3fn",
    )
    quantized = value.dtype in QUANTIZED_CACHE_DTYPES
    require(
        (scale is not None) == quantized,
        f"{name}_scale",
        "None" if scale is None else "given",
        f"{'a tensor' if quantized else 'None'} for a {value.dtype} cache",
    )
    if scale is not None:
        tensor(f"{name}_scale", scale, (heads,) if scale.ndim == 1 else (batch, heads), torch.float32)


def per_sample(scale: Tensor | None, batch: int) -> Tensor | None:
    """Expand scales `[H]` or `[B, H]` of a cache to contiguous `[B, H]`, as kernels read them."""
    return None if scale is None else scale.expand(batch, -1).contiguous()
