"""Put quantized Linears into a model, and replace them by float ones again."""

from __future__ import annotations

from torch import nn

from .linear import QARVDLinear
from .model import base_layer_name, unwrapped
from .result import CalibrationResult


def apply(transformer: nn.Module, result: CalibrationResult) -> None:
    """Replace the Linears named in `result` by quantized ones, in place; nothing is replaced if one does not fit.

    Raises:
        ValueError: see `quantized_layers`.
    """
    for name, layer in quantized_layers(transformer, result).items():
        unwrapped(transformer).set_submodule(base_layer_name(transformer, name), layer)


def quantized_layers(transformer: nn.Module, result: CalibrationResult) -> dict[str, QARVDLinear]:
    """Build the quantized Linears that `apply` puts into a transformer, by name; the transformer does not change.

    Raises:
        ValueError: a layer is absent, quantized already, or of another size; the message names it.
    """
    quantized = {}
    for name, qparams in result.layers.items():
        linear = _submodule(transformer, name)
        if not isinstance(linear, nn.Linear) or isinstance(linear, QARVDLinear):
            raise ValueError(
                f"{name} is a {type(linear).__name__} in this {type(transformer).__name__}, expected a float Linear: "
                "the calibration result belongs to another model, or was applied already"
            )
        try:
            quantized[name] = QARVDLinear.from_float(linear, qparams)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. The calibration result belongs to another model.") from error
    return quantized


def dequantize(transformer: nn.Module) -> None:
    """Replace every QARVDLinear by the float Linear of its dequantized weight, in place."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, QARVDLinear):
            linear = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=layer.dtype
            )
            linear.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
            linear.bias = layer.bias
            transformer.set_submodule(name, linear.train(layer.training))


def _submodule(transformer: nn.Module, name: str) -> nn.Module | None:
    """Return a layer by name, inside adapters and compilation wrappers; None if there is none."""
    try:
        return unwrapped(transformer).get_submodule(base_layer_name(transformer, name))
    except AttributeError:
        return None
