"""Outlier input channels of a linear layer.

`find_outliers` looks at the weight alone (arXiv 2605.21072, part S2), `quietest_split` also at how far each channel of the
input extends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z_THRESHOLD = 3.5  # modified z-score above which a column is an outlier (Iglewicz and Hoaglin)
NORMAL_CONSISTENCY = 0.6745  # MAD of a standard normal distribution
MEDIAN_RATIO = 1.2  # an outlier is also this much above the median
IQR_RATIO = 1.5
# Where most norms are equal the MAD is zero and every deviation infinite; this share of the median stands in for it.
MAD_FLOOR = 1e-3
REFERENCE_MIN_MAD = 1e-8
WORTHWHILE = 0.9  # a split that saves less of the expected noise is not made


@dataclass(frozen=True)
class OutlierSet:
    """Which input channels are outliers.

    Attributes:
        channel_order: int32 `[K]` permutation, outliers first; ascending without outliers.
        num_outliers: how many of them lead.
        threshold: column norm above which a channel counted as an outlier, before rounding up and capping.
    """

    channel_order: Tensor
    num_outliers: int
    threshold: float


def column_norms(weights: Sequence[Tensor]) -> Tensor:
    """L2 norm per input channel over all rows of the stacked weights, float32 `[K]`, each weight `[N_i, K]`."""
    squares = [weight.detach().to(torch.float32).norm(dim=0).square() for weight in weights]
    return squares[0].sqrt() if len(squares) == 1 else torch.stack(squares).sum(0).sqrt()


def outlier_threshold(norms: Tensor, method: str, reference_compat: bool = False) -> float | None:
    """Norm strictly above which a channel is an outlier.

    Args:
        norms: float32 `[K]`.
        method: `mad_zscore`: `median + 3.5 MAD / 0.6745`; `iqr`: `q3 + 1.5 (q3 - q1)`; either at least 1.2 medians.
        reference_compat: give up where the MAD is zero, as the reference implementation does.

    Returns:
        the threshold, or None where the method looks for none.
    """
    if method == "none":
        return None
    median = norms.quantile(0.5)
    if method == "mad_zscore":
        mad = (norms - median).abs().quantile(0.5)
        if reference_compat and mad < REFERENCE_MIN_MAD:
            return None
        if not reference_compat:
            mad = torch.maximum(mad, MAD_FLOOR * median)
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
    weights: Sequence[Tensor], method: str, alignment: int = 1, reference_compat: bool = False, at_least: int = 0
) -> OutlierSet:
    """Outlier channels shared by all the given weights (layers that read one tensor are given together).

    Args:
        weights: floats `[N_i, K]`, finite.
        method: `mad_zscore`, `iqr` or `none`.
        alignment: the count is rounded up to a multiple, taking the next largest norms, and capped at K // 2.
        reference_compat: order within the groups by ascending norm (default: by channel), and see `outlier_threshold`.
        at_least: lower bound of the count, before rounding and capping.
    """
    norms = column_norms(weights)
    threshold = outlier_threshold(norms, method, reference_compat)
    found = 0 if threshold is None else int((norms > threshold).sum())
    count = aligned_count(max(found, at_least), alignment, norms.numel())
    if count == 0:
        order = torch.arange(norms.numel(), device=norms.device)
    else:
        ascending = norms.argsort(stable=True)
        outlier, normal = ascending[-count:], ascending[:-count]
        if not reference_compat:  # neighbours stay neighbours, which keeps the gather of activations local
            outlier, normal = outlier.sort().values, normal.sort().values
        order = torch.cat([outlier, normal])
    return OutlierSet(order.to(torch.int32), count, 0.0 if threshold is None else threshold)


def quietest_split(
    weights: Sequence[Tensor], low: Tensor, high: Tensor, alignment: int = 1, at_least: int = 0
) -> OutlierSet:
    """The split of channels in two groups that promises the least output error of a static quantizer of the input.

    Rounding channel j to multiples of a step s adds `s^2 / 12 * ||W[:, j]||^2` to the squared output error, and the step of
    a group is the range of its channels over 255. Two orders of channels are tried, by magnitude of the input and by weight
    norm, with every aligned count up to half of the channels.

    Args:
        weights: floats `[N_i, K]` of layers that read the same tensor.
        low, high: float `[K]`, smallest and largest value of every channel.
        alignment: counts are multiples of this (and capped at K // 2).
        at_least: smallest count to try, before rounding and capping.
    """
    norms = column_norms(weights)
    low, high = (each.to(norms.device, torch.float32) for each in (low.clamp(max=0), high.clamp(min=0)))
    size = norms.numel()
    counts = sorted({aligned_count(n, alignment, size) for n in range(at_least, size // 2 + alignment, alignment)})
    found = []
    for key in (torch.maximum(high, -low), norms):
        order = key.argsort(descending=True, stable=True)
        noise = _rounding_noise(low[order], high[order], norms[order].square())
        noise[0] *= WORTHWHILE
        count = min(counts, key=lambda n: noise[n])
        found.append((noise[count], count, order))
    _, count, order = min(found, key=lambda candidate: candidate[0])
    parts = order[:count].sort().values, order[count:].sort().values  # neighbours stay neighbours
    return OutlierSet(torch.cat(parts).to(torch.int32), count, 0.0)


def _rounding_noise(low: Tensor, high: Tensor, gains: Tensor) -> list[float]:
    """Expected error, up to a factor, with the first 0, 1, ... K channels in a group of their own."""

    def leading(low: Tensor, high: Tensor, gains: Tensor) -> Tensor:
        noise = (high.cummax(0).values - low.cummin(0).values).double().square() * gains.double().cumsum(0)
        return torch.cat([noise.new_zeros(1), noise])

    return (leading(low, high, gains) + leading(low.flip(0), high.flip(0), gains.flip(0)).flip(0)).tolist()
