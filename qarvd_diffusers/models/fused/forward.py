"""Run cached passes of a quantized Wan transformer on fused integer kernels instead of the stock forward."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import qarvd_kernels as ops

from ...kv_cache.cache import KVCache
from ...quantization.linear import QARVDLinear
from .block import FusedBlock, PassState, Workspace
from .cuda_graphs import CapturedSegments, CaptureError, ForwardSegments, GraphStore


class FusedPass:
    """Run the fused forward of a transformer whose blocks have only `QARVDLinear` layers with static activations.

    The constructor rearranges the weights for the kernels, in place; `fits` checks that they are still where they
    were. On a GPU the second pass of a kind captures CUDA graphs, which later passes replay (see `cuda_graphs`).

    Attributes:
        cuda_graphs: whether CUDA graphs may be used.

    Raises:
        ValueError: the transformer cannot take the fused forward; see `refusal`.
        LayerRefused: the integer sums of a layer could overflow the kernels' accumulators.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        reason = refusal(transformer)
        if reason is not None:
            raise ValueError(f"this transformer cannot take the fused forward: {reason}")
        workspace = Workspace()
        self.cuda_graphs = True
        self._graphs = GraphStore()
        self._blocks = [_fused_block(index, block, workspace) for index, block in enumerate(transformer.blocks)]
        self._tables = torch.cat([block.scale_shift_table.detach() for block in transformer.blocks]).float()
        self._modules = list(transformer.blocks.modules())
        self._placement = _placement(transformer)

    def __deepcopy__(self, memo: dict) -> FusedPass:
        return self  # the weights of the copied model have other addresses, so that `fits` is False for it

    def fits(self, transformer: WanTransformer3DModel) -> bool:
        """Return whether no weight was moved, no layer replaced and no hook added; called before each pass."""
        return _placement(transformer) == self._placement and not any(map(_is_hooked, self._modules))

    def __call__(
        self,
        transformer: WanTransformer3DModel,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        kv_cache: KVCache,
        cache_only: bool,
    ) -> Tensor | None:
        """Run one pass that is bound to `kv_cache`.

        Args:
            transformer: the one that this was built for.
            latents: `[B, C, F, H, W]`.
            timestep: `[B]` or `[B, G]`, one value for each of G equal groups of tokens, such as frames.
            text: embeddings `[B, text_tokens, text_dim]`.
            kv_cache: bound to the attention processors of `transformer`.
            cache_only: compute K/V only, and nothing that only the flow needs.

        Returns:
            The flow `[B, C, F, H, W]`, or None if `cache_only`.
        """
        segments, embedding = self._segments(transformer, latents, timestep, text, kv_cache)
        cos, sin, start = transformer.rope(latents)
        place = (cos[0, :, 0, 0::2].float().contiguous(), sin[0, :, 0, 1::2].float().contiguous()), start
        try:
            chosen = self._graphs.choose(segments) if self.cuda_graphs else segments
            state = self._run(chosen, kv_cache, place, cache_only)
        except CaptureError as error:
            self._graphs.disable(error)
            state = self._run(segments, kv_cache, place, cache_only)
        return None if state is None else self._head(transformer, state.summed(), embedding, latents.shape)

    def _segments(
        self,
        transformer: WanTransformer3DModel,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        kv_cache: KVCache,
    ) -> tuple[ForwardSegments, Tensor]:
        """Compute what comes before the blocks; return the segments and the timestep embedding `[groups, C]`."""
        embedder = transformer.condition_embedder
        if kv_cache.layers[0].get_text() is None:
            text = embedder.text_embedder(text)
        hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)
        embedding = embedder.timesteps_proj(timestep.flatten()).to(embedder.time_embedder.linear_1.weight.dtype)
        embedding = embedder.time_embedder(embedding).type_as(hidden)
        modulation = embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1)).float()
        modulation = self._tables[:, :, None] + modulation.transpose(0, 1).contiguous()
        state = PassState(hidden.reshape(-1, hidden.shape[2]).contiguous(), latents.shape[0])
        texts = [block.text(text) for block in self._blocks]
        injections = [getattr(block, "injection", None) for block in transformer.blocks]
        load = None if injections[0] is None else lambda index: injections[index].values(hidden.dtype)
        return ForwardSegments(self._blocks, state, modulation, texts, load), embedding

    def _run(
        self,
        segments: ForwardSegments | CapturedSegments,
        kv_cache: KVCache,
        place: tuple[tuple[Tensor, Tensor], int],
        cache_only: bool,
    ) -> PassState | None:
        """Run all blocks.

        Args:
            segments: what runs between the self-attention calls.
            kv_cache: where K/V are stored.
            place: cos and sin of RoPE, and the token at which the K/V of this pass start.
            cache_only: stop once the last block's K/V are stored.

        Returns:
            The state after the last block, or None if `cache_only`.
        """
        attended, last = None, len(self._blocks) - 1
        for index, (block, layer) in enumerate(zip(self._blocks, kv_cache.layers, strict=True)):
            qkv = segments(index, attended)
            attended = block.attend(qkv, layer, *place, store_only=cache_only and index == last)
        if cache_only:
            return None
        segments(last + 1, attended)
        return segments.state

    @staticmethod
    def _head(transformer: WanTransformer3DModel, hidden: Tensor, embedding: Tensor, shape: torch.Size) -> Tensor:
        """Return the flow, of `shape` `[B, C, F, H, W]`, from the output of the blocks `[B * tokens, C]`."""
        shift, scale = (transformer.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
        grouped = hidden.view(embedding.shape[0], -1, hidden.shape[1])
        normed = (transformer.norm_out(grouped.float()) * (1 + scale) + shift).type_as(hidden)
        normed = normed.view(shape[0], -1, hidden.shape[1])
        patch = transformer.config.patch_size
        sizes = [size // step for size, step in zip(shape[2:], patch, strict=True)]
        patches = transformer.proj_out(normed).reshape(shape[0], *sizes, *patch, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _fused_block(index: int, block: nn.Module, workspace: Workspace) -> FusedBlock:
    try:
        return FusedBlock(block, workspace)
    except ops.LayerRefused as error:
        raise ops.LayerRefused(f"in block {index}, {error}") from error


def _linears(transformer: WanTransformer3DModel) -> list[nn.Module]:
    """Return the layers whose products are part of a fused block."""
    layers: list[nn.Module] = []
    for block in transformer.blocks:
        first, second = block.attn1, block.attn2
        layers += [first.to_q, first.to_k, first.to_v, first.to_out[0], second.to_q, second.to_out[0]]
        layers += [block.ffn.net[0].proj, block.ffn.net[2]]
    return layers


def _placement(transformer: WanTransformer3DModel) -> list[tuple]:
    """Return the addresses of everything that a `FusedPass` is built from, and the types of its layers."""
    if transformer.training or hasattr(transformer, "lora_differences"):
        return []
    # An adapter wraps its layer, and has no packed weight of its own.
    linears: list[tuple] = [
        (type(layer), layer.revision, layer.weight_packed.data_ptr()) if type(layer) is QARVDLinear else (type(layer),)
        for layer in _linears(transformer)
    ]
    return linears + [tuple(tensor.data_ptr() for tensor in _copied(block)) for block in transformer.blocks]


def _copied(block: nn.Module) -> list[Tensor]:
    """Return the parameters of which a fused block keeps float32 copies."""
    norms = [block.attn1.norm_q, block.attn1.norm_k, block.norm2]
    return [
        block.scale_shift_table,
        *(tensor for norm in norms for tensor in norm._parameters.values() if tensor is not None),
    ]


def refusal(transformer: WanTransformer3DModel) -> str | None:
    """Return why a transformer cannot take the fused forward, or None if it can."""
    for block in transformer.blocks:
        if block.attn1.fused_projections or block.attn2.fused_projections:
            return "q, k and v were fused before quantization"
        if block.attn2.add_k_proj is not None:
            return "the model attends to images"
    if transformer.training:
        return "the model is in training mode"
    if hasattr(transformer, "lora_differences"):
        return "an adapter adds to parameters that the fused forward has copies of"
    for layer in _linears(transformer):
        if type(layer) is not QARVDLinear:
            return f"a block has a {type(layer).__name__} (an adapter, or a layer that was not quantized)"
        if layer.activation not in ("static", "token"):
            return f"the scheme has {layer.activation} activations; the fused kernels support static and token scales"
    for module in transformer.blocks.modules():
        if _is_hooked(module):
            return f"a {type(module).__name__} has a hook (offloading, or capturing of activations)"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__
