"""Reference implementations of `ops.channel_norm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm_silu(x: Tensor, bias: Tensor | None, weight: Tensor, past: Tensor | None, lead: int) -> Tensor:
    """Normalize `[B, T, S, C]` to `[B, lead + T, S, C]`."""
    out = x.new_zeros(x.shape[0], lead + x.shape[1], *x.shape[2:])
    if past is not None:
        out[:, lead - past.shape[1] : lead] = past
    value = x.to(torch.float32) if bias is None else x.to(torch.float32) + bias.to(torch.float32)
    normed = F.normalize(value, dim=-1) * x.shape[-1] ** 0.5 * weight.to(torch.float32)
    out[:, lead:] = F.silu(normed)
    return out


def add_bias(total: Tensor, x: Tensor, bias: Tensor) -> None:
    """Add `[M, C]` and `[C]` to `[M, C]`."""
    total.copy_(total.to(torch.float32) + x.to(torch.float32) + bias.to(torch.float32))
