"""Run the quantizing operators of `ops.norm` on Hopper GPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rows import launch, unsupported_reason  # noqa: F401  (`unsupported_reason` is looked up here)


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """Normalize and quantize 16-bit `[M, C]` to int8 `[M, C]`, permuted."""
    return launch(x, None, None, arguments)[1]


def add_norm_quantize(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gated sum in the dtype of x, and int8 codes `[M, C]` of its norm."""
    return launch(x, y, gate, arguments)
