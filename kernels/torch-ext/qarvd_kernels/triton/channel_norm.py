"""Apply RMS norm and SiLU to a few positions per program, after the cached frames of a causal convolution."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, unsupported_device, unsupported_empty

_LARGEST_ROW = 4096
_ELEMENTS = 4096  # per program
_WARPS = 4
_block = cache(triton.next_power_of_2)


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device) or unsupported_empty(arguments)
    if reason or arguments is None:
        return reason
    if operator == "add_bias" and not arguments["total"].is_contiguous():
        return "total is not contiguous"
    if arguments["x"].shape[-1] > _LARGEST_ROW:
        return f"rows of {arguments['x'].shape[-1]} channels do not fit the registers of one program ({_LARGEST_ROW})"
    return None


@triton.jit(do_not_specialize=["new_rows", "old_rows", "zero_rows"])
def rms_norm_silu_kernel(
    x, bias, weight, past, out, new_rows, old_rows, zero_rows, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Normalize `ROWS` positions, or copy them from `past`, or write zeros."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    total = zero_rows + old_rows + new_rows
    new, old = row - old_rows - zero_rows, row - zero_rows
    is_new = (new >= 0) & (row < total)
    place = (sample * new_rows + new)[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=is_new[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(is_new[:, None], value + added[None, :], 0.0)
    norm = tl.sqrt(tl.sum(value * value, axis=1))
    factor = tl.sqrt(C * 1.0) / tl.maximum(norm, 1e-12)
    value *= factor[:, None] * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value *= tl.sigmoid(value)
    if past is not None:
        place = (sample * old_rows + old)[:, None] * C + channel[None, :]
        mask = ((old >= 0) & (old < old_rows))[:, None] & inside[None, :]
        value += tl.load(past + place, mask=mask, other=0.0).to(tl.float32)  # one of both is zero
    place = (sample * total + row)[:, None] * C + channel[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=(row < total)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_bias_kernel(total, x, bias, rows, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Add x and bias to `ROWS` positions of `total`, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    place = row[:, None] * C + channel[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    value = tl.load(total + place, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(total + place, value.to(total.dtype.element_ty), mask=mask)


_rms_norm_silu = Launcher(rms_norm_silu_kernel)
_add_bias = Launcher(add_bias_kernel)


def rms_norm_silu(x: Tensor, bias: Tensor | None, weight: Tensor, past: Tensor | None, lead: int) -> Tensor:
    """Normalize `[B, T, S, C]` to `[B, lead + T, S, C]`."""
    batch, frames, positions, channels = x.shape
    old = 0 if past is None else past.shape[1]
    out = torch.empty((batch, lead + frames, positions, channels), dtype=x.dtype, device=x.device)
    block = _block(channels)
    rows = max(_ELEMENTS // block, 1)
    _rms_norm_silu(
        (triton.cdiv((lead + frames) * positions, rows), batch, 1),
        (x, bias, weight, past, out),
        (frames * positions, old * positions, (lead - old) * positions),
        (channels, block, rows),
        (_WARPS, 1),
        (x.dtype, None if bias is None else bias.dtype, weight.dtype, past is None),
    )
    return out


def add_bias(total: Tensor, x: Tensor, bias: Tensor) -> None:
    """Add `[M, C]` and `[C]` to `[M, C]`."""
    rows, channels = total.shape
    block = _block(channels)
    at_once = max(_ELEMENTS // block, 1)
    grid = (triton.cdiv(rows, at_once), 1, 1)
    _add_bias(grid, (total, x, bias), (rows,), (channels, block, at_once), (_WARPS, 1), (total.dtype, bias.dtype))
