"""Use quantized Linears in some passes and float ones in the others: `QuantizationSwitch`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..quantization.as_linear import part, set_part, stacked
from ..quantization.model import base_layer_name, unwrapped


class QuantizationSwitch:
    """Exchange a transformer's Linears between two passes, inside a `with`; it starts and ends float.

    Args:
        transformer: float model.
        layers: the other Linears, by the names of those they stand in for.
    """

    def __init__(self, transformer: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._transformer = unwrapped(transformer)
        self._layers = {base_layer_name(transformer, name): layer for name, layer in stacked(layers).items()}
        self._kept: dict[str, nn.Module | nn.Parameter] = {}
        self._on = False

    def __enter__(self) -> QuantizationSwitch:
        self._kept = {name: part(self._transformer, name) for name in self._layers}
        return self

    def __exit__(self, *exception: object) -> None:
        self.set(False)
        self._kept = {}

    def set(self, on: bool) -> None:
        """Switch to quantized or to float Linears."""
        if on == self._on:
            return
        leaving, coming = (self._kept, self._layers) if on else (self._layers, self._kept)
        for name, layer in coming.items():
            device = _first(leaving[name]).device
            if _first(layer).device != device:  # offloading moves only what is installed
                if isinstance(layer, nn.Parameter):
                    layer.data = layer.data.to(device)
                else:
                    layer.to(device)
            set_part(self._transformer, name, layer)
        self._on = on


def _first(part: nn.Module | nn.Parameter) -> nn.Parameter:
    """Return a parameter, or the first one of a module."""
    return part if isinstance(part, nn.Parameter) else next(part.parameters())
