"""Run static quantization with a permuted gather, and the row sums for asymmetric weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    LARGEST_ROW,
    Launcher,
    block_of,
    group_quantizer,
    quantize,
    row_warps,
    store_row,
    unsupported_device,
    unsupported_empty,
    unsupported_row,
)

_BLOCK = 512


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device) or unsupported_empty(arguments)
    if reason is None and arguments is not None and operator == "quantize_rows":
        return unsupported_row(arguments["x"].shape[-1])
    return reason


@triton.jit(do_not_specialize=["rows", "zero"])
def quantize_static_kernel(
    x,
    channel_order,
    input_scale,
    input_zero_point,
    codes,
    rows,
    zero,
    K: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize two rows per program, in stored channel order."""
    # A zero unknown to the compiler assigns channels to lanes one by one: the gather below is then nearly contiguous.
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) + zero
    order = tl.load(channel_order + channel, mask=channel < K, other=0)
    order = tl.minimum(tl.maximum(order, 0), K - 1)  # whatever a file says, nothing outside of the row is read
    inverse, low, offset = group_quantizer(input_scale, input_zero_point, OUTLIERS, channel)
    first = tl.program_id(0).to(tl.int64) * 2
    here = channel < K
    there = channel < tl.where(first + 1 < rows, K, 0)
    # Both loads before the first store, which they could not pass.
    value = tl.load(x + first * K + order, mask=here, other=0.0).to(tl.float32)
    below = tl.load(x + first * K + K + order, mask=there, other=0.0).to(tl.float32)
    tl.store(codes + first * K + channel, quantize(value, inverse, low, offset), mask=here)
    tl.store(codes + first * K + K + channel, quantize(below, inverse, low, offset), mask=there)


@triton.jit
def quantize_rows_kernel(
    x,
    channel_scale,
    codes,
    row_scale,
    K: tl.constexpr,
    ROTATION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate and quantize one row."""
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * K + channel, mask=channel < K, other=0.0).to(tl.float32)
    store_row(value, channel_scale, codes, row_scale, row, K, ROTATION, BITS, BLOCK)


@triton.jit
def row_sums_kernel(a, sums, K: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the two channel groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    outlier = tl.zeros([BLOCK], tl.int32)
    normal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        value = tl.load(a + row * K + channel, mask=channel < K, other=0).to(tl.int32)
        outlier += tl.where(channel < OUTLIERS, value, 0)
        normal += tl.where(channel < OUTLIERS, 0, value)
    tl.store(sums + row * 2, tl.sum(outlier, axis=0))
    tl.store(sums + row * 2 + 1, tl.sum(normal, axis=0))


_quantize_static = Launcher(quantize_static_kernel)
_quantize_rows = Launcher(quantize_rows_kernel)
_row_sums = Launcher(row_sums_kernel)


def quantize_static(
    x: Tensor, channel_order: Tensor, num_outliers: int, input_scale: Tensor, input_zero_point: Tensor
) -> Tensor:
    """Quantize float `[..., K]` to int8 `[..., K]`, permuted."""
    codes, k = torch.empty_like(x, dtype=torch.int8), x.shape[-1]
    rows, block = x.numel() // k, block_of(k, _BLOCK)
    grid = (triton.cdiv(rows, 2), triton.cdiv(k, block), 1)
    tensors = (x, channel_order, input_scale, input_zero_point, codes)
    _quantize_static(grid, tensors, (rows, 0), (k, num_outliers, block), (4, 1), (x.dtype,))
    return codes


def quantize_rows(x: Tensor, channel_scale: Tensor, rotation: int) -> tuple[Tensor, Tensor]:
    """Scale, rotate and quantize float `[..., K]` to int8 `[..., K]`, with scales `[...]`."""
    codes, k = torch.empty_like(x, dtype=torch.int8), x.shape[-1]
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = block_of(k, LARGEST_ROW)
    constants = (k, rotation, rotation.bit_length() - 1, block)
    _quantize_rows(
        (scale.numel(), 1, 1), (x, channel_scale, codes, scale), (), constants, (row_warps(block), 1), (x.dtype,)
    )
    return codes, scale


def row_sums(a: Tensor, num_outliers: int) -> Tensor:
    """Sum both groups of int8 `[M, K]` to int32 `[M, 2]`."""
    (rows, k), sums = a.shape, torch.empty((a.shape[0], 2), dtype=torch.int32, device=a.device)
    _row_sums((rows, 1, 1), (a, sums), (), (k, num_outliers, block_of(k, 2048)), (4, 1), ())
    return sums
