"""Provide the operators of Q-ARVD: packed integer weights, dual-scale linear layers, int8 activations between them.

Needs torch and the standard library only. Every operator has a reference implementation in plain torch. `dispatch`
replaces it by a compiled one where that can run; `report` lists the choices.
"""

from __future__ import annotations

from functools import cache

import torch

from . import dispatch
from .attention_backends import attention, tokens_innermost
from .declare import OPERATORS as _OPERATORS
from .ops.attention import KEY_TILE, attention_fp8, attention_int8, qk_norm_rope_append
from .ops.channel_norm import add_bias, rms_norm_silu
from .ops.gemm import (
    dual_scale_gemm,
    dual_scale_gemm_gelu,
    dual_scale_gemm_out,
    dual_scale_gemm_residual,
    expand_int4,
)
from .ops.linear import (
    dequantize_weight,
    dual_scale_linear_dynamic,
    dual_scale_linear_static,
    unpack_weight,
    weight_only_linear,
)
from .ops.norm import (
    add_gated,
    add_gated_,
    add_norm_quantize,
    add_norm_quantize_,
    add_norm_quantize_rows_,
    norm_quantize,
    norm_quantize_rows,
)
from .ops.quantize import quantize_dynamic, quantize_rows, quantize_static, row_sums
from .prepare import LayerRefused, PreparedLinear, prepare_linear
from .reference.quantize import rotate

OPERATORS = tuple(_OPERATORS)


def report(device: torch.device | str | None = None) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """List which implementation of every operator runs on a device, and why no other one does.

    Args:
        device: None takes the current CUDA device, or the CPU where there is none.

    Returns:
        `(operator, implementation, [(other implementation, reason), ...])` for every operator. A call with shapes
        that an implementation does not support still goes to the next one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = [(op.name, dispatch.choose(op.name, op.theme, torch.device(device))) for op in _OPERATORS.values()]
    return [(name, choice.backend, list(choice.others)) for name, choice in choices]


@cache
def accelerated(device: torch.device | str) -> bool:
    """Return whether compiled kernels of the integer matrix product run on this device; cached."""
    return dispatch.choose("dual_scale_gemm", "gemm", torch.device(device)).backend != "reference"


__all__ = [
    "KEY_TILE",
    "OPERATORS",
    "LayerRefused",
    "PreparedLinear",
    "accelerated",
    "add_bias",
    "add_gated",
    "add_gated_",
    "add_norm_quantize",
    "add_norm_quantize_",
    "add_norm_quantize_rows_",
    "attention",
    "attention_fp8",
    "attention_int8",
    "dequantize_weight",
    "dual_scale_gemm",
    "dual_scale_gemm_gelu",
    "dual_scale_gemm_out",
    "dual_scale_gemm_residual",
    "dual_scale_linear_dynamic",
    "dual_scale_linear_static",
    "expand_int4",
    "norm_quantize",
    "norm_quantize_rows",
    "prepare_linear",
    "qk_norm_rope_append",
    "quantize_dynamic",
    "quantize_rows",
    "quantize_static",
    "report",
    "rms_norm_silu",
    "rotate",
    "row_sums",
    "tokens_innermost",
    "unpack_weight",
    "weight_only_linear",
]
