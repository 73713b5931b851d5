"""Run FlashAttention-3: 16-bit attention, and 8-bit attention for caches with channels innermost."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import takes_strides


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    """Return why FlashAttention-3 cannot run on this device, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    try:
        importlib.import_module("fa3_fwd._C")
    except ImportError as error:
        return f"the package fa3-fwd is not usable ({error}); pip install fa3-fwd"
    return None


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    return unavailable_reason(device)


def forward(query: Tensor, key: Tensor, value: Tensor, scales: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Compute attention of `[B, T, H, D]` to `[B, S, H, D]`; `scales` are `[H]` or `[B, H]` of 8-bit q, k, v."""
    names = ("q_descale", "k_descale", "v_descale")
    descale = dict(zip(names, (scale.expand(query.shape[0], -1) for scale in scales or ()), strict=False))
    splits = 0 if scales else 1  # 0 lets it choose, which gains 2 to 4 % in 8 bits
    scale = query.shape[-1] ** -0.5
    return torch.ops.fa3_fwd.fwd(query, key, value, softmax_scale=scale, num_splits=splits, **descale)[0]


@takes_strides
def attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: int,
) -> Tensor:
    """Return bfloat16 `[B, T, H, D]`."""
    return forward(query, key[:, :length], value[:, :length], (query_scale, key_scale, value_scale))
