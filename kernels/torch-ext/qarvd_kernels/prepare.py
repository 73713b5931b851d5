"""Fold a stored layer into the constants that the dual-scale integer matrix product reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.arguments import Product
from .ops.gemm import dual_scale_gemm, dual_scale_gemm_out, expand_int4
from .ops.quantize import row_sums
from .reference.groups import CODE_OFFSET, group_slices
from .reference.linear import integer_weight


class LayerRefused(ValueError):
    """Raised for a layer that the prepared path cannot run; `dual_scale_linear_static` can."""


@dataclass(frozen=True, eq=False)
class PreparedLinear:
    """Folded constants of an int8 layer, with static activations or with a scale per row.

    Every call is passed the weight, so that offloading can move it between calls.

    Attributes:
        in_features: K.
        bits: 4 or 8.
        stored_outliers: size of group 0 as stored, for `expand_int4`.
        weight_zero_point: for `expand_int4`, see `StoredWeight`; None for 8 bits.
        num_outliers: size of group 0 in the matrix product; 0 if either group is empty.
        ratio: float32 `[N]`.
        scale: float32 `[N]`.
        bias: float32 `[N]`.
        row_sum_scale: float32 `[2, N]`, or None if the weight zero-points leave no remainder (the usual case).
    """

    in_features: int
    bits: int
    stored_outliers: int
    weight_zero_point: Tensor | None
    num_outliers: int
    ratio: Tensor
    scale: Tensor
    bias: Tensor
    row_sum_scale: Tensor | None

    @property
    def out_features(self) -> int:
        """N."""
        return self.scale.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the constants."""
        return self.scale.device

    def operand(self, weight_packed: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Return the weight as int8 `[N, K]`: a view of 8-bit codes; 4-bit codes are expanded.

        Args:
            weight_packed: uint8 `[N, K * bits / 8]`, as stored.
            scratch: int8, contiguous, of at least N * K elements, overwritten for 4-bit codes. It holds one layer's
                operand until the next layer on the same stream overwrites it. None allocates.
        """
        if self.bits == 8:
            return weight_packed.view(torch.int8)
        shape = (self.out_features, self.in_features)
        if scratch is None:
            out = torch.empty(shape, dtype=torch.int8, device=weight_packed.device)
        else:
            out = scratch.view(-1)[: shape[0] * shape[1]].view(shape)
        expand_int4(weight_packed, self.weight_zero_point, self.stored_outliers, out)
        return out

    def gemm_arguments(
        self, a: Tensor, weight_packed: Tensor, scratch: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Product:
        """Return the first arguments of every `dual_scale_gemm*`.

        Args:
            a: int8 `[M, K]` of `quantize_static`, `quantize_rows` or a fused producer, in the layer's stored channel
                order.
            weight_packed: as in `operand`.
            scratch: as in `operand`.
            row_scale: float32 `[M]` of `quantize_rows`, else None.
        """
        sums = None if self.row_sum_scale is None else row_sums(a, self.num_outliers)
        weight = self.operand(weight_packed, scratch)
        constants = (self.ratio, self.scale, self.bias)
        return Product(a, weight, self.num_outliers, *constants, sums, self.row_sum_scale, row_scale)

    def __call__(
        self,
        a: Tensor,
        weight_packed: Tensor,
        out_dtype: torch.dtype,
        scratch: Tensor | None = None,
        out: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute `[M, N]` in `out_dtype`: `dual_scale_linear_static` up to one rounding of the outlier sum.

        Args:
            a: as in `gemm_arguments`.
            weight_packed: as in `operand`.
            out_dtype: bfloat16, float16, float32, or int32 for the sum before the epilogue.
            scratch: as in `operand`.
            out: `[M, N]`, to write the result to, in its own dtype; None allocates.
            row_scale: as in `gemm_arguments`.
        """
        arguments = self.gemm_arguments(a, weight_packed, scratch, row_scale)
        if out is None:
            return dual_scale_gemm(*arguments, out_dtype)
        dual_scale_gemm_out(*arguments, out)
        return out


@torch.no_grad()
def prepare_linear(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    num_outliers: int,
) -> PreparedLinear:
    """Fold scales, zero-points and bias of a layer; reads tensor values.

    With a' = code - 128, zA' = zA - 128, operand w' and remainder r of the weight zero-point (`integer_weight`),
    exactly

        y = bias + sum_g sA_g sW_g[n] * (S_a'w' - r_g[n] * sum_k a' - zA'_g * (sum_k w' - K_g r_g[n]))

    and everything without a' is one float32 number per output channel. Layers that share their input quantizer and
    channel order (q, k and v) may be concatenated along N before.

    Args:
        weight_packed: uint8 `[N, K * bits / 8]`.
        weight_scale: float32 `[N, 2]`.
        weight_zero_point: see `StoredWeight`.
        input_scale: float32 `[2]`; None for inputs of `quantize_rows`, whose scale comes with every product.
        input_zero_point: int32 `[2]`, or None likewise.
        bias: float `[N]` or None.
        bits: 4 or 8.
        num_outliers: size of group 0.

    Raises:
        LayerRefused: the int32 sum of an input could overflow, or a layer without input scale has zero-points that
            leave a remainder.
    """
    if input_scale is None or input_zero_point is None:
        input_scale = torch.ones(2, device=weight_scale.device)
        input_zero_point = torch.full((2,), CODE_OFFSET, dtype=torch.int32, device=weight_scale.device)
        of_rows = True
    else:
        of_rows = False
    operand, remainder = integer_weight(weight_packed, weight_zero_point, bits, num_outliers)
    groups = group_slices(operand.shape[1], num_outliers)
    combined = (input_scale.double() * weight_scale.double()).T  # [2, N]
    remainder = remainder.double().T
    folded = torch.zeros_like(combined[0]) if bias is None else bias.double()
    for g, part in enumerate(groups):
        sums = operand[:, part].sum(dim=1, dtype=torch.int32).double()
        zero_point = input_zero_point[g].double() - CODE_OFFSET
        folded = folded - combined[g] * zero_point * (sums - (part.stop - part.start) * remainder[g])
    row_sum_scale = combined * remainder
    if num_outliers in (0, operand.shape[1]):  # one group: it takes the place of the second, without a re-scaling
        only = 1 if num_outliers == 0 else 0
        split, scale, ratio = 0, combined[only], torch.ones_like(combined[only])
        used = remainder[only]
        row_sum_scale = torch.stack([torch.zeros_like(scale), row_sum_scale[only]])
    else:
        split, scale, ratio, used = num_outliers, combined[1], combined[0] / combined[1], remainder
    if of_rows and bool(used.any()):
        raise LayerRefused(
            "asymmetric 8-bit weights beside a scale per row: it runs on the unprepared operators instead"
        )
    whole_bytes = bits == 8 or weight_zero_point.dtype == torch.uint8
    _check_sums(ratio, split, operand.shape[1], whole_bytes)
    return PreparedLinear(
        operand.shape[1],
        bits,
        num_outliers,
        weight_zero_point.detach() if bits == 4 else None,
        split,
        ratio.float().contiguous(),
        scale.float().contiguous(),
        folded.float().contiguous(),
        row_sum_scale.float().contiguous() if bool(used.any()) else None,
    )


def _check_sums(ratio: Tensor, num_outliers: int, in_features: int, whole_bytes: bool) -> None:
    """Raise LayerRefused if the rescaled outlier sum plus the normal sum could overflow int32."""
    step = CODE_OFFSET * (CODE_OFFSET if whole_bytes else 15)
    largest = float(ratio.max()) if ratio.numel() else 1.0
    reach = num_outliers * step * max(largest, 1.0) + (in_features - num_outliers) * step
    if not reach < 2**31:  # also where a scale of zero made the ratio infinite or not a number
        raise LayerRefused(
            f"the largest integer sum of this layer is {num_outliers} * {step} * {largest:.4g} + "
            f"{in_features - num_outliers} * {step}, expected less than 2**31; "
            "it runs on the unprepared operators instead"
        )
