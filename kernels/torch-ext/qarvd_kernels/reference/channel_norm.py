"""Normalization over the channels of a channels-last video."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm_silu(x: Tensor, weight: Tensor, past: Tensor | None, lead: int) -> Tensor:
    """`[B, T, S, C]` -> `[B, lead + T, S, C]`."""
    out = x.new_zeros(x.shape[0], lead + x.shape[1], *x.shape[2:])
    if past is not None:
        out[:, lead - past.shape[1] : lead] = past
    normed = F.normalize(x.to(torch.float32), dim=-1) * x.shape[-1] ** 0.5 * weight.to(torch.float32)
    out[:, lead:] = F.silu(normed)
    return out
