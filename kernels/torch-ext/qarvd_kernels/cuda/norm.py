"""Run the quantizing operators of `ops.norm` on Hopper GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rows import launch, launch_rows, unsupported_reason  # noqa: F401  (`unsupported_reason` is looked up here)


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """Normalize and quantize 16-bit `[M, C]` to int8 `[M, C]`, permuted."""
    return launch(x, None, None, arguments)


def add_norm_quantize(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gated sum in the dtype of x, and int8 codes `[M, C]` of its norm."""
    total = torch.empty_like(x)
    return total, launch(x, y, gate, arguments, total)


def add_norm_quantize_(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> Tensor:
    """Replace x by the gated sum, and return int8 codes `[M, C]` of its norm."""
    return launch(x, y, gate, arguments, total=x)


def norm_quantize_rows(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Normalize, rotate and quantize 16-bit `[M, C]` to int8 `[M, C]`, with scales `[M]`."""
    return launch_rows(x, None, None, arguments)


def add_norm_quantize_rows_(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Replace x by the gated sum, and return codes and scales of its norm."""
    return launch_rows(x, y, gate, arguments, total=x)
