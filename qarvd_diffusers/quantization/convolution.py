"""Compute a 1x1 convolution as a quantized Linear over its channels: `QARVDConv1d`, `QARVDConv2d`, `QARVDConv3d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import QuantizedModule
from ..schemes import NEW_FORMAT
from .linear import QARVDLinear


class QARVDConv(QARVDLinear):
    """A `QARVDLinear` over the channels of `[B, C, ...]`, in place of a convolution of kernel 1 and stride 1.

    Subclasses are also those of torch's convolutions, so that adapters (PEFT) and offloading treat them as such.
    """

    format = NEW_FORMAT
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups = 1
    padding_mode: Any = "zeros"
    dimensions = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a float convolution where no description is passed: PEFT makes adapters of the type of their layer."""
        described = any(isinstance(value, QuantizedModule) for value in (*args, *kwargs.values()))
        if described or not (args or kwargs):  # copying makes an object without arguments
            return super().__new__(cls)
        return next(base for base in cls.__mro__ if base in CONVOLUTIONS)(*args, **kwargs)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Ones, as many as the convolution has dimensions."""
        return (1,) * self.dimensions

    @property
    def in_channels(self) -> int:
        """Input channels."""
        return self.in_features

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.out_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight, `[N, K, 1, ...]`."""
        return (*super().weight_shape, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[B, K, ...]` -> `[B, N, ...]`, or without B, in the dtype and memory format of x."""
        channel = -1 - self.dimensions
        rows = x.movedim(channel, -1)
        y = super().forward(rows).movedim(-1, channel)
        return y if rows.is_contiguous() else y.contiguous()

    def to_float(self) -> nn.Module:
        """Build the float convolution of the dequantized weight."""
        kind = next(base for base in type(self).__mro__ if base in CONVOLUTIONS)
        sizes = (self.in_features, self.out_features, self.kernel_size)
        return self._filled(kind(*sizes, bias=self.bias is not None, device="meta", dtype=self.dtype))


class QARVDConv1d(QARVDConv, nn.Conv1d):  # type: ignore[misc, override]
    """A quantized `nn.Conv1d` of kernel 1."""

    dimensions = 1


class QARVDConv2d(QARVDConv, nn.Conv2d):  # type: ignore[misc, override]
    """A quantized `nn.Conv2d` of kernel 1."""

    dimensions = 2


class QARVDConv3d(QARVDConv, nn.Conv3d):  # type: ignore[misc, override]
    """A quantized `nn.Conv3d` of kernel 1."""

    dimensions = 3


CONVOLUTIONS: dict[type[nn.Module], type[QARVDConv]] = {
    nn.Conv1d: QARVDConv1d,
    nn.Conv2d: QARVDConv2d,
    nn.Conv3d: QARVDConv3d,
}
