"""Operators of Q-ARVD: packed integer weights, dual-scale linear layers. Needs torch and the standard library only."""

from .ops import (
    dequantize_weight,
    dual_scale_linear_dynamic,
    dual_scale_linear_static,
    quantize_dynamic,
    quantize_static,
    unpack_weight,
    weight_only_linear,
)

OPERATORS = (
    "quantize_static",
    "quantize_dynamic",
    "unpack_weight",
    "dual_scale_linear_static",
    "dual_scale_linear_dynamic",
    "dequantize_weight",
    "weight_only_linear",
)


def report() -> list[tuple[str, str, str]]:
    """Which implementation runs: `(operator, implementation, reason)` for every operator."""
    return [(name, "reference", "no compiled kernel in this version") for name in OPERATORS]


__all__ = [
    "OPERATORS",
    "dequantize_weight",
    "dual_scale_linear_dynamic",
    "dual_scale_linear_static",
    "quantize_dynamic",
    "quantize_static",
    "report",
    "unpack_weight",
    "weight_only_linear",
]
