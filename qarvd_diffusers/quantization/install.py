"""Put quantized Linears into a model, and replace them by float ones again."""

from __future__ import annotations

from torch import nn

from .as_linear import float_linears, quantized_class, require_all_experts, set_part, stacked
from .experts import QARVDExpert, QARVDExperts
from .linear import QARVDLinear
from .model import base_layer_name, unwrapped
from .result import CalibrationResult


def apply(transformer: nn.Module, result: CalibrationResult) -> None:
    """Replace the Linears named in `result` by quantized ones, in place; nothing is replaced if one does not fit.

    Raises:
        ValueError: see `quantized_layers`.
    """
    for name, layer in stacked(quantized_layers(transformer, result)).items():
        set_part(unwrapped(transformer), base_layer_name(transformer, name), layer)


def quantized_layers(transformer: nn.Module, result: CalibrationResult) -> dict[str, QARVDLinear]:
    """Build the quantized Linears that `apply` puts into a transformer, by name; the transformer does not change.

    Raises:
        ValueError: a layer is absent, quantized already, or of another size; the message names it.
    """
    quantized, linears = {}, dict(float_linears(unwrapped(transformer)))
    require_all_experts(result.layers, linears, "the calibration result")
    for name, qparams in result.layers.items():
        linear = linears.get(base_layer_name(transformer, name))
        if not isinstance(linear, nn.Linear) or isinstance(linear, QARVDLinear):
            raise ValueError(
                f"{name} is a {type(linear).__name__} in this {type(transformer).__name__}, expected a float Linear: "
                "the calibration result belongs to another model, or was applied already"
            )
        try:
            quantized[name] = quantized_class(linear).from_float(linear, qparams)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. The calibration result belongs to another model.") from error
    return quantized


def dequantize(transformer: nn.Module) -> None:
    """Replace every quantized layer by the float one of its dequantized weight, in place."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, QARVDLinear | QARVDExperts) and not isinstance(layer, QARVDExpert):
            set_part(transformer, name, layer.to_float())
