"""Run the operators of `ops.gemm` on Hopper GPUs: dual-scale int8 matrix product and int4 expansion."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import library, message, unavailable_reason
from .device import unsupported_device

# As `Format` in src/gemm.cuh.
_FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3, torch.int8: 4}
_ALIGNMENT = 16  # bytes; TMA requires it of addresses and rows
_COLUMNS = 32  # weight rows that one thread's accumulators are spread over
# Rows and columns of a tile and bytes of a K block, as compiled in src/gemm.cu.
_TILES = (
    (128, 128, 128),
    (128, 160, 128),
    (128, 224, 128),
    (128, 256, 64),
    (128, 256, 128),
    (192, 192, 128),
)
# Cost of filling and draining the pipeline and of writing a tile, in columns of products.
_TILE_OVERHEAD_COLUMNS = 16
_TUNED_ROWS = 4096  # the tuned tiles are for full-size activations (measured with 4680 rows)
_TUNED = Path(__file__).with_name("gemm_configs.json")


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device)
    if reason is None and arguments is not None:
        reason = _unsupported_expand(arguments) if operator == "expand_int4" else _unsupported_gemm(arguments)
    return reason or unavailable_reason()


def dual_scale_gemm(*arguments: Any) -> Tensor:
    """Return `[M, N]` in `out_dtype`; int32 is the sum before the epilogue."""
    *product, out_dtype = arguments
    return _launch(product, out_dtype)


def dual_scale_gemm_out(*arguments: Any) -> None:
    """Write `dual_scale_gemm` in the dtype of `out` to `out`."""
    *product, out = arguments
    _launch(product, out.dtype, out=out)


def dual_scale_gemm_gelu(*arguments: Any) -> Tensor:
    """Return int8 `[M, N]`: GELU and static quantization of the product."""
    *product, out_scale, out_zero_point, out_outliers = arguments
    return _launch(product, torch.int8, quantizer=(out_scale.data_ptr(), out_zero_point.data_ptr(), out_outliers))


def dual_scale_gemm_residual(*arguments: Any) -> Tensor:
    """Return `[M, N]` in the dtype of `residual`: the residual plus the gated product."""
    *product, residual, gate = arguments
    residual = _aligned(residual.contiguous())
    sums = (residual.data_ptr(), _pointer(gate), residual.shape[0] // gate.shape[0] if gate is not None else 1)
    return _launch(product, residual.dtype, sums=sums)


def expand_int4(weight_packed: Tensor, weight_zero_point: Tensor, num_outliers: int, out: Tensor) -> None:
    """Write the int8 operand `[N, K]` of a 4-bit weight into `out`."""
    device = out.get_device()
    code = _functions()[1](
        weight_packed.data_ptr(),
        weight_zero_point.data_ptr(),
        out.data_ptr(),
        *out.shape,
        num_outliers,
        int(weight_zero_point.dtype == torch.uint8),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    if code:
        raise RuntimeError(f"qarvd_kernels: expand_int4 failed: {message(code)}")


def _launch(
    product: Sequence[Any],
    dtype: torch.dtype,
    quantizer: tuple[int | None, int | None, int] = (None, None, 0),
    sums: tuple[int | None, int | None, int] = (None, None, 1),
    out: Tensor | None = None,
) -> Tensor:
    """Compute a product in `dtype`.

    Args:
        product: the fields of `Product`.
        dtype: of the result.
        quantizer: as in src/gemm.cu.
        sums: as in src/gemm.cu.
        out: `[M, N]` to write the result to; None allocates.
    """
    a, weight, num_outliers, ratio, scale, bias, *rows = product
    (m, k), n, device = a.shape, weight.shape[0], a.get_device()
    if out is None:
        out = torch.empty((m, n), dtype=dtype, device=a.device)
    if a.stride(1) != 1 or a.stride(0) % _ALIGNMENT or a.data_ptr() % _ALIGNMENT:
        a = a.clone(memory_format=torch.contiguous_format)
    code = _functions()[0](
        a.data_ptr(),
        a.stride(0),
        weight.data_ptr(),
        m,
        n,
        k,
        num_outliers,
        ratio.data_ptr(),
        scale.data_ptr(),
        bias.data_ptr(),
        *map(_pointer, rows),
        out.data_ptr(),
        _FORMATS[out.dtype],
        *quantizer,
        *sums,
        *tile(m, n, k, device),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    if code:
        raise RuntimeError(
            f"qarvd_kernels: dual_scale_gemm of {m} x {n} x {k} ({num_outliers} outliers) to {out.dtype} failed: "
            f"{message(code)}"
        )
    return out


@cache
def tile(m: int, n: int, k: int, device: int) -> tuple[int, int, int]:
    """Choose one of `_TILES`: the tuned one for `N x K`, else the one that balances the multiprocessors best."""
    tuned = _tuned().get(f"{n}x{k}")
    if tuned is not None and m >= _TUNED_ROWS:
        return tuple(tuned)
    return _balanced(m, n, torch.cuda.get_device_properties(device).multi_processor_count)


def _balanced(m: int, n: int, processors: int) -> tuple[int, int, int]:
    """Choose the tile with which the busiest multiprocessor has the least work; the first of equals."""

    def cost(candidate: tuple[int, int, int]) -> int:
        rows, columns, _ = candidate
        tiles = -(-m // rows) * -(-n // columns)
        return -(-tiles // processors) * rows * (columns + _TILE_OVERHEAD_COLUMNS)

    return min(_TILES, key=cost)


@cache
def _tuned() -> dict[str, list[int]]:
    """Read the measured tiles: `"NxK"` -> rows, columns and bytes of a K block."""
    return json.loads(_TUNED.read_text(encoding="utf-8"))["tiles"]


@cache
def _functions() -> tuple[Any, Any]:
    """Return the C functions of the product and of the int4 expansion, with their argument types."""
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    gemm, expand = library().qarvd_gemm, library().qarvd_expand_int4
    gemm.argtypes = [pointer, long, pointer, *[integer] * 4, *[pointer] * 7, integer, pointer, pointer, integer]
    gemm.argtypes += [pointer, pointer, *[integer] * 5, pointer]
    expand.argtypes = [pointer, pointer, pointer, *[integer] * 5, pointer]
    return gemm, expand


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its address is not aligned."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _unsupported_gemm(arguments: Mapping[str, Any]) -> str | None:
    """Return why a product cannot run here, or None."""
    a, weight = arguments["a"], arguments["weight"]
    if a.numel() == 0 or weight.numel() == 0:
        return "an empty tensor"
    sizes = (
        ("K", a.shape[1], _ALIGNMENT),
        ("num_outliers", arguments["num_outliers"], _ALIGNMENT),
        ("N", weight.shape[0], _COLUMNS),
        ("out_outliers", arguments.get("out_outliers", 0), 8),
    )
    for name, size, multiple in sizes:
        if size % multiple:
            return f"{name} is {size}, expected a multiple of {multiple}"
    names = (
        "weight",
        "ratio",
        "scale",
        "bias",
        "row_sums",
        "row_sum_scale",
        "row_scale",
        "out",
        "out_scale",
        "out_zero_point",
        "gate",
    )
    return _unsupported_layout(arguments, names)


def _unsupported_expand(arguments: Mapping[str, Any]) -> str | None:
    """Return why an int4 expansion cannot run here, or None."""
    for name, size in (("K", arguments["out"].shape[1]), ("num_outliers", arguments["num_outliers"])):
        if size % _ALIGNMENT:
            return f"{name} is {size}, expected a multiple of {_ALIGNMENT}"
    if arguments["out"].numel() == 0:
        return "an empty tensor"
    return _unsupported_layout(arguments, ("weight_packed", "weight_zero_point", "out"))


def _unsupported_layout(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return which of these tensors is not contiguous or not aligned, or None."""
    for name in names:
        tensor = arguments.get(name)
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor is not None and tensor.dim() > 1 and tensor.data_ptr() % _ALIGNMENT:
            return f"{name} does not start at a multiple of {_ALIGNMENT} bytes"
    return None
