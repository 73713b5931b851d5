"""Observe the tensors that a layer reads, and compute its activation quantizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import ACTIVATION_BITS
from .outliers import OutlierSet
from .processes import Processes
from .ranges import RangeHistogram, search_samples


class InputObserver:
    """Observe one input tensor of one or more tied layers; a range per group (0 outliers, 1 normal channels).

    Memory is fixed: two histograms, whatever the number and size of the tensors.
    """

    def __init__(self, outliers: OutlierSet) -> None:
        self.outliers = outliers
        self._histograms: list[RangeHistogram | None] = [None, None]

    def add(self, x: Tensor, weight: float) -> None:
        """Record one call.

        Args:
            x: float `[batch, ..., K]` (`[tokens, K]` counts as one sample), finite.
            weight: weight of the chunk the call belongs to.
        """
        samples = x.shape[0] if x.ndim > 2 else 1
        for g, part in enumerate(self._split(x)):
            if part.numel():
                if self._histograms[g] is None:
                    self._histograms[g] = RangeHistogram(x.device)
                self._histograms[g].add(part, weight, samples)

    def join(self, processes: Processes) -> None:
        """Add what the other processes have observed."""
        order, outliers = self.outliers.channel_order, self.outliers.num_outliers
        for g, size in enumerate((outliers, order.numel() - outliers)):
            if size:
                self._histograms[g] = self._histograms[g] or RangeHistogram(
                    order.device
                )  # where this process observed nothing
                self._histograms[g].join(processes)

    def quantizer(self, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Compute float32 `[2]` scale and int32 `[2]` zero-point, on the CPU; an empty group gets 1 and 0."""
        qparams = [
            (torch.ones(()), torch.zeros(())) if histogram is None else histogram.search(ACTIVATION_BITS, percentiles)
            for histogram in self._histograms
        ]
        return _stack(qparams)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        order = self.outliers.channel_order.to(x.device)
        return x.detach().index_select(-1, order).tensor_split([self.outliers.num_outliers], dim=-1)


class ReferenceObserver(InputObserver):
    """Keep every tensor and search as the reference implementation does: memory grows with the rollout.

    Layers with outliers weigh all chunks alike, and zero-points are not clamped.
    """

    def __init__(self, outliers: OutlierSet) -> None:
        super().__init__(outliers)
        self._samples: list[Tensor] = []
        self._weights: list[float] = []

    def add(self, x: Tensor, weight: float) -> None:
        """Keep the input of one call."""
        samples = x.detach().to("cpu", torch.float32)
        samples = samples if x.ndim > 2 else samples[None]
        self._samples.append(samples)
        self._weights.extend([1.0 if self.outliers.num_outliers else weight] * len(samples))

    def join(self, processes: Processes) -> None:
        """Add the inputs that the other processes have kept."""
        self._samples = [sample for samples in processes.gather(self._samples) for sample in samples]
        self._weights = [weight for weights in processes.gather(self._weights) for weight in weights]

    def quantizer(self, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Search both ranges over all samples; see `InputObserver.quantizer`."""
        weights = torch.tensor(self._weights)
        qparams = [
            search_samples(part, weights, ACTIVATION_BITS, percentiles, clamp=False)
            if part.numel()
            else (torch.ones(()), torch.zeros(()))
            for part in self._split(torch.cat(self._samples))
        ]
        return _stack(qparams)


# `Recipe.observer`.
OBSERVERS: dict[str, type[InputObserver]] = {"histogram": InputObserver, "samples": ReferenceObserver}


def _stack(qparams: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    scale, zero_point = zip(*qparams, strict=True)
    return torch.stack(scale).to(torch.float32), torch.stack(zero_point).to(torch.int32)
