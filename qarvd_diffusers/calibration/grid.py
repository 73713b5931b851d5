"""`WeightGrid`: the values that the integer codes of one weight can stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization import affine as P


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Scale and zero-point of every output row and group, over columns in permuted order (outliers first).

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
        """`[N, 2]` per group -> `[N, num_columns]` per column."""
        counts = torch.tensor([self.num_outliers, num_columns - self.num_outliers], device=values.device)
        return values.repeat_interleave(counts, dim=1)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of either group; one of them may be empty."""
        return weight.tensor_split([self.num_outliers], dim=-1)

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[N, K]`, as floats."""
        scale, zero_point = (self.columns(each, weight.shape[1]) for each in (self.scale, self.zero_point))
        return P.quantize(weight, scale, zero_point, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes `[N, K]` of any dtype -> float32 values."""
        scale, zero_point = (self.columns(each, codes.shape[1]) for each in (self.scale, self.zero_point))
        return P.dequantize(codes.to(torch.float32), scale, zero_point)
