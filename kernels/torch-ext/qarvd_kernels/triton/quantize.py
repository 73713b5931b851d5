"""Static quantization with a permuted gather, and the row sums of asymmetric weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, block_of, device_refusal, empty_refusal, group_values, quantize

_BLOCK = 512
_ROWS = 8


def refuses(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """See `dispatch`."""
    return device_refusal(device) or empty_refusal(arguments)


@triton.jit(do_not_specialize=["rows"])
def quantize_static_kernel(
    x,
    channel_order,
    input_scale,
    input_zero_point,
    codes,
    rows,
    K: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(channel_order + channel, mask=channel < K, other=0)
    inverse = 1.0 / group_values(input_scale, OUTLIERS, channel)
    zero_point = group_values(input_zero_point, OUTLIERS, channel)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = (row < rows) & (channel < K)[None, :]
    value = tl.load(x + row * K + order[None, :], mask=mask, other=0.0).to(tl.float32)
    code = quantize(value, inverse[None, :], zero_point[None, :])
    tl.store(codes + row * K + channel[None, :], code, mask=mask)


@triton.jit
def row_sums_kernel(a, sums, K: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr):
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
_row_sums = Launcher(row_sums_kernel)


def quantize_static(
    x: Tensor, channel_order: Tensor, num_outliers: int, input_scale: Tensor, input_zero_point: Tensor
) -> Tensor:
    """Float `[..., K]` -> int8 `[..., K]`, permuted."""
    codes, k = torch.empty(x.shape, dtype=torch.int8, device=x.device), x.shape[-1]
    rows, block = x.numel() // k, block_of(k, _BLOCK)
    _quantize_static(
        x.get_device(),
        (triton.cdiv(rows, _ROWS), triton.cdiv(k, block), 1),
        (x.contiguous(), channel_order, input_scale, input_zero_point, codes, rows),
        (k, num_outliers, _ROWS, block),
        (4, 1),
    )
    return codes


def row_sums(a: Tensor, num_outliers: int) -> Tensor:
    """int8 `[M, K]` -> int32 `[M, 2]`."""
    (rows, k), sums = a.shape, torch.empty((a.shape[0], 2), dtype=torch.int32, device=a.device)
    _row_sums(a.get_device(), (rows, 1, 1), (a.contiguous(), sums), (k, num_outliers, block_of(k, 2048)), (4, 1))
    return sums
