"""LayerNorm, modulation and gated residual that end in int8 codes, on Hopper GPUs; what they compute: `ops.norm`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rows import launch, refuses  # noqa: F401  (`refuses` is looked up here)


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """16-bit `[M, C]` -> int8 `[M, C]`, permuted."""
    return launch(x, None, None, *arguments)[1]


def add_norm_quantize(x: Tensor, y: Tensor, gate: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The gated sum in the dtype of x, and int8 `[M, C]` of its norm."""
    return launch(x, y, gate, *arguments)
