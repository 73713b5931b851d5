"""Define arguments that several operators share; callers pass the fields one by one, see `declare.operator`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..declare import Constant


class Product(NamedTuple):
    """Operands and folded constants of a dual-scale integer matrix product.

    Attributes:
        a: int8 `[M, K]`, stored channel order.
        weight: int8 `[N, K]`.
        num_outliers: size of group 0.
        ratio: float32 `[N]`, scale of group 0 over scale of group 1.
        scale: float32 `[N]`.
        bias: float32 `[N]`, with the constant part of all zero-points folded in.
        row_sums: int32 `[M, 2]`, the result of `row_sums`; or None.
        row_sum_scale: float32 `[2, N]`; given together with `row_sums`.
        row_scale: float32 `[M]`, of rows that were quantized with a scale of their own; or None. Not with `row_sums`.
    """

    a: Tensor
    weight: Tensor
    num_outliers: int
    ratio: Tensor
    scale: Tensor
    bias: Tensor
    row_sums: Tensor | None
    row_sum_scale: Tensor | None
    row_scale: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the result, `(M, N)`."""
        return self.a.shape[0], self.weight.shape[0]


class StoredWeight(NamedTuple):
    """Packed weight of a layer with N output and K input channels, as it is stored.

    Attributes:
        weight_packed: uint8 `[N, K * bits / 8]`, permuted channels.
        weight_scale: float32 `[N, 2]`.
        weight_zero_point: int16 `[N, 2]`. Or, for 4 bits, uint8 `[N, K / 16]`: of every 16 neighbouring channels as
            stored, the zero-point (high nibble) and an integer factor less one (low nibble; QServe, arXiv 2405.04532).
            The weight is then `factor * (code - zero_point) * weight_scale`, and its integer part fits int8.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor


class InputQuantizer(NamedTuple):
    """Static quantizer of a layer's input with K channels.

    Attributes:
        channel_order: int32 `[K]`; stored channel j is channel `channel_order[j]`.
        num_outliers: size of group 0.
        input_scale: float32 `[2]`, positive.
        input_zero_point: int32 `[2]`, in codes 0..255.
    """

    channel_order: Tensor
    num_outliers: int
    input_scale: Tensor
    input_zero_point: Tensor

    def check(self, x: Tensor) -> None:
        """Raise a ValueError unless this can quantize `x`, float `[..., K]`."""
        checks.activation(x, self.channel_order, self.num_outliers)
        checks.input_quantizer(self.input_scale, self.input_zero_point)


class RowQuantizer(NamedTuple):
    """Quantizer that gives every row of K channels a scale of its own.

    Channels that are far louder or softer than the weights that read them are scaled first (SmoothQuant, arXiv
    2211.10438); then blocks of neighbouring channels are rotated by an orthonormal Walsh-Hadamard transform, which is
    its own inverse (QuaRot, arXiv 2404.00456), so that loud channels spread over their block. The weight of the layer
    is divided by the same scales and rotated alike.

    Attributes:
        channel_scale: float32 `[K]`, positive, by which the channels are multiplied.
        rotation: channels of a block, a power of two that divides K; 1 rotates nothing.
    """

    channel_scale: Tensor
    rotation: Constant

    def check(self, x: Tensor) -> None:
        """Raise a ValueError unless this can quantize `x`, float `[..., K]`."""
        checks.require(x.is_floating_point(), "dtype of the activation", x.dtype, "a floating-point dtype")
        checks.require(x.ndim >= 1, "the activation", "a scalar", "at least one dimension")
        checks.tensor("channel_scale", self.channel_scale, (x.shape[-1],), torch.float32)
        checks.rotation(self.rotation, x.shape[-1])


class Norm(NamedTuple):
    """LayerNorm over C channels, with optional affine parameters and modulation.

    Attributes:
        weight: float32 `[C]` of an affine LayerNorm, or None.
        norm_bias: float32 `[C]` likewise; given together with `weight`.
        scale: float32 `[G, C]` modulation or None; row m of M uses `g = m // (M / G)`, e.g. one row per latent frame.
        shift: float32 `[G, C]` likewise; given together with `scale`.
        eps: added to the variance.
    """

    weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    eps: float


class QKNorm(NamedTuple):
    """RMSNorm of q and k over all H heads of D channels.

    Attributes:
        q_weight: float32 `[H * D]` of the RMSNorm of q.
        k_weight: float32 `[H * D]` of the RMSNorm of k.
        eps: added to the mean square.
    """

    q_weight: Tensor
    k_weight: Tensor
    eps: float


class CacheScales(NamedTuple):
    """Scales of 8-bit queries, keys and values.

    Attributes:
        query_scale: float32 `[H]`, to return q quantized like the keys; or None.
        key_scale: float32 `[H]`, or `[B, H]` (one per sample), for an 8-bit `key_cache`, else None.
        value_scale: float32 `[H]` or `[B, H]` for an 8-bit `value_cache`, else None.
    """

    query_scale: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
