"""Map the integer codes of one weight to values: `WeightGrid`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization import affine as P

LARGEST_FACTOR = 16  # it is stored less one, in four bits


@dataclass(frozen=True, eq=False)
class Columns:
    """Hold the grid of every element of a weight `[N, K]`; `[N]` after taking a column.

    Attributes:
        scale: float32, positive: one step of a code.
        zero_point: float32, integers.
        low: float32, least code.
        high: float32, greatest code.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def take(self, index: object) -> Columns:
        """Return some columns, or one."""
        parts = (self.scale, self.zero_point, self.low, self.high)
        return Columns(*(part[:, index] for part in parts))

    def quantize(self, weight: Tensor) -> Tensor:
        """Round to the nearest codes, as floats."""
        return torch.clamp(torch.round(weight / self.scale) + self.zero_point, self.low, self.high)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes to values."""
        return P.dequantize(codes, self.scale, self.zero_point)


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Hold the scales of every output row and group, over columns in the form that is quantized.

    Attributes:
        scale: float32 `[N, 2]`, of outliers and of the rest.
        zero_point: float32 `[N, 2]`, integers; `[N, K / 16]` with factors.
        num_outliers: columns of group 0; the rest is group 1.
        bits: bits of a code.
        factor: float32 `[N, K / 16]`, integers by which the scale of 16 neighbouring columns is multiplied, so that
            `factor * (code - zero_point)` fits int8 (QServe, arXiv 2405.04532); None is 1.
    """

    scale: Tensor
    zero_point: Tensor
    num_outliers: int
    bits: int
    factor: Tensor | None = None

    def spread(self, values: Tensor, num_columns: int) -> Tensor:
        """Expand `[N, 2]` per group to `[N, num_columns]` per column."""
        counts = torch.tensor([self.num_outliers, num_columns - self.num_outliers], device=values.device)
        return values.repeat_interleave(counts, dim=1)

    def columns(self, num_columns: int) -> Columns:
        """Return the grid of every element."""
        scale, levels = self.spread(self.scale, num_columns), float(2**self.bits - 1)
        if self.factor is None:
            bounds = (torch.full_like(scale, bound) for bound in (0.0, levels))
            return Columns(scale, self.spread(self.zero_point, num_columns), *bounds)
        width = num_columns // self.factor.shape[1]
        factor, zero_point = (part.repeat_interleave(width, dim=1) for part in (self.factor, self.zero_point))
        low = (zero_point - torch.floor(128 / factor)).clamp(min=0)
        high = (zero_point + torch.floor(127 / factor)).clamp(max=levels)
        return Columns(scale * factor, zero_point, low, high)

    def steps(self, codes: Tensor) -> Tensor:
        """Convert codes `[N, K]` to multiples of the scales of their rows and groups."""
        columns = self.columns(codes.shape[1])
        steps = codes.to(torch.float32) - columns.zero_point
        return steps if self.factor is None else steps * self.factor.repeat_interleave(self._width(codes), dim=1)

    def _width(self, codes: Tensor) -> int:
        assert self.factor is not None
        return codes.shape[1] // self.factor.shape[1]

    def rows(self, index: slice) -> WeightGrid:
        """Return the grid of some rows."""
        factor = None if self.factor is None else self.factor[index]
        return dataclasses.replace(self, scale=self.scale[index], zero_point=self.zero_point[index], factor=factor)

    def quantize(self, weight: Tensor) -> Tensor:
        """Round `[N, K]` to the nearest codes, as floats."""
        return self.columns(weight.shape[1]).quantize(weight)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes `[N, K]` of any dtype to float32 values."""
        return self.columns(codes.shape[1]).dequantize(codes.to(torch.float32))

    @property
    def stored_zero_point(self) -> Tensor:
        """Zero-points as a layer stores them: int16 `[N, 2]`, or uint8 `[N, K / 16]` with the factors."""
        if self.factor is None:
            return self.zero_point.to(torch.int16)
        return self.factor.to(torch.uint8) - 1 | self.zero_point.to(torch.uint8) << 4

    @classmethod
    def stored(cls, scale: Tensor, zero_point: Tensor, num_outliers: int, bits: int) -> WeightGrid:
        """Build the grid of a layer from what `stored_zero_point` returned."""
        if zero_point.dtype != torch.uint8:
            return cls(scale, zero_point.to(torch.float32), num_outliers, bits)
        factor = (zero_point & 15).to(torch.float32) + 1
        return cls(scale, (zero_point >> 4).to(torch.float32), num_outliers, bits, factor)
