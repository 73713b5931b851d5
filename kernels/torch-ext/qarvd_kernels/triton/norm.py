"""Run LayerNorm, modulation, gated residual and static quantization of one row per program, all in registers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Launcher,
    group_quantizer,
    quantize,
    row_warps,
    store_row,
    unsupported_device,
    unsupported_empty,
    unsupported_row,
)

_ADD_BLOCK = 1024
_block = cache(triton.next_power_of_2)


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device) or unsupported_empty(arguments)
    if reason or arguments is None:
        return reason
    if operator.endswith("_") and not arguments["x"].is_contiguous():
        return "x is not contiguous"
    return None if operator.startswith("add_gated") else unsupported_row(arguments["x"].shape[1])


@triton.jit
def _gated_sum(x, y, gate, channel, mask):
    """Compute `x + gate * y` of one row in float32; y and gate may be None."""
    value = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        added = tl.load(y + channel, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + channel, mask=mask, other=0.0)
        value += added
    return value


@triton.jit
def _layer_norm(value, weight, norm_bias, eps, channel, mask, C: tl.constexpr):
    """Normalize one row; weight and norm_bias may be None."""
    mean = tl.sum(value, axis=0) / C
    value = tl.where(mask, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / C + eps)
    if weight is not None:
        value = value * tl.load(weight + channel, mask=mask, other=0.0)
        value += tl.load(norm_bias + channel, mask=mask, other=0.0)
    return value


@triton.jit
def _normed_sum(
    x,
    y,
    gate,
    weight,
    norm_bias,
    scale,
    shift,
    total,
    eps,
    rows_per_gate,
    rows_per_scale,
    row,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of one row, which may be x, and return its norm, modulated."""
    channel = tl.arange(0, BLOCK)
    mask = channel < C
    start = row * C
    if y is None:
        value = _gated_sum(x + start, None, None, channel, mask)
    else:
        gate_row = None if gate is None else gate + row // rows_per_gate * C
        value = _gated_sum(x + start, y + start, gate_row, channel, mask)
        tl.store(total + start + channel, value.to(total.dtype.element_ty), mask=mask)
    value = _layer_norm(value, weight, norm_bias, eps, channel, mask, C)
    if scale is not None:
        table = row // rows_per_scale * C + channel
        value *= 1.0 + tl.load(scale + table, mask=mask, other=0.0)
        value += tl.load(shift + table, mask=mask, other=0.0)
    return value


@triton.jit(do_not_specialize=["eps", "rows_per_gate", "rows_per_scale"])
def norm_quantize_kernel(
    x,
    y,
    gate,
    weight,
    norm_bias,
    scale,
    shift,
    channel_order,
    input_scale,
    input_zero_point,
    total,
    codes,
    eps,
    rows_per_gate,
    rows_per_scale,
    C: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum and the codes of one row; total may be x."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < C
    order = tl.load(channel_order + channel, mask=mask, other=0)
    order = tl.minimum(tl.maximum(order, 0), C - 1)  # the gather below has no mask
    value = _normed_sum(
        x, y, gate, weight, norm_bias, scale, shift, total, eps, rows_per_gate, rows_per_scale, row, C, BLOCK
    )
    # Loads are wide, in the order of the row; the permutation goes through shared memory, so that stores are wide too.
    inverse, low, offset = group_quantizer(input_scale, input_zero_point, OUTLIERS, channel)
    code = quantize(tl.gather(value, order, axis=0), inverse, low, offset)
    tl.store(codes + row * C + channel, code, mask=mask)


@triton.jit(do_not_specialize=["eps", "rows_per_gate", "rows_per_scale"])
def norm_quantize_rows_kernel(
    x,
    y,
    gate,
    weight,
    norm_bias,
    scale,
    shift,
    channel_scale,
    total,
    codes,
    row_scale,
    eps,
    rows_per_gate,
    rows_per_scale,
    C: tl.constexpr,
    ROTATION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of one row, which may be x, the codes of its rotated norm and their scale."""
    row = tl.program_id(0).to(tl.int64)
    value = _normed_sum(
        x, y, gate, weight, norm_bias, scale, shift, total, eps, rows_per_gate, rows_per_scale, row, C, BLOCK
    )
    store_row(value, channel_scale, codes, row_scale, row, C, ROTATION, BITS, BLOCK)


@triton.jit(do_not_specialize=["rows_per_gate"])
def add_gated_kernel(x, y, gate, total, rows_per_gate, C: tl.constexpr, BLOCK: tl.constexpr):
    """Write a part of one row of the sum; total may be x."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    gate_row = None if gate is None else gate + row // rows_per_gate * C
    value = _gated_sum(x + row * C, y + row * C, gate_row, channel, mask)
    tl.store(total + row * C + channel, value.to(total.dtype.element_ty), mask=mask)


_norm_quantize = Launcher(norm_quantize_kernel)
_norm_quantize_rows = Launcher(norm_quantize_rows_kernel)
_add_gated = Launcher(add_gated_kernel)


def _rows_per(table: Tensor | None, rows: int) -> int:
    """Return how many rows share a row of the table; 1 without a table."""
    return 1 if table is None else rows // table.shape[0]


def _launch(x: Tensor, y: Tensor | None, gate: Tensor | None, arguments: tuple, total: Tensor | None = None) -> Tensor:
    """Write `x + gate * y` to `total` if there is a y; return int8 codes in the shape of x.

    Args:
        x: float `[M, C]`, contiguous.
        y: likewise, or None.
        gate: float32 `[G, C]` or None.
        arguments: the fields of `Norm`, then those of `InputQuantizer`.
        total: like x, or None without y. It may be x itself: a program reads a row of x and y before it writes it.
    """
    weight, norm_bias, scale, shift, eps, channel_order, num_outliers, input_scale, input_zero_point = arguments
    codes = torch.empty_like(x, dtype=torch.int8)
    (rows, columns), block = x.shape, _block(x.shape[1])
    _norm_quantize(
        (rows, 1, 1),
        (x, y, gate, weight, norm_bias, scale, shift, channel_order, input_scale, input_zero_point, total, codes),
        (eps, _rows_per(gate, rows), _rows_per(scale, rows)),
        (columns, num_outliers, block),
        (row_warps(block), 1),
        (x.dtype, None if y is None else y.dtype, gate is None, weight is None, scale is None),
    )
    return codes


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """Normalize and quantize float `[M, C]` to int8 `[M, C]`, permuted."""
    return _launch(x, None, None, arguments)


def add_norm_quantize(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gated sum in the dtype of x, and int8 codes `[M, C]` of its norm."""
    total = torch.empty_like(x)
    return total, _launch(x, y, gate, arguments, total)


def add_norm_quantize_(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> Tensor:
    """Replace x by the gated sum, and return int8 codes `[M, C]` of its norm."""
    return _launch(x, y, gate, arguments, total=x)


def norm_quantize_rows(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Normalize, rotate and quantize float `[M, C]` to int8 `[M, C]`, with scales `[M]`."""
    return _launch_rows(x, None, None, arguments)


def add_norm_quantize_rows_(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Replace x by the gated sum; return codes and scales of its norm."""
    return _launch_rows(x, y, gate, arguments)


def _launch_rows(x: Tensor, y: Tensor | None, gate: Tensor | None, arguments: tuple) -> tuple[Tensor, Tensor]:
    """Write `x + gate * y` to x if there is a y; return int8 codes in the shape of x, and their scales."""
    weight, norm_bias, scale, shift, eps, channel_scale, rotation = arguments
    (rows, columns), block = x.shape, _block(x.shape[1])
    codes, row_scale = torch.empty_like(x, dtype=torch.int8), torch.empty(rows, dtype=torch.float32, device=x.device)
    _norm_quantize_rows(
        (rows, 1, 1),
        (x, y, gate, weight, norm_bias, scale, shift, channel_scale, None if y is None else x, codes, row_scale),
        (eps, _rows_per(gate, rows), _rows_per(scale, rows)),
        (columns, rotation, rotation.bit_length() - 1, block),
        (row_warps(block), 1),
        (x.dtype, None if y is None else y.dtype, gate is None, weight is None, scale is None),
    )
    return codes, row_scale


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Compute `x + gate * y` in the dtype of x."""
    total = torch.empty_like(x)
    _launch_add(x, y, gate, total)
    return total


def add_gated_(x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    """Replace x by `x + gate * y`."""
    _launch_add(x, y, gate, total=x)


def _launch_add(x: Tensor, y: Tensor, gate: Tensor | None, total: Tensor) -> None:
    """Write `x + gate * y` to `total`, which may be x."""
    rows, columns = x.shape
    block = min(_block(columns), _ADD_BLOCK)
    grid = (rows, triton.cdiv(columns, block), 1)
    kind = (x.dtype, y.dtype, gate is None)
    _add_gated(grid, (x, y, gate, total), (_rows_per(gate, rows),), (columns, block), (4, 1), kind)
