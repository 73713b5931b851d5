"""Dequantize weights, for layers with floating-point activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .launch import Launcher, block_of, factors, group_values, unsupported_device, unsupported_empty

_BLOCK = 2048


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device) or unsupported_empty(arguments)
    if reason or arguments is None:
        return reason
    dtype = arguments["x"].dtype if operator == "weight_only_linear" else arguments["out_dtype"]
    return f"{dtype} weights" if dtype not in (torch.bfloat16, torch.float16, torch.float32) else None


@triton.jit
def dequantize_weight_kernel(
    packed,
    scale,
    zero_point,
    channel_order,
    weight,
    K: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dequantize a part of one row of a weight into original channel order."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < K
    if BITS == 8:
        code = tl.load(packed + row * K + channel, mask=mask, other=0).to(tl.int32) ^ 128
    else:
        byte = tl.load(packed + row * (K // 2) + channel // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> ((channel % 2) * 4)) & 15
    if GROUPED:
        factor, offset = factors(zero_point + row * (K // 16), channel, mask)
        code = factor * (code - offset)
    else:
        code -= group_values(zero_point + row * 2, OUTLIERS, channel).to(tl.int32)
    value = code.to(tl.float32) * group_values(scale + row * 2, OUTLIERS, channel)
    order = tl.load(channel_order + channel, mask=mask, other=0)
    order = tl.minimum(tl.maximum(order, 0), K - 1)  # nothing outside of the row is written
    tl.store(weight + row * K + order, value.to(weight.dtype.element_ty), mask=mask)


_dequantize_weight = Launcher(dequantize_weight_kernel)


def dequantize_weight(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    channel_order: Tensor,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return the weight `[N, K]` in its original channel order."""
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 8 // bits
    weight, block = torch.empty((n, k), dtype=out_dtype, device=weight_packed.device), block_of(k, _BLOCK)
    tensors = (weight_packed, weight_scale, weight_zero_point, channel_order, weight)
    constants = (k, num_outliers, bits, int(weight_zero_point.dtype == torch.uint8), block)
    _dequantize_weight((n, triton.cdiv(k, block), 1), tensors, (), constants, (8, 1), (out_dtype,))
    return weight


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
    """Multiply float `[..., K]` by the dequantized weight, which exists only until cuBLAS has read it."""
    stored = (weight_packed, weight_scale, weight_zero_point, channel_order)
    weight = dequantize_weight(*stored, bits, num_outliers, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
