"""Reference implementations of `ops.norm`, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.arguments import Norm
from .quantize import quantize_rows, quantize_static


def expand_groups(table: Tensor, rows: int) -> Tensor:
    """Expand `[G, C]` to `[rows, C]`; row m takes entry `m // (rows / G)`."""
    return table.repeat_interleave(rows // table.shape[0], dim=0)


def _sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Compute `x + gate * y` in float32."""
    y = y.to(torch.float32)
    return x.to(torch.float32) + (y if gate is None else expand_groups(gate, x.shape[0]) * y)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """Apply LayerNorm and modulation; return float32 `[M, C]`."""
    normed = F.layer_norm(x.to(torch.float32), x.shape[1:], norm.weight, norm.norm_bias, norm.eps)
    if norm.scale is not None:
        normed = normed * (1 + expand_groups(norm.scale, x.shape[0])) + expand_groups(norm.shift, x.shape[0])
    return normed


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """Normalize, modulate and quantize float `[M, C]` to int8 `[M, C]`, permuted."""
    norm, quantizer = arguments[: len(Norm._fields)], arguments[len(Norm._fields) :]
    return quantize_static(_normed(x, Norm(*norm)), *quantizer)


def add_norm_quantize(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gated sum in the dtype of x, and int8 codes `[M, C]` of its norm."""
    total = x.clone()
    return total, add_norm_quantize_(total, y, gate, *arguments)


def add_norm_quantize_(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> Tensor:
    """Replace x by the gated sum; return int8 codes `[M, C]` of its norm, which is taken before rounding to x."""
    total = _sum(x, y, gate)
    x.copy_(total)
    return norm_quantize(total, *arguments)


def norm_quantize_rows(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Normalize, modulate, rotate and quantize float `[M, C]` to int8 `[M, C]`, with scales `[M]`."""
    norm, quantizer = arguments[: len(Norm._fields)], arguments[len(Norm._fields) :]
    return quantize_rows(_normed(x, Norm(*norm)), *quantizer)


def add_norm_quantize_rows_(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Replace x by the gated sum; return codes and scales of its norm, which is taken before rounding to x."""
    total = _sum(x, y, gate)
    x.copy_(total)
    return norm_quantize_rows(total, *arguments)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Compute `x + gate * y` in the dtype of x."""
    return _sum(x, y, gate).to(x.dtype)


def add_gated_(x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    """Replace x by `x + gate * y`."""
    x.copy_(_sum(x, y, gate))
