"""Map the integer codes of one weight to values: `WeightGrid`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization import affine as P


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Hold scale and zero-point of every output row and group, over columns in permuted order (outliers first).

    Attributes:
        scale: float32 `[N, 2]`.
        zero_point: float32 `[N, 2]`, integers.
        num_outliers: columns of group 0; the rest is group 1.
        bits: bits of a code.
    """

    scale: Tensor
    zero_point: Tensor
    num_outliers: int
    bits: int

    def columns(self, values: Tensor, num_columns: int) -> Tensor:
        """Expand `[N, 2]` per group to `[N, num_columns]` per column."""
        counts = torch.tensor([self.num_outliers, num_columns - self.num_outliers], device=values.device)
        return values.repeat_interleave(counts, dim=1)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split off the columns of each group; one of them may be empty."""
        return weight.tensor_split([self.num_outliers], dim=-1)

    def quantize(self, weight: Tensor) -> Tensor:
        """Round `[N, K]` to the nearest codes, as floats."""
        scale, zero_point = (self.columns(values, weight.shape[1]) for values in (self.scale, self.zero_point))
        return P.quantize(weight, scale, zero_point, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes `[N, K]` of any dtype to float32 values."""
        scale, zero_point = (self.columns(values, codes.shape[1]) for values in (self.scale, self.zero_point))
        return P.dequantize(codes.to(torch.float32), scale, zero_point)
