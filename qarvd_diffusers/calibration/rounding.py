"""The two ways of rounding that look at data, behind one face: watch the inputs of a group, then choose its codes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import QARVDConfig
from .adaround import AdaRoundSettings, adaround
from .gptq import compensate
from .grid import WeightGrid
from .groups import LayerGroup
from .inputs import InputQuantizer

# Rows of one sample (one pass of one prompt) that AdaRound keeps; a 480p chunk has 4680.
SAMPLE_ROWS = 1024

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss


class Rounded(NamedTuple):
    """uint8 codes `[N, K]` in permuted order, the grid they are on, and the (possibly learned) input quantizer."""

    codes: Tensor
    grid: WeightGrid
    quantizer: InputQuantizer | None


class Rounding(Protocol):
    """Rounds the weights of one group of layers."""

    @staticmethod
    def bytes(channels: int) -> float:
        """What watching a group with so many input channels takes on the device."""

    @staticmethod
    def steps(config: QARVDConfig) -> int:
        """How often `solve` calls `on_step`."""

    def add(self, x: Tensor, weight: float) -> None:
        """Record one call: x `[batch, ..., K]` as the layers read it, weight of the chunk it belongs to."""

    def solve(self, grid: WeightGrid, on_step: OnStep) -> Rounded:
        """Choose the codes, starting from the given grid."""


class CompensatedRounding:
    """Closed form, from the second moments of the quantized inputs: fixed memory, `K * K` floats."""

    def __init__(self, group: LayerGroup, config: QARVDConfig) -> None:
        del config  # nothing to set
        self.group = group
        size = group.outliers.channel_order.numel()
        self.moments = torch.zeros(size, size, device=group.device)

    @staticmethod
    def bytes(channels: int) -> float:
        return 4 * channels**2

    @staticmethod
    def steps(config: QARVDConfig) -> int:
        return 1

    def add(self, x: Tensor, weight: float) -> None:
        x = self.group.permute(x.detach().to(self.moments.device, torch.float32)).flatten(0, -2)
        if self.group.quantizer is not None:
            x = self.group.quantizer(x)
        self.moments.addmm_(x.T, x, alpha=weight)

    def solve(self, grid: WeightGrid, on_step: OnStep) -> Rounded:
        codes, grid = compensate(self.group.weight(), self.moments, grid)
        on_step(1, 1, math.nan)
        return Rounded(codes, grid, self.group.quantizer)


class AdaRounding:
    """Gradient descent on a sample of the inputs, kept in host memory: evenly spaced rows of every pass."""

    def __init__(self, group: LayerGroup, config: QARVDConfig) -> None:
        self.group = group
        self.settings = AdaRoundSettings(config.rounding_iterations)
        self.samples: list[Tensor] = []
        self.weights: list[float] = []
        name = f"{config.calibration_seed} {group.name}".encode()
        self.seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())

    @staticmethod
    def bytes(channels: int) -> float:
        return math.inf  # grows with the rollouts: never more than one block

    @staticmethod
    def steps(config: QARVDConfig) -> int:
        return config.rounding_iterations

    def add(self, x: Tensor, weight: float) -> None:
        for sample in x.detach().flatten(1, -2) if x.ndim > 2 else x.detach()[None]:
            stride = -(-len(sample) // SAMPLE_ROWS)
            rows = self.group.permute(sample[::stride])
            self.samples.append(rows.cpu())
            self.weights.append(weight * len(sample) / len(rows))  # the loss sums over all rows

    def solve(self, grid: WeightGrid, on_step: OnStep) -> Rounded:
        iterations, size = self.settings.iterations, min(self.settings.batch_size, len(self.samples))
        generator = torch.Generator().manual_seed(self.seed)
        batches = torch.stack(
            [torch.randperm(len(self.samples), generator=generator)[:size] for _ in range(iterations)]
        )
        codes, quantizer = adaround(
            self.group.weight(),
            grid,
            self.samples,
            torch.tensor(self.weights),
            self.group.quantizer,
            batches,
            self.settings,
            lambda step, loss: on_step(step, iterations, loss),
        )
        return Rounded(codes, grid, quantizer)


ROUNDINGS: dict[str, type[Rounding]] = {"gptq": CompensatedRounding, "adaround": AdaRounding}
