"""`FusedBlock`: an integer transformer block in which nothing is quantized by a step of its own.

Every linear layer gets its codes from the kernel that computes its input: the residual sum and norm in front of it, or the
GELU in the epilogue of the layer before it. What is computed is the float graph of `WanTransformerBlock` with quantized
linear layers; only, norm and GELU are quantized from float32, without being rounded to the model's dtype in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

import qarvd_kernels as ops

from ...kv_cache.cache import KVLayerCache
from ...quantization.linear import PER_ROW, QARVDLinear
from .attention import CachedSelfAttention, attend


class Quantizer(NamedTuple):
    """How the codes of an activation are made: the last arguments of `quantize_static` and its fused relatives."""

    channel_order: Tensor
    num_outliers: int
    input_scale: Tensor
    input_zero_point: Tensor

    @classmethod
    def of(cls, layer: QARVDLinear) -> Quantizer:
        return cls(layer.channel_order, layer.num_outliers, layer.input_scale, layer.input_zero_point)

    def equals(self, other: Quantizer) -> bool:
        """Whether both make the same codes; looks at the values."""
        pairs = list(zip(self, other, strict=True))
        return self.num_outliers == other.num_outliers and all(
            torch.equal(mine, theirs) for mine, theirs in pairs if isinstance(mine, Tensor)
        )


class Workspace:
    """Room for one expanded 4-bit weight, shared by all layers: small enough to stay in the GPU's cache."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def room(self, packed: Tensor, bits: int) -> Tensor | None:
        """An int8 buffer that holds the expanded weight until the next call; None for 8 bits, which need none."""
        if bits == 8:
            return None
        device, size = packed.device, packed.numel() * 8 // bits
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        return self._buffer


class IntegerProduct:
    """Codes `[M, K]` -> `[M, N]`: one layer, or several that read the same codes, as one matrix product.

    Several layers are stored one behind the other from now on and their parameters become views of that: no weight is held
    twice. A 4-bit weight is expanded for each product, into the workspace.
    """

    def __init__(self, layers: Sequence[QARVDLinear], workspace: Workspace) -> None:
        first = layers[0]
        packed, scale, zero_point, bias = (_stored_together(layers, name) for name in PER_ROW)
        self.quantizer = Quantizer.of(first)
        self._workspace = workspace
        quantizer = (first.input_scale, first.input_zero_point)
        self._packed = packed.detach()
        self._prepared = ops.prepare_linear(
            packed, scale, zero_point, *quantizer, bias, first.weight_bits, first.num_outliers
        )

    def __call__(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 `[M, K]` -> `[M, N]` in `dtype`."""
        return self._prepared(codes, self._packed, dtype, self._room())

    def gelu(self, codes: Tensor, then: Quantizer) -> Tensor:
        """int8 `[M, K]` -> int8 `[M, N]`, codes of the tanh-GELU of the product for the layer that `then` belongs to."""
        arguments = self._prepared.gemm_arguments(codes, self._packed, self._room())
        return ops.dual_scale_gemm_gelu(*arguments, then.input_scale, then.input_zero_point, then.num_outliers)

    def _room(self) -> Tensor | None:
        return self._workspace.room(self._packed, self._prepared.bits)


def _stored_together(layers: Sequence[QARVDLinear], name: str) -> Tensor | None:
    tensors = [getattr(layer, name) for layer in layers]
    if tensors[0] is None or len(tensors) == 1:
        return tensors[0]
    together = torch.cat([tensor.detach() for tensor in tensors])
    parts = together.split([tensor.shape[0] for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
    return together


@dataclass
class PassState:
    """What one pass carries from block to block.

    The residual stream is `hidden + gate * pending`: the sum is left to the kernel that needs it next.

    Attributes:
        hidden: `[B * tokens, C]` in the model's dtype.
        batch: B.
        pending: `[B * tokens, C]`, output of the branch that is still to be added, or None.
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
    ) -> Tensor:
        """Codes int8 `[B * tokens, C]` of the normed residual stream, which is summed up on the way.

        Args:
            affine: weight and bias of the norm, float32 `[C]`.
            modulation: scale and shift, float32 `[groups, C]`.
        """
        arguments = (*(affine or (None, None)), *(modulation or (None, None)), eps, *quantizer)
        if self.pending is None:
            return ops.norm_quantize(self.hidden, *arguments)
        self.hidden, codes = ops.add_norm_quantize(self.hidden, self.pending, self.gate, *arguments)
        self.pending = self.gate = None
        return codes

    def summed(self) -> Tensor:
        """The residual stream `[B * tokens, C]`."""
        if self.pending is not None:
            self.hidden = ops.add_gated(self.hidden, self.pending, self.gate)
            self.pending = self.gate = None
        return self.hidden


class FusedBlock:
    """One transformer block on integer products; valid while its parameters stay where they are."""

    def __init__(self, block: WanTransformerBlock, workspace: Workspace) -> None:
        def product(*layers: QARVDLinear) -> IntegerProduct:
            return IntegerProduct(layers, workspace)

        attn1, attn2, up, down = block.attn1, block.attn2, block.ffn.net[0].proj, block.ffn.net[2]
        self._block = block
        self._qkv = [product(*layers) for layers in _runs([attn1.to_q, attn1.to_k, attn1.to_v])]
        self._attn_out, self._text_q, self._text_out = (
            product(layer) for layer in (attn1.to_out[0], attn2.to_q, attn2.to_out[0])
        )
        up.store_rows_in(down.channel_order)  # the GELU's codes come out in the order in which `down` reads them
        self._up, self._down = product(up), product(down)
        self._attention = CachedSelfAttention(attn1)
        plain = isinstance(block.norm2, nn.Identity)
        self._norm2 = None if plain else (block.norm2.weight.float(), block.norm2.bias.float())

    def project(self, state: PassState, modulation: Tensor) -> Tensor:
        """q, k and v of the modulated residual stream, `[B, tokens, 3 C]`; `modulation` is float32 `[6, groups, C]`."""
        shift, scale = modulation[:2]
        parts = []
        for product in self._qkv:
            codes = state.normed(product.quantizer, self._block.norm1.eps, modulation=(scale, shift))
            parts.append(product(codes, state.hidden.dtype))
        qkv = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return qkv.view(state.batch, -1, qkv.shape[1])

    def attend(
        self, qkv: Tensor, cache: KVLayerCache, rotary: tuple[Tensor, Tensor], start: int, store_only: bool
    ) -> Tensor | None:
        """Store K/V from token `start` on and attend to all that is stored; see `CachedSelfAttention`."""
        query = self._attention.store(qkv, cache, rotary, start)
        return None if store_only else self._attention.attend(query, cache, start + query.shape[1])

    def text(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention K/V of the prompt: those in the bound cache, else projected from `[B, text_tokens, C]`."""
        attn = self._block.attn2
        return attn.processor.text(attn, embeddings)

    @property
    def text_backend(self) -> object:
        """The attention backend that the user chose for the prompt, or None."""
        return self._block.attn2.processor._attention_backend

    def finish(self, state: PassState, attended: Tensor, text: tuple[Tensor, Tensor], modulation: Tensor) -> None:
        """All that follows self-attention, whose output is `[B, tokens, heads, head_dim]`."""
        gate, shift, scale, ffn_gate = modulation[2:]
        self._branch(state, self._attn_out, attended, gate)
        self._branch(state, self._text_out, self._attend_text(state, text), None)
        codes = state.normed(self._up.quantizer, self._block.norm3.eps, modulation=(scale, shift))
        codes = self._up.gelu(codes, self._down.quantizer)
        state.pending, state.gate = self._down(codes, state.hidden.dtype), ffn_gate

    @staticmethod
    def _branch(state: PassState, product: IntegerProduct, hidden: Tensor, gate: Tensor | None) -> None:
        """Project attention output `[B, tokens, heads, head_dim]`; the residual sum is left pending."""
        codes = ops.quantize_static(hidden.reshape(state.hidden.shape), *product.quantizer)
        state.pending, state.gate = product(codes, state.hidden.dtype), gate

    def _attend_text(self, state: PassState, text: tuple[Tensor, Tensor]) -> Tensor:
        attn = self._block.attn2
        if self._norm2 is None:
            codes = ops.quantize_static(state.summed(), *self._text_q.quantizer)
        else:
            codes = state.normed(self._text_q.quantizer, self._block.norm2.eps, affine=self._norm2)
        query = attn.norm_q(self._text_q(codes, state.hidden.dtype))
        query = query.view(state.batch, -1, attn.heads, query.shape[1] // attn.heads)
        return attend(query, *text, attn)


def _runs(layers: Sequence[QARVDLinear]) -> list[list[QARVDLinear]]:
    """Neighbouring layers that read the same codes at the same weight bits, together."""
    runs = [[layers[0]]]
    for layer in layers[1:]:
        last = runs[-1][-1]
        if layer.weight_bits == last.weight_bits and Quantizer.of(layer).equals(Quantizer.of(last)):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
