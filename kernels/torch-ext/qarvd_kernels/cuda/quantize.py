"""Run the quantizers of `ops.quantize` on Hopper GPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rows import NO_NORM, launch, launch_rows, unsupported_reason  # noqa: F401  (`unsupported_reason` is looked up here)


def quantize_static(x: Tensor, *quantizer: Any) -> Tensor:
    """Quantize 16-bit `[..., K]` to int8 `[..., K]`, permuted."""
    return launch(x, None, None, (*NO_NORM, *quantizer))


def quantize_rows(x: Tensor, *quantizer: Any) -> tuple[Tensor, Tensor]:
    """Rotate and quantize 16-bit `[..., K]` to int8 `[..., K]`, with scales `[...]`."""
    return launch_rows(x, None, None, (*NO_NORM, *quantizer))
