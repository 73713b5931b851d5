"""Search the interval of values that the integer codes cover.

Weights: per output row and group, best of a few percentiles by squared error. Activations: per tensor and group, best
of the same percentiles by the squared error weighted by the chunk a sample belongs to (arXiv 2605.21072, parts S1 and
S2).

An activation is observed once and not kept: `RangeHistogram` holds all that the search needs in fixed memory, because
the weighted error is linear in the histogram. `search_samples` needs every sample at once and is the reference's
procedure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..quantization import affine as P
from .processes import Processes

REFERENCE_BINS = 32768


def _best(scored: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Choose the pair with the strictly lowest score among `(score, scale, zero_point)`, element by element."""
    scored = iter(scored)
    best, scale, zero_point = next(scored)
    for score, s, z in scored:
        better = score < best
        best, scale, zero_point = (
            torch.where(better, new, old) for new, old in ((score, best), (s, scale), (z, zero_point))
        )
    return scale, zero_point


def search_rows(
    x: Tensor, bits: int, percentiles: Sequence[float], *, symmetric: bool = False, clamp: bool = True
) -> tuple[Tensor, Tensor]:
    """Search the range of each row.

    Args:
        x: float32 `[N, K]`; K may be 0.
        bits, symmetric, clamp: see `affine.affine_qparams`.
        percentiles: candidates, in order of preference on equal error.

    Returns:
        float32 scale and zero-point, `[N, 1]` each.
    """
    if x.shape[1] == 0:
        nothing = x.new_zeros(x.shape[0], 1)
        return P.affine_qparams(nothing, nothing, bits, symmetric=symmetric)

    def candidates():
        """Yield error, scale and zero-point of each percentile."""
        for low, high in P.percentile_ranges(x, tuple(percentiles)):
            scale, zero_point = P.affine_qparams(low, high, bits, symmetric=symmetric, clamp=clamp)
            yield P.mean_squared_error(x, P.fake_quantize(x, scale, zero_point, bits)), scale, zero_point

    return _best(candidates())


def search_samples(
    samples: Tensor, weights: Tensor, bits: int, percentiles: Sequence[float], *, clamp: bool = True
) -> tuple[Tensor, Tensor]:
    """Search the range of one tensor over all its samples, as the reference implementation does.

    Args:
        samples: float32 `[S, ...]`, at least one value.
        weights: float32 `[S]`, weight of each sample's mean squared error.

    Returns:
        float32 scale and zero-point, scalars.
    """
    x_min, x_max = samples.min(), samples.max()
    width = (x_max - x_min) / REFERENCE_BINS
    if width <= 0:  # a constant tensor has no histogram
        return P.affine_qparams(x_min, x_max, bits, clamp=clamp)
    counts = torch.histc(samples, REFERENCE_BINS, x_min.item(), x_max.item())
    cdf = counts.to(torch.float64).cumsum(0) / counts.sum(dtype=torch.float64)

    def candidates():
        """Yield error, scale and zero-point of each percentile."""
        for p in percentiles:
            first, last = (int(torch.searchsorted(cdf, q).clamp(max=REFERENCE_BINS - 1)) for q in (1 - p, p))
            low, high = (x_min + (i + 0.5) * width for i in (first, last))
            scale, zero_point = P.affine_qparams(low, high, bits, clamp=clamp)
            errors = [P.mean_squared_error(s, P.fake_quantize(s, scale, zero_point, bits)) for s in rows]
            yield (torch.cat(errors).flatten() * weights).mean(), scale, zero_point

    rows = [sample.reshape(1, -1) for sample in samples]
    return _best(candidates())


class RangeHistogram:
    """Count a stream of samples of one tensor in fixed memory, whatever their number and size.

    Bins are `width` wide, a power of two, and aligned to multiples of it: growing the covered interval doubles the
    width and merges neighbours, which loses nothing, so the result does not depend on the order of the samples. At
    least half of the bins lie inside the range of the data.
    """

    BINS = 2 * REFERENCE_BINS

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64, device=device)
        self.weighted = torch.zeros(self.BINS, dtype=torch.float64, device=device)
        self.samples = 0
        self.low, self.high = math.inf, -math.inf
        self.width, self.start = 0.0, 0  # bin i covers [(start + i) * width, (start + i + 1) * width)

    def add(self, x: Tensor, weight: float, samples: int = 1) -> None:
        """Add `samples` samples of equal size and equal weight.

        Args:
            x: float tensor, finite, at least one value.
            weight: weight of each sample's mean squared error.
            samples: number of samples x holds.
        """
        x = x.detach().to(torch.float32).flatten()
        low, high = (value.item() for value in x.aminmax())
        self._cover(low, high)
        index = (x / self.width).floor_().to(torch.int64).sub_(self.start)  # exact: the width is a power of two
        counts = torch.bincount(index, minlength=self.BINS)
        self.counts += counts
        self.weighted += counts * (weight * samples / x.numel())
        self.samples += samples

    def join(self, processes: Processes) -> None:
        """Add what the other processes have observed; all of them then hold the same."""
        low, high, samples = zip(*processes.gather((self.low, self.high, self.samples)), strict=True)
        if not sum(samples):
            return
        self._cover(min(low), max(high))
        self._cover(self.low, self.high, max(processes.gather(self.width)))
        self.counts, self.weighted = processes.sum(self.counts), processes.sum(self.weighted)
        self.samples = sum(samples)

    def _cover(self, low: float, high: float, width: float = 0.0) -> None:
        """Extend the covered interval, merging bins as needed."""
        low, high, width = min(low, self.low), max(high, self.high), max(width, self.width)
        if not width:
            span = max(high - low, 2.0**-20 * max(abs(low), abs(high)), 2.0**-100)
            width = 2.0 ** math.ceil(math.log2(span / self.BINS))
        while math.floor(high / width) - math.floor(low / width) >= self.BINS:
            width *= 2
        start = math.floor(low / width)
        if self.samples and (width, start) != (self.width, self.start):
            occupied = self.counts.nonzero().flatten()
            merged = min(round(width / self.width), 2**62)  # indices stay far below: more merges nothing further
            index = (occupied + self.start) // merged - start
            for name in ("counts", "weighted"):
                old = getattr(self, name)
                setattr(self, name, torch.zeros_like(old).index_add_(0, index, old[occupied]))
        self.low, self.high, self.width, self.start = low, high, width, start

    def search(self, bits: int, percentiles: Sequence[float], *, clamp: bool = True) -> tuple[Tensor, Tensor]:
        """Search the range with the lowest weighted error; float32 scalars scale and zero-point, on the CPU.

        Raises:
            ValueError: nothing was added.
        """
        if not self.samples:
            raise ValueError("RangeHistogram.search: the histogram is empty, add samples first")
        used = self.counts.nonzero().flatten().cpu()
        counts, weighted = (values.cpu()[used].to(torch.float64) for values in (self.counts, self.weighted))
        centers = ((used + self.start).to(torch.float64) + 0.5) * self.width
        centers = centers.clamp(self.low, self.high).to(torch.float32)
        cdf = counts.cumsum(0) / counts.sum()

        def candidates():
            """Yield error, scale and zero-point of each percentile."""
            for p in percentiles:
                low, high = (centers[int(torch.searchsorted(cdf, q).clamp(max=len(used) - 1))] for q in (1 - p, p))
                scale, zero_point = P.affine_qparams(low, high, bits, clamp=clamp)
                error = (centers - P.fake_quantize(centers, scale, zero_point, bits)).to(torch.float64)
                yield (weighted * error.square()).sum() / self.samples, scale, zero_point

        return _best(candidates())
