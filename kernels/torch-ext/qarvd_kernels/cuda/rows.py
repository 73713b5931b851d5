"""Launch `src/rows.cu`, which `norm` and `quantize` share: rows of activations to int8 codes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import InputQuantizer, Norm, RowQuantizer
from .build import library, message, unavailable_reason
from .device import unsupported_device

_CHANNELS = 256  # per warp; rows have a multiple of it
_MAX_CHANNELS = 5120
_ROTATIONS = (1, 128)
_ALIGNMENT = 16
_HALF = {torch.bfloat16: 0, torch.float16: 1}
_NO_EPS = -1.0  # tells the kernel not to normalize
NO_NORM = (None,) * len(Norm._fields)
_NOT_STATIC, _NO_ROWS = InputQuantizer(None, 0, None, None), RowQuantizer(None, 1)


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
    rotation = arguments.get("rotation", 1)
    if rotation not in _ROTATIONS:
        return f"blocks of {rotation} channels, expected one of {_ROTATIONS}"
    if x.shape[-1] % _CHANNELS or x.shape[-1] > _MAX_CHANNELS:
        return f"rows of {x.shape[-1]} channels, expected a multiple of {_CHANNELS} up to {_MAX_CHANNELS}"
    y = arguments.get("y")
    dtypes = [tensor.dtype for tensor in (x, y) if tensor is not None]
    if dtypes[0] not in _HALF or len(set(dtypes)) > 1:
        return f"activations in {' and '.join(map(str, dtypes))}, expected one 16-bit dtype"
    return None


def launch(x: Tensor, y: Tensor | None, gate: Tensor | None, arguments: tuple, total: Tensor | None = None) -> Tensor:
    """Quantize statically: write `x + gate * y` to `total` if there is a y; return int8 codes in the shape of x.

    Args:
        x: 16-bit `[..., C]`, contiguous.
        y: likewise, or None.
        gate: float32 `[G, C]` or None.
        arguments: the fields of `Norm` (or `NO_NORM`), then those of `InputQuantizer`.
        total: like x, or None without y. It may be x itself: the thread that writes an element of the sum is the only
            one that reads this element of x and y, and it has read it before.
    """
    norm, quantizer = _split(arguments)
    codes = torch.empty_like(x, dtype=torch.int8)
    _launch(x, y, gate, norm, InputQuantizer(*quantizer), _NO_ROWS, total, codes, None)
    return codes


def launch_rows(
    x: Tensor, y: Tensor | None, gate: Tensor | None, arguments: tuple, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `launch` does, with a scale of every row; return int8 codes in the shape of x, and these scales.

    Args:
        x, y, gate, total: as in `launch`.
        arguments: the fields of `Norm` (or `NO_NORM`), then those of `RowQuantizer`.
    """
    norm, quantizer = _split(arguments)
    codes = torch.empty_like(x, dtype=torch.int8)
    row_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch(x, y, gate, norm, _NOT_STATIC, RowQuantizer(*quantizer), total, codes, row_scale)
    return codes, row_scale


def _split(arguments: tuple) -> tuple[Norm, tuple]:
    """Split the fields of `Norm` off."""
    count = len(Norm._fields)
    return Norm(*arguments[:count]), arguments[count:]


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    norm: Norm,
    static: InputQuantizer,
    own: RowQuantizer,
    total: Tensor | None,
    codes: Tensor,
    row_scale: Tensor | None,
) -> None:
    """Run the kernel; one of the quantizers has no tensors."""
    weight, norm_bias, scale, shift, eps = norm
    channels, device = x.shape[-1], x.get_device()
    rows = x.numel() // channels
    # Copies of what is not aligned live until the launch.
    wide = [_aligned(t) for t in (x, y, gate, weight, norm_bias, scale, shift, static.channel_order)]
    channel_scale, written = _aligned(own.channel_scale), _aligned(total)
    code = _function()(
        *map(_pointer, (*wide, static.input_scale, static.input_zero_point, channel_scale, written, codes, row_scale)),
        rows,
        channels,
        static.num_outliers,
        own.rotation,
        1 if gate is None else rows // gate.shape[0],
        1 if scale is None else rows // scale.shape[0],
        _NO_EPS if eps is None else eps,
        _HALF[x.dtype],
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    if code:
        raise RuntimeError(f"qarvd_kernels: codes of {rows} x {channels} activations failed: {message(code)}")
    if total is not None and written is not total:
        total.copy_(written)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or a copy if its address is not aligned."""
    return tensor if tensor is None or tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


@cache
def _function() -> Any:
    """Return the C function with its argument types."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function = library().qarvd_rows
    function.argtypes = [*[pointer] * 14, *[integer] * 6, ctypes.c_float, *[integer] * 2, pointer]
    return function
