"""Static quantization with a permutation, on Hopper GPUs; what it computes: `ops.quantize`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rows import NO_NORM, launch, refuses  # noqa: F401  (`refuses` is looked up here)


def quantize_static(x: Tensor, *quantizer: Any) -> Tensor:
    """16-bit `[..., K]` -> int8 `[..., K]`, permuted."""
    return launch(x, None, None, *NO_NORM, *quantizer)[1]
