"""LayerNorm, modulation, gated residual and static quantization of one row per program; the row never leaves the chip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, device_refusal, empty_refusal, group_values, quantize

_LARGEST_ROW = 16384
_ADD_BLOCK = 1024


def refuses(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """See `dispatch`."""
    reason = device_refusal(device) or empty_refusal(arguments)
    if reason or arguments is None:
        return reason
    columns = arguments["x"].shape[1]
    if operator != "add_gated" and columns > _LARGEST_ROW:
        return f"rows of {columns} channels do not fit the registers of one program ({_LARGEST_ROW})"
    return None


@triton.jit
def _gated_sum(x, y, gate, at, gate_at, mask):
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        added = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + gate_at, mask=mask, other=0.0)
        value += added
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
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < C
    order = tl.load(channel_order + channel, mask=mask, other=0)
    value = _gated_sum(x, y, gate, row * C + channel, (row // rows_per_gate) * C + channel, mask)
    if total is not None:
        tl.store(total + row * C + channel, value.to(total.dtype.element_ty), mask=mask)
    mean = tl.sum(value, axis=0) / C
    value = tl.where(mask, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / C + eps)
    if weight is not None:
        value = value * tl.load(weight + channel, mask=mask, other=0.0)
        value += tl.load(norm_bias + channel, mask=mask, other=0.0)
    if scale is not None:
        at = (row // rows_per_scale) * C + channel
        value *= 1.0 + tl.load(scale + at, mask=mask, other=0.0)
        value += tl.load(shift + at, mask=mask, other=0.0)
    # Loads above are in the order of the row; the permutation goes through shared memory, so that the store is in order too.
    value = tl.gather(value, order, axis=0)
    inverse = 1.0 / group_values(input_scale, OUTLIERS, channel)
    code = quantize(value, inverse, group_values(input_zero_point, OUTLIERS, channel))
    tl.store(codes + row * C + channel, code, mask=mask)


@triton.jit(do_not_specialize=["rows_per_gate"])
def add_gated_kernel(x, y, gate, total, rows_per_gate, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    value = _gated_sum(x, y, gate, row * C + channel, (row // rows_per_gate) * C + channel, mask)
    tl.store(total + row * C + channel, value.to(total.dtype.element_ty), mask=mask)


_norm_quantize = Launcher(norm_quantize_kernel)
_add_gated = Launcher(add_gated_kernel)


def _rows_per(table: Tensor | None, rows: int) -> int:
    return 1 if table is None else rows // table.shape[0]


def _warps(block: int) -> int:
    """16 channels a thread: enough independent loads in flight, and no spills with both residual and modulation."""
    return min(max(block // 512, 1), 16)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple([None if t is None else t.contiguous() for t in tensors])


def _launch(x, y, gate, tables, eps, quantizer, total, codes) -> None:
    channel_order, num_outliers, input_scale, input_zero_point = quantizer
    (rows, columns), block = x.shape, triton.next_power_of_2(x.shape[1])
    tensors = _contiguous(x, y, gate, *tables, channel_order, input_scale, input_zero_point)
    numbers = (eps, _rows_per(gate, rows), _rows_per(tables[2], rows))
    _norm_quantize(
        x.get_device(),
        (rows, 1, 1),
        (*tensors, total, codes, *numbers),
        (columns, num_outliers, block),
        (_warps(block), 1),
    )


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    channel_order: Tensor,
    num_outliers: int,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    """Float `[M, C]` -> int8 `[M, C]`, permuted."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    quantizer = (channel_order, num_outliers, input_scale, input_zero_point)
    _launch(x, None, None, (weight, norm_bias, scale, shift), eps, quantizer, None, codes)
    return codes


def add_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    channel_order: Tensor,
    num_outliers: int,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gated sum in the dtype of x, and int8 `[M, C]` of its norm."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    quantizer = (channel_order, num_outliers, input_scale, input_zero_point)
    _launch(x, y, gate, (weight, norm_bias, scale, shift), eps, quantizer, total, codes)
    return total, codes


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + gate * y` in the dtype of x."""
    (rows, columns), total = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(columns), _ADD_BLOCK)
    arguments = (*_contiguous(x, y, gate), total, _rows_per(gate, rows))
    _add_gated(x.get_device(), (rows, triton.cdiv(columns, block), 1), arguments, (columns, block), (4, 1))
    return total
