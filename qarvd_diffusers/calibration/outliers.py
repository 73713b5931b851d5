"""Find the outlier input channels of a linear layer.

`find_outliers` looks at the weight alone (arXiv 2605.21072, part S2), `min_noise_split` also at the range of each
input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import qarvd_kernels as ops

from ..config import Recipe

DEFAULT = Recipe()
Z_THRESHOLD = 3.5  # modified z-score above which a column is an outlier (Iglewicz and Hoaglin)
NORMAL_CONSISTENCY = 0.6745  # MAD of a standard normal distribution
MEDIAN_RATIO = 1.2  # an outlier is also this much above the median
IQR_RATIO = 1.5
ZERO_MAD = 1e-8
BALANCE = 3.0  # factor by which a channel's scale differs from the others' before it is changed
DEAD = 1e-3  # of the median magnitude: a channel below it was not seen in use
WORTHWHILE = 0.9  # a split must reduce the expected noise at least to this share


@dataclass(frozen=True)
class OutlierSet:
    """Name the input channels that are outliers, and say what is done about them.

    They are isolated as a group of their own; or, where tokens have their own scales, they are scaled like the others
    and blocks of channels are rotated.

    Attributes:
        channel_order: int32 `[K]` permutation, outliers first; ascending without outliers.
        num_outliers: how many of them lead.
        threshold: column norm above which a channel counted as an outlier, before rounding up and capping.
        channel_scale: float32 `[K]` by which inputs are multiplied, and columns of weights divided; None is 1.
        rotation: channels of the blocks that are rotated after that; 1 rotates nothing.
    """

    channel_order: Tensor
    num_outliers: int
    threshold: float
    channel_scale: Tensor | None = None
    rotation: int = 1

    def arrange_inputs(self, x: Tensor) -> Tensor:
        """Bring inputs `[..., K]` into the form that is quantized; float32 unless channels are only reordered."""
        if self.channel_scale is None:
            return x.index_select(-1, self.channel_order.to(x.device))
        return ops.rotate(x * self.channel_scale.to(x.device), self.rotation)

    def arrange_weight(self, weight: Tensor) -> Tensor:
        """Bring a weight `[N, K]` into the form that is quantized, float32: its product with the inputs stays."""
        weight = weight.to(torch.float32)
        if self.channel_scale is None:
            return weight.index_select(-1, self.channel_order.to(weight.device))
        return ops.rotate(weight / self.channel_scale.to(weight.device), self.rotation)


def column_norms(weights: Sequence[Tensor]) -> Tensor:
    """Compute the L2 norm of each input channel over the rows of all weights `[N_i, K]`, float32 `[K]`."""
    squares = [weight.detach().to(torch.float32).norm(dim=0).square() for weight in weights]
    return squares[0].sqrt() if len(squares) == 1 else torch.stack(squares).sum(0).sqrt()


def outlier_threshold(norms: Tensor, method: str, mad_floor: float | None = Recipe.mad_floor) -> float | None:
    """Compute the norm strictly above which a channel is an outlier.

    Args:
        norms: float32 `[K]`.
        method: `mad_zscore`: `median + 3.5 MAD / 0.6745`; `iqr`: `q3 + 1.5 (q3 - q1)`; either at least 1.2 medians.
        mad_floor: smallest MAD, as a share of the median; None finds no outliers where the MAD is zero.

    Returns:
        the threshold, or None where the method finds no outliers.

    Raises:
        ValueError: another method.
    """
    if method == "none":
        return None
    median = norms.quantile(0.5)
    if method == "mad_zscore":
        mad = (norms - median).abs().quantile(0.5)
        if mad_floor is not None:
            mad = torch.maximum(mad, mad_floor * median)
        elif mad < ZERO_MAD:
            return None
        limit = median + Z_THRESHOLD * mad / NORMAL_CONSISTENCY
    elif method == "iqr":
        q1, q3 = norms.quantile(0.25), norms.quantile(0.75)
        limit = q3 + IQR_RATIO * (q3 - q1)
    else:
        raise ValueError(f"outlier method is {method!r}, expected 'mad_zscore', 'iqr' or 'none'")
    return max(limit.item(), (MEDIAN_RATIO * median).item())


def aligned_count(count: int, alignment: int, in_features: int) -> int:
    """Round up to a multiple of `alignment`, then cap at half the channels (the cap wins; 0 stays 0)."""
    return min(-(-count // alignment) * alignment, in_features // 2)


def find_outliers(
    weights: Sequence[Tensor], method: str, alignment: int = 1, recipe: Recipe = DEFAULT, at_least: int = 0
) -> OutlierSet:
    """Find the outlier channels that several weights share, those of layers that read one tensor.

    Args:
        weights: floats `[N_i, K]`, finite.
        method: `mad_zscore`, `iqr` or `none`.
        alignment: the count is rounded up to a multiple, taking the next largest norms, and capped at K // 2.
        recipe: its `mad_floor` and `ordered_groups`.
        at_least: lower bound of the count, before rounding and capping.
    """
    norms = column_norms(weights)
    threshold = outlier_threshold(norms, method, recipe.mad_floor)
    above = 0 if threshold is None else int((norms > threshold).sum())
    count = aligned_count(max(above, at_least), alignment, norms.numel())
    if count == 0:
        order = torch.arange(norms.numel(), device=norms.device)
    else:
        ascending = norms.argsort(stable=True)
        outlier, normal = ascending[-count:], ascending[:-count]
        if recipe.ordered_groups:  # neighbours stay neighbours, which keeps the gather of activations local
            outlier, normal = outlier.sort().values, normal.sort().values
        order = torch.cat([outlier, normal])
    return OutlierSet(order.to(torch.int32), count, 0.0 if threshold is None else threshold)


def min_noise_split(
    weights: Sequence[Tensor], low: Tensor, high: Tensor, alignment: int = 1, at_least: int = 0
) -> OutlierSet:
    """Split channels in the two groups that give a static input quantizer the smallest expected output error.

    Rounding channel j to multiples of a step s adds `s^2 / 12 * ||W[:, j]||^2` to the squared output error, and the
    step of a group is the range of its channels over 255. Two orders of channels are tried, by magnitude of the input
    and by weight norm, with every aligned count up to half of the channels.

    Args:
        weights: floats `[N_i, K]` of layers that read the same tensor.
        low, high: float `[K]`, smallest and largest value of every channel.
        alignment: counts are multiples of this (and capped at K // 2).
        at_least: smallest count to try, before rounding and capping.
    """
    norms = column_norms(weights)
    low, high = (bound.to(norms.device, torch.float32) for bound in (low.clamp(max=0), high.clamp(min=0)))
    size = norms.numel()
    counts = sorted({aligned_count(n, alignment, size) for n in range(at_least, size // 2 + alignment, alignment)})
    candidates = []
    for key in (torch.maximum(high, -low), norms):
        order = key.argsort(descending=True, stable=True)
        noise = _rounding_noise(low[order], high[order], norms[order].square())
        noise[0] *= WORTHWHILE
        count = min(counts, key=lambda n: noise[n])
        candidates.append((noise[count], count, order))
    _, count, order = min(candidates, key=lambda candidate: candidate[0])
    parts = order[:count].sort().values, order[count:].sort().values  # neighbours stay neighbours
    return OutlierSet(torch.cat(parts).to(torch.int32), count, 0.0)


def balanced(weights: Sequence[Tensor], magnitudes: Tensor | None, rotation: int) -> OutlierSet:
    """Scale the outliers among channels that are quantized with a scale per token, and rotate blocks of them.

    With inputs of root mean square x[k] and weight columns of norm w[k], rotated quantization errors of inputs and of
    weights are both proportional to `sum (x s)^2 * sum (w / s)^2`, least for `s = sqrt(w / x)`. Only channels that
    are out by more than `BALANCE` are scaled: the others differ by what a few prompts happen to hold.

    Args:
        weights: floats `[N_i, K]`, finite, of layers that read one tensor.
        magnitudes: float `[K]`, root mean squares of the channels; None takes all as equal.
        rotation: channels of a block.
    """
    norms = column_norms(weights)
    if magnitudes is None:
        magnitudes = torch.ones_like(norms)
    magnitudes = magnitudes.to(norms.device, torch.float32)
    usual = magnitudes.median()
    magnitudes = torch.where(magnitudes > DEAD * usual, magnitudes, usual)
    scale = (norms / magnitudes).sqrt()
    scale = scale / scale.median()
    out = scale.isfinite() & (scale > 0) & ((scale > BALANCE) | (scale < 1 / BALANCE))
    order = torch.arange(norms.numel(), device=norms.device, dtype=torch.int32)
    return OutlierSet(order, 0, 0.0, torch.where(out, scale, torch.ones_like(scale)), rotation)


def _rounding_noise(low: Tensor, high: Tensor, gains: Tensor) -> list[float]:
    """Compute the expected error, up to a factor, with the first 0, 1, ... K channels in a group of their own."""

    def leading(low: Tensor, high: Tensor, gains: Tensor) -> Tensor:
        noise = (high.cummax(0).values - low.cummin(0).values).double().square() * gains.double().cumsum(0)
        return torch.cat([noise.new_zeros(1), noise])

    return (leading(low, high, gains) + leading(low.flip(0), high.flip(0), gains.flip(0)).flip(0)).tolist()
