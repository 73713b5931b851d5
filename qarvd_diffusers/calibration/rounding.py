"""Round from data, in two ways with a common interface: observe the inputs of a group, then choose its codes."""

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
from .inputs import InputQuantizer, TokenQuantizer

# Rows of one sample (one pass of one prompt) that AdaRound keeps; a 480p chunk has 4680.
SAMPLE_ROWS = 1024

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss


class Rounded(NamedTuple):
    """Hold uint8 codes `[N, K]` in permuted order, the grid they are on, and the (perhaps learned) input quantizer."""

    codes: Tensor
    grid: WeightGrid
    quantizer: InputQuantizer | TokenQuantizer | None


class Rounding(Protocol):
    """Round the weights of one group of layers."""

    def __init__(self, group: LayerGroup, config: QARVDConfig) -> None:
        """Start to observe the inputs of a group."""

    @staticmethod
    def bytes(channels: int) -> float:
        """Count the device memory that observing a group with this many input channels takes."""

    @staticmethod
    def steps(config: QARVDConfig) -> int:
        """Count how often `solve` calls `on_step`."""

    def add(self, x: Tensor, weight: float) -> None:
        """Record one call: input x `[batch, ..., K]` of the layers, and the weight of its chunk."""

    def solve(self, grid: WeightGrid, on_step: OnStep) -> Rounded:
        """Choose the codes, starting from a grid."""


class GPTQRounding:
    """Round in closed form from the Hessian of the quantized inputs: fixed memory, `K * K` floats."""

    def __init__(self, group: LayerGroup, config: QARVDConfig) -> None:
        self.group = group
        size = group.outliers.channel_order.numel()
        self.hessian = torch.zeros(size, size, device=group.device)

    @staticmethod
    def bytes(channels: int) -> float:
        """Count the bytes of the Hessian."""
        return 4 * channels**2

    @staticmethod
    def steps(config: QARVDConfig) -> int:
        """Report a single step."""
        return 1

    def add(self, x: Tensor, weight: float) -> None:
        """Add one call to the Hessian."""
        x = self.group.permute(x.detach().to(self.hessian.device, torch.float32)).flatten(0, -2)
        if self.group.quantizer is not None:
            x = self.group.quantizer(x)
        self.hessian.addmm_(x.T, x, alpha=weight)

    def solve(self, grid: WeightGrid, on_step: OnStep) -> Rounded:
        codes, grid = compensate(self.group.weight(), self.hessian, grid)
        on_step(1, 1, math.nan)
        return Rounded(codes, grid, self.group.quantizer)


class AdaRounding:
    """Round by gradient descent on a sample of the inputs in host memory: evenly spaced rows of every pass."""

    def __init__(self, group: LayerGroup, config: QARVDConfig) -> None:
        self.group = group
        self.settings = AdaRoundSettings(config.rounding_iterations)
        self.samples: list[Tensor] = []
        self.weights: list[float] = []
        name = f"{config.calibration_seed} {group.name}".encode()
        self.seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())

    @staticmethod
    def bytes(channels: int) -> float:
        """Return infinity, so that one block is observed at a time: samples grow with the rollouts."""
        return math.inf

    @staticmethod
    def steps(config: QARVDConfig) -> int:
        """Count the optimizer steps."""
        return config.rounding_iterations

    def add(self, x: Tensor, weight: float) -> None:
        """Keep some rows of one call."""
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


ROUNDINGS: dict[str, type[Rounding]] = {"gptq": GPTQRounding, "adaround": AdaRounding}
