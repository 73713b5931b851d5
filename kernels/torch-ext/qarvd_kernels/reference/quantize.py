"""Reference implementations of `ops.quantize`."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import CODE_OFFSET, DYNAMIC_LEVELS, group_slices, spread


def quantize_static(
    x: Tensor, channel_order: Tensor, num_outliers: int, input_scale: Tensor, input_zero_point: Tensor
) -> Tensor:
    """Quantize float `[..., K]` to int8 `[..., K]`, permuted: `clamp(round(x / scale) + zero_point, 0, 255) - 128`."""
    k = x.shape[-1]
    permuted = x.index_select(-1, channel_order).to(torch.float32)
    scale = spread(input_scale, k, num_outliers)
    zero_point = spread(input_zero_point, k, num_outliers)
    codes = permuted.div_(scale).round_().add_(zero_point).clamp_(0, 255)
    return codes.sub_(CODE_OFFSET).to(torch.int8)


def quantize_dynamic(x: Tensor, channel_order: Tensor, num_outliers: int) -> tuple[Tensor, Tensor]:
    """Quantize float `[..., K]` to int8 `[..., K]`, permuted, with scales `[..., 2]`: largest magnitude / 127.

    A group that is empty or all zero has scale 1.
    """
    k = x.shape[-1]
    permuted = x.index_select(-1, channel_order).to(torch.float32)
    groups = [permuted[..., part] for part in group_slices(k, num_outliers)]
    amax = [g.abs().amax(-1) if g.shape[-1] else g.new_zeros(g.shape[:-1]) for g in groups]
    scale = torch.stack(amax, dim=-1) / DYNAMIC_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    codes = permuted.div_(spread(scale, k, num_outliers)).round_().clamp_(-DYNAMIC_LEVELS, DYNAMIC_LEVELS)
    return codes.to(torch.int8), scale


def rotate(x: Tensor, block: int) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard transform to blocks of neighbouring channels `[..., K]`, in float32."""
    x = x.to(torch.float32)
    shape, half = x.shape, 1
    while half < block:
        a, b = x.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).reshape(shape)
        half *= 2
    return x * block**-0.5 if block > 1 else x


def quantize_rows(x: Tensor, channel_scale: Tensor, rotation: int) -> tuple[Tensor, Tensor]:
    """Scale, rotate and quantize float `[..., K]` to int8 `[..., K]`, with scales `[...]`: largest magnitude / 127."""
    x = rotate(x.to(torch.float32) * channel_scale, rotation)
    scale = x.abs().amax(-1) / DYNAMIC_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    codes = (x / scale[..., None]).round_().clamp_(-DYNAMIC_LEVELS, DYNAMIC_LEVELS)
    return codes.to(torch.int8), scale


def row_sums(a: Tensor, num_outliers: int) -> Tensor:
    """Sum both groups of int8 `[M, K]` to int32 `[M, 2]`."""
    parts = [a[:, part].sum(dim=1, dtype=torch.int32) for part in group_slices(a.shape[1], num_outliers)]
    return torch.stack(parts, dim=1)
