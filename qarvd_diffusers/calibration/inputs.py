"""Simulate a layer's static int8 activation quantizer in calibration: `InputQuantizer`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization import affine as P

ACTIVATION_BITS = 8


@dataclass(frozen=True, eq=False)
class InputQuantizer:
    """Quantize with one scale and zero-point per group of channels, which are in permuted order (outliers first).

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

    def to(self, device: torch.device) -> InputQuantizer:
        """Copy to a device, without gradient."""
        scale, zero_point = (tensor.detach().to(device, copy=True) for tensor in (self.scale, self.zero_point))
        return InputQuantizer(scale, zero_point, self.num_outliers)

    def detach(self) -> InputQuantizer:
        """Return the same values, without gradient."""
        return InputQuantizer(self.scale.detach(), self.zero_point, self.num_outliers)
