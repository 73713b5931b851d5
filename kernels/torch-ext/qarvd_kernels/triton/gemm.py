"""Run the operators of `ops.gemm` on every GPU with int8 tensor cores: matrix product, epilogues, int4 expansion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import gemm_config
from .launch import (
    Launcher,
    block_of,
    factors,
    group_quantizer,
    group_values,
    quantize,
    round_to_int,
    unsupported_device,
    unsupported_empty,
)

_MULTIPLE = 16  # of K and of the number of outliers: 16-byte copies never cross the border between the groups
_PLAIN, _GELU, _RESIDUAL = 0, 1, 2
_GELU_, _RESIDUAL_ = tl.constexpr(_GELU), tl.constexpr(_RESIDUAL)


def unsupported_reason(operator: str, device: torch.device, arguments: Mapping[str, Any] | None) -> str | None:
    """Return why the operator cannot run here, or None; see `dispatch`."""
    reason = unsupported_device(device) or unsupported_empty(arguments)
    if reason or arguments is None:
        return reason
    if "out" in arguments and not arguments["out"].is_contiguous():
        return "out is not contiguous"
    if operator == "expand_int4":
        return None
    for name, size in (("K", arguments["a"].shape[1]), ("num_outliers", arguments["num_outliers"])):
        if size % _MULTIPLE:
            return f"{name} is {size}, expected a multiple of {_MULTIPLE}"
    return None


@triton.jit
def _accumulate(acc, a_row, w_row, K: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add the products of channels FIRST ... LAST."""
    k = tl.arange(0, BLOCK_K)
    WHOLE: tl.constexpr = FIRST + (LAST - FIRST) // BLOCK_K * BLOCK_K
    for start in range(FIRST, WHOLE, BLOCK_K):
        a_block = tl.load(a_row + (start + k)[None, :])
        w_block = tl.load(w_row + (start + k)[:, None])
        acc = tl.dot(a_block, w_block, acc, out_dtype=tl.int32)
    if WHOLE < LAST:
        inside = k < LAST - WHOLE
        a_block = tl.load(a_row + (WHOLE + k)[None, :], mask=inside[None, :], other=0)
        w_block = tl.load(w_row + (WHOLE + k)[:, None], mask=inside[:, None], other=0)
        acc = tl.dot(a_block, w_block, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _gelu(x):
    """Apply GELU in tanh form, as x * sigmoid(2 u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(-2.885390081777927 * u))


@triton.jit
def _tile(rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIPE: tl.constexpr):
    """Return first row, rows (counted from the first) and columns of this program's tile."""
    # Programs walk down STRIPE row blocks before the next column block, so that both operands stay in the L2 cache.
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    stripe = program // (STRIPE * blocks_n)
    height = tl.minimum(blocks_m - stripe * STRIPE, STRIPE)
    first = (stripe * STRIPE + program % (STRIPE * blocks_n) % height) * BLOCK_M
    n = (program % (STRIPE * blocks_n) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    return first, tl.arange(0, BLOCK_M), n


@triton.jit
def _rescaled_sum(a_row, w_row, ratio, column, K: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add the products of both channel groups; the sum of the outliers is rescaled between them."""
    acc = tl.zeros([a_row.shape[0], w_row.shape[1]], tl.int32)
    if OUTLIERS > 0:
        acc = _accumulate(acc, a_row, w_row, K, 0, OUTLIERS, BLOCK_K)
        acc = round_to_int(acc.to(tl.float32) * tl.load(ratio + column)[None, :])
    return _accumulate(acc, a_row, w_row, K, OUTLIERS, K, BLOCK_K)


@triton.jit
def _scaled(acc, scale, bias, row_sums, row_sum_scale, row_scale, row, column, N: tl.constexpr):
    """Scale the sums, and add bias and the remainder of the weight zero-points; None stands for what there is not."""
    y = acc.to(tl.float32)
    if row_scale is not None:
        y *= tl.load(row_scale + row)[:, None]
    y = y * tl.load(scale + column)[None, :] + tl.load(bias + column)[None, :]
    if row_sums is not None:
        for group in tl.static_range(2):
            sums = tl.load(row_sums + row * 2 + group).to(tl.float32)
            y -= sums[:, None] * tl.load(row_sum_scale + group * N + column)[None, :]
    return y


@triton.jit
def _gelu_codes(y, out_scale, out_zero_point, OUT_OUTLIERS: tl.constexpr, n):
    """Apply GELU and the static quantizer of the next layer."""
    inverse, low, offset = group_quantizer(out_scale, out_zero_point, OUT_OUTLIERS, n)
    return quantize(_gelu(y), inverse[None, :], low[None, :], offset[None, :])


@triton.jit
def _add_residual(y, residual, start, at, gate, mask):
    """Add the residual, at offset `start + at`, to the gated product; gate may be None."""
    if gate is not None:
        y *= tl.load(gate)
    return y + tl.load(residual + start + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "rows_per_gate"])
def dual_scale_gemm_kernel(
    a,
    weight,
    ratio,
    scale,
    bias,
    row_sums,
    row_sum_scale,
    row_scale,
    residual,
    gate,
    out_scale,
    out_zero_point,
    out,
    rows,
    rows_per_gate,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUT_OUTLIERS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIPE: tl.constexpr,
):
    """Compute one tile of a dual-scale product, with its epilogue."""
    first, m, n = _tile(rows, N, BLOCK_M, BLOCK_N, STRIPE)
    # Rows past the end repeat the last one and are not stored. Scalars hold the large products: offsets fit 32 bits.
    row, column = tl.minimum(m, rows - first - 1), n % N
    a_row = a + first.to(tl.int64) * K + row[:, None] * K
    w_row = weight + column[None, :] * K
    y = _rescaled_sum(a_row, w_row, ratio, column, K, OUTLIERS, BLOCK_K)
    mask = (m[:, None] < rows - first) & (n[None, :] < N)
    start, at = first.to(tl.int64) * N, row[:, None] * N + n[None, :]
    if out.dtype.element_ty != tl.int32:
        y = _scaled(y, scale, bias, row_sums, row_sum_scale, row_scale, first + row, column, N)
        if EPILOGUE == _GELU_:
            y = _gelu_codes(y, out_scale, out_zero_point, OUT_OUTLIERS, n)
        elif EPILOGUE == _RESIDUAL_:
            gate_row = None if gate is None else gate + ((first + row) // rows_per_gate)[:, None] * N + column[None, :]
            y = _add_residual(y, residual, start, at, gate_row, mask)
    tl.store(out + start + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def expand_int4_kernel(
    packed, zero_point, out, BYTES: tl.constexpr, OUTLIERS: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Expand a part of one row of a 4-bit weight."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(packed + row * BYTES + at, mask=at < BYTES, other=0).to(tl.int8, bitcast=True)
    codes = tl.interleave(byte & 15, (byte >> 4) & 15)
    channel = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    mask = channel < 2 * BYTES
    if GROUPED:
        factor, offset = factors(zero_point + row * (BYTES // 8), channel, mask)
        codes = (factor * (codes.to(tl.int32) - offset)).to(tl.int8)
    else:
        offset = group_values(zero_point + row * 2, OUTLIERS, channel)
        codes -= tl.minimum(tl.maximum(offset, 0), 15).to(tl.int8)
    tl.store(out + row * (2 * BYTES) + channel, codes, mask=mask)


_gemm = Launcher(dual_scale_gemm_kernel)
_expand_int4 = Launcher(expand_int4_kernel)


def _launch(
    product: Sequence[Any],
    dtype: torch.dtype,
    epilogue: int,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    quantizer: tuple[Tensor | None, Tensor | None, int] = (None, None, 0),
    out: Tensor | None = None,
) -> Tensor:
    """Compute a product (the fields of `Product`) in `dtype`; write it to `out`, or to a new tensor."""
    a, weight, num_outliers, ratio, scale, bias, *rows = product
    (m, k), n = a.shape, weight.shape[0]
    if out is None:
        out = torch.empty((m, n), dtype=dtype, device=a.device)
    out_scale, out_zero_point, out_outliers = quantizer
    block_m, block_n, block_k, stripe, warps, stages = gemm_config(a.get_device(), m, n, k, epilogue == _RESIDUAL)
    _gemm(
        (-(-m // block_m) * -(-n // block_n), 1, 1),
        (a, weight, ratio, scale, bias, *rows, residual, gate, out_scale, out_zero_point, out),
        (m, 1 if gate is None else m // gate.shape[0]),
        (n, k, num_outliers, out_outliers, epilogue, block_m, block_n, block_k, stripe),
        (warps, stages),
        (out.dtype, rows[0] is None, rows[2] is None, gate is None),
    )
    return out


def dual_scale_gemm(*arguments: Any) -> Tensor:
    """Return `[M, N]` in `out_dtype`; int32 is the sum before the epilogue."""
    *product, out_dtype = arguments
    return _launch(product, out_dtype, _PLAIN)


def dual_scale_gemm_out(*arguments: Any) -> None:
    """Write `dual_scale_gemm` in the dtype of `out` to `out`."""
    *product, out = arguments
    _launch(product, out.dtype, _PLAIN, out=out)


def dual_scale_gemm_gelu(*arguments: Any) -> Tensor:
    """Return int8 `[M, N]`: GELU and static quantization of the product."""
    *product, out_scale, out_zero_point, out_outliers = arguments
    return _launch(product, torch.int8, _GELU, quantizer=(out_scale, out_zero_point, out_outliers))


def dual_scale_gemm_residual(*arguments: Any) -> Tensor:
    """Return `[M, N]` in the dtype of `residual`: the residual plus the gated product."""
    *product, residual, gate = arguments
    return _launch(product, residual.dtype, _RESIDUAL, residual, gate)


def expand_int4(weight_packed: Tensor, weight_zero_point: Tensor, num_outliers: int, out: Tensor) -> None:
    """Write the int8 operand `[N, K]` of a 4-bit weight into `out`."""
    (n, columns), block = weight_packed.shape, block_of(weight_packed.shape[1], 1024)
    grid, grouped = (n, triton.cdiv(columns, block), 1), int(weight_zero_point.dtype == torch.uint8)
    _expand_int4(
        grid, (weight_packed, weight_zero_point, out), (), (columns, num_outliers, grouped, block), (4, 1), ()
    )
