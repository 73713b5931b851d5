"""Normalize over the channels of channels-last video, for the convolutions of Wan's VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..declare import operator


@operator()
def rms_norm_silu(x: Tensor, bias: Tensor | None, weight: Tensor, past: Tensor | None, lead: int) -> Tensor:
    """Apply RMS norm over C to `x + bias` in float32, times `weight`, then SiLU; prepend cached frames.

    The result is the whole input of a causal convolution: the frames that it keeps of earlier calls, then the
    activation.

    Args:
        x: float `[B, T, S, C]`, S positions of T frames.
        bias: `[C]`, any float dtype, or None for 0: the bias of the preceding convolution.
        weight: `[C]`, any float dtype.
        past: `[B, P, S, C]` in the dtype of x, copied directly before the first frame; None for P = 0.
        lead: number of frames before the activation, at least P; those before `past` are zero.

    Returns:
        `[B, lead + T, S, C]` in the dtype of x. A row of zeros stays zero.

    Raises:
        ValueError: a shape, dtype or count does not fit.
    """
    checks.require(x.is_floating_point() and x.ndim == 4, "x", f"{x.dtype} {tuple(x.shape)}", "float [B, T, S, C]")
    for name, table in (("bias", bias), ("weight", weight)):
        if table is not None:
            checks.tensor(name, table, (x.shape[3],), table.dtype)
    frames = 0
    if past is not None:
        frames = past.shape[1]
        checks.tensor("past", past, (x.shape[0], frames, *x.shape[2:]), x.dtype)
    checks.require(lead >= frames, "lead", lead, f"at least the {frames} frames of past")
    return torch.empty((x.shape[0], lead + x.shape[1], *x.shape[2:]), dtype=x.dtype, device=x.device)


@operator(mutates=["total"])
def add_bias(total: Tensor, x: Tensor, bias: Tensor) -> None:
    """Add `x + bias` to `total` in place, computed in float32: a residual sum.

    Args:
        total: float `[M, C]`, contiguous for compiled implementations.
        x: like `total`.
        bias: `[C]`, any float dtype: the bias of the convolution that produced x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    good = total.is_floating_point() and total.ndim == 2
    checks.require(good, "total", f"{total.dtype} {tuple(total.shape)}", "float [M, C]")
    checks.tensor("x", x, tuple(total.shape), total.dtype)
    checks.tensor("bias", bias, (total.shape[1],), bias.dtype)
