"""Hold what quantization decides about one Linear (`LinearQParams`), and specify the tensors that are stored."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

import qarvd_kernels as ops

from ..config import QuantizedModule
from .packing import packed_columns


@dataclass(frozen=True, eq=False)
class LinearQParams:
    """Hold what quantization decides about one Linear with K inputs and N outputs; group 0 holds the outliers.

    Attributes:
        weight_packed: uint8 `[N, K * bits / 8]`, permuted channel order, see `packing`.
        weight_scale: float32 `[N, 2]`.
        weight_zero_point: int16 `[N, 2]`.
        channel_order: int32 `[K]`; stored channel j is input channel `channel_order[j]`, outliers first.
        input_scale: float32 `[2]` of a static activation quantizer, else None.
        input_zero_point: int32 `[2]` likewise, in codes 0..255.
        description: outlier count, bits and kind of activation.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    channel_order: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    description: QuantizedModule

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without absent ones."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "description"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Compute the dequantized weight `[N, K]` in original channel order."""
        return ops.dequantize_weight(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.channel_order,
            self.description.weight_bits,
            self.description.num_outliers,
            dtype,
        )


def stored_tensors(
    in_features: int, out_features: int, description: QuantizedModule
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Give shape and dtype of every tensor of `LinearQParams` for a layer of this size."""
    specs = {
        "weight_packed": ((out_features, packed_columns(in_features, description.weight_bits)), torch.uint8),
        "weight_scale": ((out_features, 2), torch.float32),
        "weight_zero_point": ((out_features, 2), torch.int16),
        "channel_order": ((in_features,), torch.int32),
    }
    if description.activation == "static":
        specs |= {"input_scale": ((2,), torch.float32), "input_zero_point": ((2,), torch.int32)}
    return specs
