"""Simulate the int8 activation quantizer of a layer in calibration, static or with a scale per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import qarvd_kernels as ops

from ..quantization import affine as P

ACTIVATION_BITS = 8


@dataclass(frozen=True, eq=False)
class InputQuantizer:
    """Quantize statically, with a scale and zero-point per group of channels in permuted order (outliers first).

    Attributes:
        scale: float32 `[2]`.
        zero_point: int32 `[2]`.
        num_outliers: channels of group 0; the rest is group 1.
    """

    scale: Tensor
    zero_point: Tensor
    num_outliers: int

    def __call__(self, x: Tensor) -> Tensor:
        """Round float32 `[..., K]` to the grid."""
        parts = x.tensor_split([self.num_outliers], dim=-1)
        scale, zero_point = self.scale.to(x.device), self.zero_point.to(x.device, torch.float32)
        return torch.cat(
            [P.fake_quantize(part, scale[g], zero_point[g], ACTIVATION_BITS) for g, part in enumerate(parts)], dim=-1
        )

    def straight_through(self, x: Tensor) -> Tensor:
        """Round as `__call__` does, with gradients to input and scale that treat rounding as the identity."""
        groups = []
        for g, part in enumerate(x.tensor_split([self.num_outliers], dim=-1)):
            steps = part / self.scale[g]
            rounded = steps + (steps.round() - steps).detach()
            codes = (rounded + self.zero_point[g]).clamp(0, 2**ACTIVATION_BITS - 1)
            groups.append((codes - self.zero_point[g]) * self.scale[g])
        return torch.cat(groups, dim=-1)

    @property
    def learned(self) -> list[Tensor]:
        """What gradient descent may change."""
        return [self.scale]

    @property
    def stored(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero-point as a layer stores them, on the CPU."""
        return self.scale.cpu(), self.zero_point.cpu()

    def to(self, device: torch.device) -> InputQuantizer:
        """Copy to a device, without gradient."""
        scale, zero_point = (tensor.detach().to(device, copy=True) for tensor in (self.scale, self.zero_point))
        return InputQuantizer(scale, zero_point, self.num_outliers)

    def detach(self) -> InputQuantizer:
        """Return the same values, without gradient."""
        return InputQuantizer(self.scale.detach(), self.zero_point, self.num_outliers)


class TokenQuantizer:
    """Quantize every token with a scale of its own, symmetrically; nothing is stored, and nothing learned."""

    learned: tuple[Tensor, ...] = ()
    stored: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(self, x: Tensor) -> Tensor:
        """Round float32 `[..., K]` to the grid."""
        codes, scale = ops.quantize_rows(x, torch.ones(x.shape[-1], device=x.device), 1)
        return codes.to(torch.float32) * scale[..., None]

    def straight_through(self, x: Tensor) -> Tensor:
        """Round as `__call__` does, with gradients to the input that treat rounding as the identity."""
        return x + (self(x) - x).detach()

    def to(self, device: torch.device) -> TokenQuantizer:
        """Return itself: it has no tensors."""
        return self

    def detach(self) -> TokenQuantizer:
        """Return itself."""
        return self
