"""Use quantized Linears in some passes and float ones in the others: `QuantizationSwitch`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..quantization.model import base_layer_name, unwrapped


class QuantizationSwitch:
    """Exchange a transformer's Linears between two passes, inside a `with`; it starts and ends float.

    Args:
        transformer: float model.
        layers: the other Linears, by the names of those they stand in for.
    """

    def __init__(self, transformer: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._transformer = unwrapped(transformer)
        self._layers = {base_layer_name(transformer, name): layer for name, layer in layers.items()}
        self._kept: dict[str, nn.Module] = {}
        self._on = False

    def __enter__(self) -> QuantizationSwitch:
        self._kept = {name: self._transformer.get_submodule(name) for name in self._layers}
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
            device = next(leaving[name].parameters()).device
            if next(layer.parameters()).device != device:
                layer.to(device)  # offloading moves only what is installed
            self._transformer.set_submodule(name, layer)
        self._on = on
