"""Reference implementations of `ops.linear`, in integer arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .groups import CODE_OFFSET, group_slices, spread


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute `a @ b.T` of int8 `[M, K]` and `[N, K]`, exact in int32 `[M, N]`."""
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, n, k):
        return torch.zeros(m, n, dtype=torch.int32, device=a.device)
    # Zeros change no sum. cuBLAS requires more than 16 rows and multiples of 8. On the CPU a `[1, N]` operand with
    # strides (1, 1) is taken for its transpose, so that K = 1 gives wrong results.
    if a.is_cuda:
        pad_m, pad_n, pad_k = max(17 - m, 0), -n % 8, -k % 8
    else:
        pad_m, pad_n, pad_k = 0, 0, int(k == 1)
    a, b = F.pad(a, (0, pad_k, 0, pad_m)), F.pad(b, (0, pad_k, 0, pad_n))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n]


def unpack_weight(weight_packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8 `[N, K * bits / 8]` to uint8 codes `[N, K]`.

    An 8-bit code is stored with its top bit flipped; of two 4-bit codes in a byte the low nibble comes first.
    """
    if bits == 8:
        return weight_packed ^ CODE_OFFSET
    return torch.stack([weight_packed & 15, weight_packed >> 4], dim=-1).flatten(-2)


def grouped_steps(codes: Tensor, groups: Tensor) -> Tensor:
    """Compute `factor * (code - zero_point)` of codes `[N, K]` and bytes `[N, K / 16]`, int16."""
    groups = groups.to(torch.int16).repeat_interleave(codes.shape[1] // groups.shape[1], dim=1)
    return ((groups & 15) + 1) * (codes.to(torch.int16) - (groups >> 4))


def integer_weight(
    weight_packed: Tensor, weight_zero_point: Tensor, bits: int, num_outliers: int
) -> tuple[Tensor, Tensor]:
    """Split a weight into signed bytes and the remainder of its zero-point.

    A 4-bit code minus its zero-point fits a signed byte, so the remainder is 0 as long as the zero-point is a code; so
    does the operand of a weight in groups (see `StoredWeight`). An 8-bit code is stored with an offset of 128, so the
    remainder is `zero_point - 128` (0 for symmetric weights).

    Returns:
        int8 `[N, K]` operand and int32 `[N, 2]` remainder, with `code - zero_point == operand - remainder`.
    """
    if weight_zero_point.dtype == torch.uint8:
        operand = grouped_steps(unpack_weight(weight_packed, bits), weight_zero_point).to(torch.int8)
        return operand, torch.zeros(len(operand), 2, dtype=torch.int32, device=operand.device)
    zero_point = weight_zero_point.to(torch.int32)
    if bits == 8:
        return weight_packed.view(torch.int8), zero_point - CODE_OFFSET
    codes = unpack_weight(weight_packed, bits).view(torch.int8)
    offset = zero_point.clamp(0, 15)
    return codes - spread(offset.to(torch.int8), codes.shape[1], num_outliers), zero_point - offset


def _dual_scale_linear(
    a: Tensor, a_zero_point: Tensor | None, a_scale: Tensor, weight: tuple[Tensor, Tensor, Tensor], num_outliers: int
) -> Tensor:
    """Compute float32 `[M, N]` from exact integer sums.

        sum_g a_scale[g] * weight_scale[:, g] * sum_k (a - a_zero_point[g]) (w - remainder[:, g])

    The sums over k are exact integers. int32 arithmetic wraps, so only their final value has to fit, not each term.
    """
    operand, remainder, weight_scale = weight
    m, k = a.shape
    total = torch.zeros(m, operand.shape[0], dtype=torch.float32, device=a.device)
    for g, part in enumerate(group_slices(k, num_outliers)):
        a_g, w_g = a[:, part], operand[:, part]
        acc = int_matmul(a_g, w_g)
        row_sums = a_g.sum(dim=1, dtype=torch.int32)
        if a_zero_point is not None:
            row_sums = row_sums - a_zero_point[g] * a_g.shape[1]
            acc = acc - a_zero_point[g] * w_g.sum(dim=1, dtype=torch.int32)
        acc = acc - row_sums[:, None] * remainder[:, g]
        total.addcmul_(acc.to(torch.float32), a_scale[:, g, None] * weight_scale[:, g])
    return total


def _finish(total: Tensor, a: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if bias is not None:
        total = total + bias.to(torch.float32)
    return total.to(out_dtype).reshape(*a.shape[:-1], total.shape[1])


def dual_scale_linear_static(a: Tensor, *arguments: Any) -> Tensor:
    """Multiply int8 `[..., K]` by the packed weight and add the bias; return `[..., N]` in `out_dtype`."""
    packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, bits, outliers, out_dtype = arguments
    weight = (*integer_weight(packed, weight_zero_point, bits, outliers), weight_scale)
    rows = a.reshape(-1, a.shape[-1])
    total = _dual_scale_linear(rows, input_zero_point - CODE_OFFSET, input_scale[None], weight, outliers)
    return _finish(total, a, bias, out_dtype)


def dual_scale_linear_dynamic(a: Tensor, a_scale: Tensor, *arguments: Any) -> Tensor:
    """Multiply int8 `[..., K]` with scales `[..., 2]` by the packed weight; return `[..., N]` in `out_dtype`."""
    packed, weight_scale, weight_zero_point, bias, bits, outliers, out_dtype = arguments
    weight = (*integer_weight(packed, weight_zero_point, bits, outliers), weight_scale)
    total = _dual_scale_linear(a.reshape(-1, a.shape[-1]), None, a_scale.reshape(-1, 2), weight, outliers)
    return _finish(total, a, bias, out_dtype)


def dequantize_weight(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    channel_order: Tensor,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return the weight `[N, K]` in its original channel order, computed in float32."""
    codes = unpack_weight(weight_packed, bits)
    k = codes.shape[1]
    if weight_zero_point.dtype == torch.uint8:
        codes = grouped_steps(codes, weight_zero_point).to(torch.float32)
    else:
        codes = codes.to(torch.float32) - spread(weight_zero_point, k, num_outliers)
    codes *= spread(weight_scale, k, num_outliers)
    weight = torch.empty_like(codes, dtype=out_dtype)
    return weight.index_copy_(1, channel_order.to(torch.int64), codes.to(out_dtype))


def weight_only_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
) -> Tensor:
    """Multiply float `[..., K]` by the dequantized weight and add the bias; return `[..., N]` in the dtype of x."""
    weight = dequantize_weight(
        weight_packed, weight_scale, weight_zero_point, channel_order, bits, num_outliers, x.dtype
    )
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
