"""Reference implementations of `ops.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention_backends import attention
from ..ops.attention import KEY_TILE

QUERY_LEVELS, WEIGHT_LEVELS = 127, 255
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm over the last dimension in float32."""
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to interleaved pairs of `[B, T, H, D]`; cos and sin `[T, D / 2]`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def per_channel(scale: Tensor) -> Tensor:
    """Reshape scales `[H]` or `[B, H]` to broadcast over `[B, T, H, D]`."""
    return scale[..., None, :, None]


def to_cache(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convert float32 `[B, T, H, D]` to the dtype of a cache with scales `[H]` or `[B, H]`."""
    if scale is None:
        return x.to(dtype)
    x = x / per_channel(scale)
    if dtype == torch.int8:
        return x.round().clamp(-QUERY_LEVELS, QUERY_LEVELS).to(dtype)
    return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(dtype)


def qk_norm_rope_append(qkv: Tensor, *arguments: Any) -> Tensor:
    """Return q `[B, T, H, D]`, normalized and rotated; write k, treated likewise, and v into the caches."""
    q_weight, k_weight, eps, cos, sin, key_cache, value_cache, query_scale, *scales, start = arguments
    key_scale, value_scale = scales
    heads = (-1, key_cache.shape[3])
    query, key, value = qkv.chunk(3, dim=-1)
    query = rotate(rms_norm(query, q_weight, eps).unflatten(-1, heads), cos, sin)
    key = rotate(rms_norm(key, k_weight, eps).unflatten(-1, heads), cos, sin)
    stop = start + qkv.shape[1]
    key_cache[:, start:stop] = to_cache(key, key_scale, key_cache.dtype)
    value_cache[:, start:stop] = to_cache(value.unflatten(-1, heads).float(), value_scale, value_cache.dtype)
    return to_cache(query, query_scale, qkv.dtype if query_scale is None else key_cache.dtype)


def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor, length: int
) -> Tensor:
    """Return `[B, T, H, D]`, tile by tile; float32 sums these integers exactly."""
    rows = query.to(torch.float32)
    scale = rows.abs().amax(-1, keepdim=True) / QUERY_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    codes = (rows / scale).round().clamp(-QUERY_LEVELS, QUERY_LEVELS)
    factor = scale.movedim(1, 2) * (key_scale * query.shape[3] ** -0.5)[..., None, None]  # [B, H, T, 1]
    peak = torch.full_like(factor, -torch.inf)
    total, weights = torch.zeros_like(codes.movedim(1, 2)), torch.zeros_like(factor)
    for start in range(0, length, KEY_TILE):
        tile = slice(start, min(start + KEY_TILE, length))
        scores = torch.einsum("bthd,bshd->bhts", codes, key[:, tile].to(torch.float32))
        largest = scores.amax(-1, keepdim=True)
        levels = (WEIGHT_LEVELS * ((scores - largest) * factor).exp()).round()
        new_peak = torch.maximum(peak, largest * factor)
        fade, share = (peak - new_peak).exp(), (largest * factor - new_peak).exp()
        total = fade * total + share * torch.einsum("bhts,bshd->bhtd", levels, value[:, tile].to(torch.float32))
        weights = fade * weights + share * levels.sum(-1, keepdim=True)
        peak = new_peak
    out = (total / weights).movedim(1, 2) * per_channel(value_scale)
    return out.to(query.dtype).contiguous()


def attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: int,
) -> Tensor:
    """Return bfloat16 `[B, T, H, D]`: 16-bit attention on the dequantized tensors."""
    pairs = ((query, query_scale), (key[:, :length], key_scale), (value[:, :length], value_scale))
    return attention(*((x.float() * per_channel(scale)).to(torch.bfloat16) for x, scale in pairs)).contiguous()
