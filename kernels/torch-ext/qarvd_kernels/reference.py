"""The truth of every operator, in plain torch: real integer arithmetic, exact on any device torch runs on.

Conventions, for a linear layer with K input and N output channels:

* channels are permuted so that the `num_outliers` outlier channels come first; group 0 is `[0, num_outliers)`, group 1
  the rest. Either group may be empty.
* a weight is `(code - weight_zero_point[n, g]) * weight_scale[n, g]`, code in `[0, 2**bits - 1]`;
* a static activation is `(code - input_zero_point[g]) * input_scale[g]`, code in `[0, 255]`, held as `code - 128` in int8;
* a dynamic activation is `code * scale[m, g]`, code in `[-127, 127]`.

Arguments are not checked here: see `checks`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# 8-bit codes count without sign, integer matrix products take signed bytes: the difference between the two.
CODE_OFFSET = 128
DYNAMIC_LEVELS = 127


def group_slices(in_features: int, num_outliers: int) -> tuple[slice, slice]:
    """Where the two groups lie on a permuted channel axis."""
    return slice(0, num_outliers), slice(num_outliers, in_features)


def spread(values: Tensor, in_features: int, num_outliers: int) -> Tensor:
    """`[..., 2]` values per group -> `[..., in_features]` values per permuted channel."""
    outlier, normal = values[..., :1], values[..., 1:]
    shape = values.shape[:-1]
    return torch.cat([outlier.expand(*shape, num_outliers), normal.expand(*shape, in_features - num_outliers)], dim=-1)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 `[M, K]` and `[N, K]`, exact in int32 `[M, N]`."""
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, n, k):
        return torch.zeros(m, n, dtype=torch.int32, device=a.device)
    if a.is_cuda:  # cuBLAS wants more than 16 rows and multiples of 8; zeros change no sum
        pad_m, pad_n, pad_k = max(17 - m, 0), -n % 8, -k % 8
        a, b = F.pad(a, (0, pad_k, 0, pad_m)), F.pad(b, (0, pad_k, 0, pad_n))
        return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n]
    return torch._int_mm(a.contiguous(), b.contiguous().t())


def unpack_weight(weight_packed: Tensor, bits: int) -> Tensor:
    """uint8 `[N, K * bits / 8]` -> uint8 codes `[N, K]`.

    An 8-bit code is stored with its top bit flipped; of two 4-bit codes in a byte the low nibble comes first.
    """
    if bits == 8:
        return weight_packed ^ CODE_OFFSET
    return torch.stack([weight_packed & 15, weight_packed >> 4], dim=-1).flatten(-2)


def integer_weight(
    weight_packed: Tensor, weight_zero_point: Tensor, bits: int, num_outliers: int
) -> tuple[Tensor, Tensor]:
    """Weights as signed bytes, and what is left of the zero-point.

    A 4-bit code minus its zero-point fits a signed byte, so nothing is left as long as the zero-point is a code; an 8-bit
    code is stored moved by 128, which leaves `zero_point - 128` (zero for symmetric weights).

    Returns:
        int8 `[N, K]` operand and int32 `[N, 2]` remainder, with `code - zero_point == operand - remainder`.
    """
    zero_point = weight_zero_point.to(torch.int32)
    if bits == 8:
        return weight_packed.view(torch.int8), zero_point - CODE_OFFSET
    codes = unpack_weight(weight_packed, bits).view(torch.int8)
    offset = zero_point.clamp(0, 15)
    return codes - spread(offset.to(torch.int8), codes.shape[1], num_outliers), zero_point - offset


def quantize_static(
    x: Tensor, channel_order: Tensor, num_outliers: int, input_scale: Tensor, input_zero_point: Tensor
) -> Tensor:
    """Float `[..., K]` -> int8 `[..., K]`, permuted, `clamp(round(x / scale) + zero_point, 0, 255) - 128`."""
    k = x.shape[-1]
    permuted = x.index_select(-1, channel_order).to(torch.float32)
    scale = spread(input_scale, k, num_outliers)
    zero_point = spread(input_zero_point, k, num_outliers)
    codes = permuted.div_(scale).round_().add_(zero_point).clamp_(0, 255)
    return codes.sub_(CODE_OFFSET).to(torch.int8)


def quantize_dynamic(x: Tensor, channel_order: Tensor, num_outliers: int) -> tuple[Tensor, Tensor]:
    """Float `[..., K]` -> int8 `[..., K]`, permuted, and float32 scale `[..., 2]` = largest magnitude of the group / 127.

    A group that is empty or all zero has scale 1.
    """
    k = x.shape[-1]
    permuted = x.index_select(-1, channel_order).to(torch.float32)
    groups = [permuted[..., part] for part in group_slices(k, num_outliers)]
    amax = [g.abs().amax(-1) if g.shape[-1] else g.new_zeros(g.shape[:-1]) for g in groups]
    scale = torch.stack(amax, dim=-1) / DYNAMIC_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    codes = permuted.div_(spread(scale, k, num_outliers)).round_().clamp_(-DYNAMIC_LEVELS, DYNAMIC_LEVELS)
    return codes.to(torch.int8), scale


def _dual_scale_linear(
    a: Tensor, a_zero_point: Tensor | None, a_scale: Tensor, weight: tuple[Tensor, Tensor, Tensor], num_outliers: int
) -> Tensor:
    """`sum_g a_scale[g] * weight_scale[:, g] * sum_k (a - a_zero_point[g]) (w - remainder[:, g])` in float32 `[M, N]`.

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


def dual_scale_linear_static(
    a: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """int8 `[..., K]` of `quantize_static` times the packed weight, plus bias -> `[..., N]` in `out_dtype`."""
    operand, remainder = integer_weight(weight_packed, weight_zero_point, bits, num_outliers)
    rows = a.reshape(-1, a.shape[-1])
    zero_point = input_zero_point - CODE_OFFSET
    total = _dual_scale_linear(rows, zero_point, input_scale[None], (operand, remainder, weight_scale), num_outliers)
    return _finish(total, a, bias, out_dtype)


def dual_scale_linear_dynamic(
    a: Tensor,
    a_scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """int8 `[..., K]` and scale `[..., 2]` of `quantize_dynamic` times the packed weight -> `[..., N]` in `out_dtype`."""
    operand, remainder = integer_weight(weight_packed, weight_zero_point, bits, num_outliers)
    rows, scale = a.reshape(-1, a.shape[-1]), a_scale.reshape(-1, 2)
    total = _dual_scale_linear(rows, None, scale, (operand, remainder, weight_scale), num_outliers)
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
    """The weight `[N, K]` in its original channel order, computed in float32."""
    codes = unpack_weight(weight_packed, bits).to(torch.float32)
    k = codes.shape[1]
    codes -= spread(weight_zero_point, k, num_outliers)
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
    """Float `[..., K]` times the de-quantized weight, plus bias -> `[..., N]` in the dtype of x."""
    weight = dequantize_weight(
        weight_packed, weight_scale, weight_zero_point, channel_order, bits, num_outliers, x.dtype
    )
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
