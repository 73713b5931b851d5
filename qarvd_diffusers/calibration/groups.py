"""Calibrate layers that read one tensor as one layer: `LayerGroup`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quantization.packing import pack
from ..quantization.qparams import LinearQParams
from .grid import WeightGrid
from .inputs import InputQuantizer, TokenQuantizer
from .outliers import OutlierSet


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Stack Linears whose weights are treated as one weight `[N, K]` with its columns in permuted order.

    Attributes:
        linears: the float layers.
        outliers: their common outlier channels.
        quantizer: of their common input; None for float activations.
        every_pass: whether a pass without these layers is an error.
    """

    linears: Mapping[str, nn.Linear]
    outliers: OutlierSet
    quantizer: InputQuantizer | TokenQuantizer | None
    every_pass: bool = True

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return next(iter(self.linears))

    @property
    def device(self) -> torch.device:
        """Device of the first layer."""
        return self.linears[self.name].weight.device

    def weight(self) -> Tensor:
        """Stack the weights, float32 `[N, K]`, in the form that is quantized."""
        return self.outliers.arrange_weight(torch.cat([linear.weight.detach() for linear in self.linears.values()]))

    def permute(self, x: Tensor) -> Tensor:
        """Bring inputs `[..., K]` into the form that is quantized."""
        return self.outliers.arrange_inputs(x)

    def packed(
        self,
        codes: Tensor,
        grid: WeightGrid,
        quantizer: InputQuantizer | TokenQuantizer | None,
        like: Mapping[str, LinearQParams],
    ) -> dict[str, LinearQParams]:
        """Split uint8 codes `[N, K]` and their grid among the layers; all else is taken from `like`."""
        sizes = [linear.out_features for linear in self.linears.values()]
        input_scale, input_zero_point = (None, None) if quantizer is None else quantizer.stored
        parts = zip(codes.split(sizes), grid.scale.split(sizes), grid.stored_zero_point.split(sizes), strict=True)
        return {
            name: dataclasses.replace(
                like[name],
                weight_packed=pack(rows.cpu(), grid.bits),
                weight_scale=scale.cpu().clone(),
                weight_zero_point=zero_point.cpu(),
                input_scale=input_scale,
                input_zero_point=input_zero_point,
            )
            for name, (rows, scale, zero_point) in zip(self.linears, parts, strict=True)
        }


def stored_grid(group: LayerGroup, layers: Mapping[str, LinearQParams]) -> WeightGrid:
    """Return the grid of a group's packed weights, on the device of the group."""
    stored = [layers[name] for name in group.linears]
    scale = torch.cat([layer.weight_scale for layer in stored]).to(group.device)
    zero_point = torch.cat([layer.weight_zero_point for layer in stored]).to(group.device)
    return WeightGrid.stored(scale, zero_point, stored[0].description.num_outliers, stored[0].description.weight_bits)
