"""Run a transformer block on integer kernels, with quantization fused into the kernels that compute the values.

Every linear layer reads the codes that another kernel writes: that of the residual sum and norm before it, or the GELU
in the epilogue of the layer before it. The block computes what `WanTransformerBlock` does with quantized linear
layers, except that the results of norms and GELU are quantized from float32, without being rounded to the model's
dtype first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

import qarvd_kernels as ops

from ...quantization.linear import PER_ROW, QARVDLinear
from .attention import CachedSelfAttention, attend


class Codes(NamedTuple):
    """Hold the input of a product: int8 `[M, K]`, and the scale of every row, float32 `[M]`, if it has its own."""

    codes: Tensor
    row_scale: Tensor | None = None


class StaticQuantizer(NamedTuple):
    """Quantize with calibrated scales; the fields are the last arguments of `quantize_static` and fused operators."""

    channel_order: Tensor
    num_outliers: int
    input_scale: Tensor
    input_zero_point: Tensor

    def __call__(self, x: Tensor) -> Codes:
        """Quantize `[M, K]`."""
        return Codes(ops.quantize_static(x, *self))

    def normed(self, x: Tensor, norm: tuple) -> Codes:
        """Normalize `[M, K]` by the arguments of `norm_quantize`, and quantize."""
        return Codes(ops.norm_quantize(x, *norm, *self))

    def normed_sum(self, x: Tensor, y: Tensor, gate: Tensor | None, norm: tuple) -> Codes:
        """Replace x by the gated sum; normalize and quantize that."""
        return Codes(ops.add_norm_quantize_(x, y, gate, *norm, *self))

    def equals(self, other: Quantizer) -> bool:
        """Return whether both give the same codes; compares tensor values."""
        return (
            isinstance(other, StaticQuantizer)
            and self.num_outliers == other.num_outliers
            and all(torch.equal(a, b) for a, b in zip(self, other, strict=True) if isinstance(a, Tensor))
        )


class TokenQuantizer(NamedTuple):
    """Quantize every row with a scale of its own; the fields are those of `RowQuantizer`."""

    channel_scale: Tensor
    rotation: int

    def __call__(self, x: Tensor) -> Codes:
        """Quantize `[M, K]`."""
        return Codes(*ops.quantize_rows(x, *self))

    def normed(self, x: Tensor, norm: tuple) -> Codes:
        """Normalize `[M, K]` by the arguments of `norm_quantize`, and quantize."""
        return Codes(*ops.norm_quantize_rows(x, *norm, *self))

    def normed_sum(self, x: Tensor, y: Tensor, gate: Tensor | None, norm: tuple) -> Codes:
        """Replace x by the gated sum; normalize and quantize that."""
        return Codes(*ops.add_norm_quantize_rows_(x, y, gate, *norm, *self))

    def equals(self, other: Quantizer) -> bool:
        """Return whether both give the same codes; compares tensor values."""
        return (
            isinstance(other, TokenQuantizer)
            and self.rotation == other.rotation
            and torch.equal(self.channel_scale, other.channel_scale)
        )


Quantizer = StaticQuantizer | TokenQuantizer


def quantizer_of(layer: QARVDLinear) -> Quantizer:
    """Return the quantizer of a layer's input."""
    if layer.activation == "token":
        return TokenQuantizer(layer.channel_scale, layer.rotation)
    return StaticQuantizer(layer.channel_order, layer.num_outliers, layer.input_scale, layer.input_zero_point)


class Workspace:
    """Hold one expanded 4-bit weight at a time, for all layers in turn; it is small enough for the GPU's L2 cache."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def get(self, packed: Tensor, bits: int) -> Tensor | None:
        """Return an int8 buffer for the expanded weight, valid until the next call; None for 8-bit weights."""
        if bits == 8:
            return None
        device, size = packed.device, packed.numel() * 8 // bits
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        return self._buffer


class IntegerProduct:
    """Multiply codes by the weights of one layer, or of several layers that read the same codes.

    The parameters of several layers are concatenated, and become views of the result, so that no weight is held twice.
    A 4-bit weight is expanded into the workspace for every product.
    """

    def __init__(self, layers: Sequence[QARVDLinear], workspace: Workspace) -> None:
        first = layers[0]
        packed, scale, zero_point, bias = (_concatenated(layers, name) for name in PER_ROW)
        self.quantizer = quantizer_of(first)
        self._workspace = workspace
        constants = (first.input_scale, first.input_zero_point, bias, first.weight_bits, first.num_outliers)
        self._packed = packed.detach()
        self._prepared = ops.prepare_linear(packed, scale, zero_point, *constants)

    def __call__(self, codes: Codes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Multiply `[M, K]`.

        Args:
            codes: of `quantizer`.
            dtype: of the result.
            out: `[M, N]` in `dtype`, contiguous, to write the result to; None allocates.

        Returns:
            `[M, N]` in `dtype`.
        """
        return self._prepared(codes.codes, self._packed, dtype, self._scratch(), out, codes.row_scale)

    def gelu(self, codes: Codes, next_quantizer: Quantizer, dtype: torch.dtype) -> Codes:
        """Multiply `[M, K]`; return the tanh-GELU of the product as codes `[M, N]` of the next layer.

        The product writes static codes itself. A scale per row needs the whole row, which is written in `dtype` first.
        """
        if isinstance(next_quantizer, TokenQuantizer):
            return next_quantizer(F.gelu(self(codes, dtype), approximate="tanh"))
        arguments = self._prepared.gemm_arguments(codes.codes, self._packed, self._scratch(), codes.row_scale)
        _, outliers, scale, zero_point = next_quantizer
        return Codes(ops.dual_scale_gemm_gelu(*arguments, scale, zero_point, outliers))

    def _scratch(self) -> Tensor | None:
        return self._workspace.get(self._packed, self._prepared.bits)


def _concatenated(layers: Sequence[QARVDLinear], name: str) -> Tensor | None:
    """Concatenate a parameter of several layers, each of which becomes a view of the result."""
    tensors = [getattr(layer, name) for layer in layers]
    if tensors[0] is None or len(tensors) == 1:
        return tensors[0]
    result = torch.cat([tensor.detach() for tensor in tensors])
    parts = result.split([tensor.shape[0] for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
    return result


@dataclass
class PassState:
    """Carry the residual stream of one pass from block to block.

    The residual stream is `hidden + gate * pending`: the kernel that needs the sum next computes it.

    Attributes:
        hidden: `[B * tokens, C]` in the model's dtype, contiguous; updated in place.
        batch: B.
        pending: `[B * tokens, C]`, output of a branch that is still to be added, or None.
        gate: float32 `[groups, C]` of `pending`, or None for 1; consecutive rows share a group.
    """

    hidden: Tensor
    batch: int
    pending: Tensor | None = None
    gate: Tensor | None = None

    def normed(
        self,
        quantizer: Quantizer,
        eps: float,
        affine: tuple[Tensor, Tensor] | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
    ) -> Codes:
        """Add what is pending and normalize the residual stream; return its codes `[B * tokens, C]`.

        Args:
            quantizer: of the next layer.
            eps: added to the variance.
            affine: weight and bias of the norm, float32 `[C]`.
            modulation: scale and shift, float32 `[groups, C]`.
        """
        norm = (*(affine or (None, None)), *(modulation or (None, None)), eps)
        if self.pending is None:
            return quantizer.normed(self.hidden, norm)
        codes = quantizer.normed_sum(self.hidden, self.pending, self.gate, norm)
        self.pending = self.gate = None
        return codes

    def summed(self) -> Tensor:
        """Add what is pending; return the residual stream `[B * tokens, C]`."""
        if self.pending is not None:
            ops.add_gated_(self.hidden, self.pending, self.gate)
            self.pending = self.gate = None
        return self.hidden

    def inject(self, injection: Tensor) -> None:
        """Add what is pending; multiply by 1 + scale and add shift, `[2, B or 1, tokens, C]`."""
        scale, shift = injection
        hidden = self.summed().view(self.batch, *scale.shape[1:])
        hidden.addcmul_(hidden, scale).add_(shift)


class FusedBlock:
    """Run one transformer block on integer products; valid as long as its parameters are not moved.

    Attributes:
        attend: self-attention, between `project` and `finish`.
    """

    def __init__(self, block: WanTransformerBlock, workspace: Workspace) -> None:
        def product(*layers: QARVDLinear) -> IntegerProduct:
            return IntegerProduct(layers, workspace)

        attn1, attn2, up, down = block.attn1, block.attn2, block.ffn.net[0].proj, block.ffn.net[2]
        self._block = block
        self._qkv = [product(*layers) for layers in _runs([attn1.to_q, attn1.to_k, attn1.to_v])]
        self._attn_out, self._text_q, self._text_out = (
            product(layer) for layer in (attn1.to_out[0], attn2.to_q, attn2.to_out[0])
        )
        up.store_rows_in(down.channel_order)  # so that GELU writes codes in the channel order of `down`
        self._up, self._down = product(up), product(down)
        self.attend = CachedSelfAttention(attn1)
        plain = isinstance(block.norm2, nn.Identity)
        self._norm2 = None if plain else (block.norm2.weight.float(), block.norm2.bias.float())

    def project(self, state: PassState, modulation: Tensor, out: Tensor | None = None) -> Tensor:
        """Project the modulated residual stream to q, k and v.

        Args:
            state: state of the pass.
            modulation: float32 `[6, groups, C]`.
            out: `[B, tokens, 3 C]` to write the result to; None allocates.

        Returns:
            `[B, tokens, 3 C]`.
        """
        shift, scale = modulation[:2]
        rows = None if out is None else out.flatten(0, 1)
        whole = rows if len(self._qkv) == 1 else None  # a product cannot write to a range of columns
        parts = []
        for product in self._qkv:
            codes = state.normed(product.quantizer, self._block.norm1.eps, modulation=(scale, shift))
            parts.append(product(codes, state.hidden.dtype, whole))
        qkv = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1, out=rows)
        return qkv.view(state.batch, -1, qkv.shape[1])

    def text(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-attention K/V of the prompt, from the bound cache or projected from `[B, text_tokens, C]`."""
        attn = self._block.attn2
        return attn.processor.text(attn, embeddings)

    @property
    def text_backend(self) -> object:
        """Attention backend that the user chose for cross-attention, or None."""
        return self._block.attn2.processor._attention_backend

    def finish(
        self,
        state: PassState,
        attended: Tensor,
        text: tuple[Tensor, Tensor],
        modulation: Tensor,
        injection: Tensor | None = None,
    ) -> None:
        """Run everything after self-attention.

        Args:
            state: state of the pass.
            attended: output of self-attention, `[B, tokens, heads, head_dim]`.
            text: cross-attention K/V of the prompt.
            modulation: float32 `[6, groups, C]`.
            injection: scale and shift of the residual stream `[2, B or 1, tokens, C]`, of a model with controls.
        """
        gate, shift, scale, ffn_gate = modulation[2:]
        self._branch(state, self._attn_out, attended, gate)
        if injection is not None:
            state.inject(injection)
        self._branch(state, self._text_out, self._attend_text(state, text), None)
        codes = state.normed(self._up.quantizer, self._block.norm3.eps, modulation=(scale, shift))
        codes = self._up.gelu(codes, self._down.quantizer, state.hidden.dtype)
        state.pending, state.gate = self._down(codes, state.hidden.dtype), ffn_gate

    @staticmethod
    def _branch(state: PassState, product: IntegerProduct, hidden: Tensor, gate: Tensor | None) -> None:
        """Project attention output `[B, tokens, heads, head_dim]`; the residual sum stays pending."""
        codes = product.quantizer(hidden.reshape(state.hidden.shape))
        state.pending, state.gate = product(codes, state.hidden.dtype), gate

    def _attend_text(self, state: PassState, text: tuple[Tensor, Tensor]) -> Tensor:
        """Return the output of cross-attention, `[B, tokens, heads, head_dim]`."""
        attn = self._block.attn2
        if self._norm2 is None:
            codes = self._text_q.quantizer(state.summed())
        else:
            codes = state.normed(self._text_q.quantizer, self._block.norm2.eps, affine=self._norm2)
        query = attn.norm_q(self._text_q(codes, state.hidden.dtype))
        query = query.view(state.batch, -1, attn.heads, query.shape[1] // attn.heads)
        return attend(query, *text, attn)


def _runs(layers: Sequence[QARVDLinear]) -> list[list[QARVDLinear]]:
    """Group neighbouring layers that read the same codes and have the same weight bits."""
    runs = [[layers[0]]]
    for layer in layers[1:]:
        last = runs[-1][-1]
        if layer.weight_bits == last.weight_bits and quantizer_of(layer).equals(quantizer_of(last)):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
