"""Hold what quantization decides about one Linear (`LinearQParams`); specify and check the tensors that are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
        weight_zero_point: int16 `[N, 2]`; or uint8 `[N, K / 16]` with integer factors, see
            `qarvd_kernels.ops.arguments.StoredWeight`.
        channel_order: int32 `[K]`; stored channel j is input channel `channel_order[j]`, outliers first.
        input_scale: float32 `[2]` of a static activation quantizer, else None.
        input_zero_point: int32 `[2]` likewise, in codes 0..255.
        description: outlier count, bits and kind of activation.
        channel_scale: float32 `[K]` of activations with a scale per token, else None: by which input channels are
            multiplied before they are rotated and quantized.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    channel_order: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    description: QuantizedModule
    channel_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without absent ones."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "description"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Compute the dequantized weight `[N, K]` in original channel order."""
        return dequantized_weight(self, self.description, dtype)


def dequantized_weight(layer: Any, description: QuantizedModule, dtype: torch.dtype) -> Tensor:
    """Compute the weight of `LinearQParams` or a `QARVDLinear`, rows as stored, channels in their original order."""
    by_token = layer.channel_scale is not None
    weight = ops.dequantize_weight(
        layer.weight_packed,
        layer.weight_scale,
        layer.weight_zero_point,
        layer.channel_order,
        description.weight_bits,
        description.num_outliers,
        torch.float32 if by_token else dtype,
    )
    return (ops.rotate(weight, description.rotation) * layer.channel_scale).to(dtype) if by_token else weight


def stored_tensors(
    in_features: int, out_features: int, description: QuantizedModule
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Give shape and dtype of every tensor of `LinearQParams` for a layer of this size."""
    specs = {
        "weight_packed": ((out_features, packed_columns(in_features, description.weight_bits)), torch.uint8),
        "weight_scale": ((out_features, 2), torch.float32),
        "weight_zero_point": (
            ((out_features, in_features // description.group), torch.uint8)
            if description.group
            else ((out_features, 2), torch.int16)
        ),
        "channel_order": ((in_features,), torch.int32),
    }
    if description.activation == "static":
        specs |= {"input_scale": ((2,), torch.float32), "input_zero_point": ((2,), torch.int32)}
    elif description.activation == "token":
        specs |= {"channel_scale": ((in_features,), torch.float32)}
    return specs


def check_values(layers: Mapping[str, Any], source: object, clamped: bool = False) -> None:
    """Check the values of packed layers: kernels read where `channel_order` says, and divide by scales.

    Layers of one shape are checked together, since a model has hundreds.

    Args:
        layers: by name, `LinearQParams` or `QARVDLinear`, with tensors of the right shapes and dtypes.
        source: file, for errors; None names the tensor alone.
        clamped: zero-points are codes, as all recipes but `Recipe.reference` make them.

    Raises:
        ValueError: a channel order is no permutation, a scale not positive and finite, a zero-point no code, or so far
            out that integer sums could overflow; the message names file and tensor.
    """
    alike: dict[tuple, list[tuple[str, Any, int]]] = {}
    for name, layer in layers.items():
        what, order = layer.description, layer.channel_order
        kind = (what.weight_bits if not what.group else 0, what.activation == "static", what.activation == "token")
        key = (order.shape, order.device, layer.weight_scale.shape, kind)
        alike.setdefault(key, []).append((name, layer, what.num_outliers))
    for (*_, (bits, _, by_token)), group in alike.items():
        names, members, outliers = zip(*group, strict=True)
        for tensor, expected, valid in _rules(members, outliers, bits, clamped, by_token):
            if not valid.all():
                name = names[int(valid.int().argmin())]
                where = f"{source}: {name}." if source else ""
                raise ValueError(f"{where}{tensor} holds wrong values, expected {expected}")


def _rules(
    layers: Sequence[Any], outliers: Sequence[int], bits: int, clamped: bool, by_token: bool
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield tensor, expectation and which of the layers, alike in shape, meet it: bool `[L]`.

    Weights in groups come as 0 bits: every byte of their zero-points is valid, and their operand is a signed byte.
    """
    levels = 2**bits - 1

    def bounds(name: str) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each layer and group, `[L, 2]`; NaN where there is one."""
        stacked = torch.stack([getattr(layer, name).detach() for layer in layers])
        if stacked.ndim == 2:  # of two groups, or of channels
            stacked = stacked[:, None] if name != "channel_scale" else stacked[..., None]
        return stacked.amin(1), stacked.amax(1)

    def within(low: Tensor, high: Tensor, levels: int) -> Tensor:
        return ((low >= 0) & (high <= levels)).all(1)

    def reach(low: Tensor, high: Tensor, levels: int) -> Tensor:
        return torch.maximum(high.long(), levels - low.long())

    order = torch.stack([layer.channel_order.detach() for layer in layers]).long()
    channels = order.shape[1]
    seen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order.clamp(0, max(channels - 1, 0)), True)
    yield "channel_order", f"each of 0..{channels - 1} once", seen.all(1)
    if by_token:
        natural = order == torch.arange(channels, device=order.device)
        yield "channel_order", "channels in their own order", natural.all(1)
    static = layers[0].input_scale is not None
    for name in ("weight_scale", *["input_scale"] * static, *["channel_scale"] * by_token):
        low, high = bounds(name)
        yield name, "positive finite numbers", ((low > 0) & (high < float("inf"))).all(1)
    sums = order.new_tensor(127)
    if static:
        low, high = bounds("input_zero_point")
        if clamped:
            yield "input_zero_point", "codes in 0..255", within(low, high, 255)
        sums = reach(low, high, 255)
    if bits:
        low, high = bounds("weight_zero_point")
        if clamped:
            yield "weight_zero_point", f"codes in 0..{levels}", within(low, high, levels)
        operand = reach(low, high, levels)
    else:
        operand = order.new_full((len(order), 2), 128)
    first = order.new_tensor(outliers)
    largest = torch.stack([first, channels - first], 1) * sums * operand
    yield "weight_zero_point", "a largest integer sum of this layer below 2**31", (largest < 2**31).all(1)
