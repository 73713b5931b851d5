"""Launch `src/rows.cu`, which `norm` and `quantize` share: rows of activations to int8 codes in stored order."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import Norm
from .build import library, message, unavailable_reason
from .device import unsupported_device

_CHANNELS = 256  # per warp; rows have a multiple of it
_MAX_CHANNELS = 5120
_ALIGNMENT = 16
_HALF = {torch.bfloat16: 0, torch.float16: 1}
_NO_EPS = -1.0  # tells the kernel not to normalize
NO_NORM = (None,) * len(Norm._fields)


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device)
    if reason is None and arguments is not None:
        reason = _unsupported_arguments(operator, arguments)
    return reason or unavailable_reason()


def _unsupported_arguments(operator: str, arguments: Mapping[str, Any]) -> str | None:
    """Return why a call cannot run here, or None."""
    x = arguments["x"]
    if operator.endswith("_") and not x.is_contiguous():
        return "x is not contiguous"
    if x.numel() == 0:
        return "an empty tensor"
    if x.shape[-1] % _CHANNELS or x.shape[-1] > _MAX_CHANNELS:
        return f"rows of {x.shape[-1]} channels, expected a multiple of {_CHANNELS} up to {_MAX_CHANNELS}"
    y = arguments.get("y")
    dtypes = [tensor.dtype for tensor in (x, y) if tensor is not None]
    if dtypes[0] not in _HALF or len(set(dtypes)) > 1:
        return f"activations in {' and '.join(map(str, dtypes))}, expected one 16-bit dtype"
    return None


def launch(x: Tensor, y: Tensor | None, gate: Tensor | None, arguments: tuple, total: Tensor | None = None) -> Tensor:
    """Write `x + gate * y` to `total` if there is a y; return int8 codes in the shape of x.

    Args:
        x: 16-bit `[..., C]`, contiguous.
        y: likewise, or None.
        gate: float32 `[G, C]` or None.
        arguments: the fields of `Norm` (or `NO_NORM`), then those of `InputQuantizer`.
        total: like x, or None without y. It may be x itself: the thread that writes an element of the sum is the only
            one that reads this element of x and y, and it has read it before.
    """
    weight, norm_bias, scale, shift, eps, order, outliers, input_scale, zero_point = arguments
    codes = torch.empty_like(x, dtype=torch.int8)
    channels, device = x.shape[-1], x.get_device()
    rows = x.numel() // channels
    wide = [_aligned(t) for t in (x, y, gate, weight, norm_bias, scale, shift, order)]
    written = _aligned(total)
    code = _function()(
        *[None if t is None else t.data_ptr() for t in wide],
        input_scale.data_ptr(),
        zero_point.data_ptr(),
        None if written is None else written.data_ptr(),
        codes.data_ptr(),
        rows,
        channels,
        outliers,
        1 if gate is None else rows // gate.shape[0],
        1 if scale is None else rows // scale.shape[0],
        _NO_EPS if eps is None else eps,
        _HALF[x.dtype],
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    if code:
        raise RuntimeError(f"qarvd_kernels: codes of {rows} x {channels} activations failed: {message(code)}")
    if written is not total:
        total.copy_(written)
    return codes


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or a copy if its address is not aligned."""
    return tensor if tensor is None or tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


@cache
def _function() -> Any:
    """Return the C function with its argument types."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function = library().qarvd_rows
    function.argtypes = [*[pointer] * 12, *[integer] * 5, ctypes.c_float, *[integer] * 2, pointer]
    return function
