"""Add controls (a camera, or rays and keys) to the causal Wan transformer, as LingBot-World does.

Each block scales and shifts its hidden states, after self-attention, by values that depend on the controls of the
chunk alone. They are computed once per chunk, and kept with the K/V cache of the stream.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import silu

from ..kv_cache.cache import KVCache
from .transformer_causal_wan import CausalWanTransformer3DModel

CELL = 8  # pixels per latent, in height and width


class Injection(NamedTuple):
    """Scale and shift of the hidden states of one block, `[2, B or 1, tokens, dim]`.

    Attributes:
        stored: float values, or int8 codes.
        step: float32 `[2, B or 1, tokens, 1]`, value = code * step; None for float values.
    """

    stored: Tensor
    step: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, eight_bits: bool) -> Injection:
        """Store float values `[2, B or 1, tokens, dim]` as they are, or in 8 bits with a step per token."""
        if not eight_bits:
            return cls(values)
        step = (values.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return cls((values.float() / step).round().to(torch.int8), step)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the values in `dtype`."""
        return self.stored.to(dtype) if self.step is None else (self.stored * self.step).to(dtype)


class ControlEmbedder(nn.Module):
    """Embed controls as one token per patch of the latents.

    Args:
        channels: of the controls, per latent pixel.
        patch_size: frames, rows and columns of a patch.
        dim: width of the transformer.
    """

    def __init__(self, channels: int, patch_size: Sequence[int], dim: int) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.proj = nn.Linear(channels * torch.Size(patch_size).numel(), dim)
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, controls: Tensor) -> Tensor:
        """Embed `[B, channels, F, H, W]`; return `[B, tokens, dim]`."""
        patches = controls
        for axis, step in zip((4, 3, 2), reversed(self.patch_size), strict=True):
            patches = patches.unflatten(axis, (-1, step))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)  # channel slowest within a patch
        tokens = self.proj(patches.flatten(4).flatten(1, 3))
        return tokens + self.linear_2(silu(self.linear_1(tokens)))


class ControlInjector(nn.Module):
    """Compute the injection of one block from embedded controls."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.scale = nn.Linear(dim, dim)
        self.shift = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scale and shift, `[2, B, tokens, dim]`, for embedded controls `[B, tokens, dim]`."""
        hidden = tokens + self.linear_2(silu(self.linear_1(tokens)))
        return torch.stack([self.scale(hidden), self.shift(hidden)])


class WorldBlock(WanTransformerBlock):
    """Inject controls between self-attention and cross-attention; without an injection, be the stock block.

    Attributes:
        injection: of the pass in progress, or None.
    """

    injection: Injection | None = None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """See `WanTransformerBlock`; arithmetic and dtypes are the same."""
        if self.injection is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        dtype = hidden_states.dtype
        # [B, 1 or tokens, dim] each; temb is [B, 6, dim], or [B, tokens, 6, dim] for a timestep per token.
        temb = temb if temb.ndim == 4 else temb[:, None]
        table = self.scale_shift_table[:, None] + temb.float()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)

        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).to(dtype)
        attended = self.attn1(normed, None, None, rotary_emb)
        inject_scale, inject_shift = self.injection.values(dtype)
        hidden_states = (hidden_states.float() + attended * gate).to(dtype)
        hidden_states = (1 + inject_scale) * hidden_states + inject_shift
        normed = self.norm2(hidden_states.float()).to(dtype)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)
        normed = (self.norm3(hidden_states.float()) * (1 + ffn_scale) + ffn_shift).to(dtype)
        return (hidden_states.float() + self.ffn(normed).float() * ffn_gate).to(dtype)


class WorldWanTransformer3DModel(CausalWanTransformer3DModel):
    """Be a `CausalWanTransformer3DModel` whose blocks are steered by controls.

    Its class name is in its config on disk: the stock class would load it without the layers for controls.

    Args:
        control_dim: values per pixel: 6 for a camera (origin and ray), 7 for a ray and four keys.
        *args: of `WanTransformer3DModel`.
        **kwargs: likewise.
    """

    _no_split_modules = ["WanTransformerBlock", "WorldBlock"]  # noqa: RUF012 - diffusers' names
    _repeated_blocks = ["WanTransformerBlock", "WorldBlock"]  # noqa: RUF012
    _runs_once_a_chunk = ("injector",)  # parts that quantization leaves alone: they cost nothing

    def __init__(self, *args: Any, control_dim: int = 6, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_to_config(control_dim=control_dim)
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        self.control_embedder = ControlEmbedder(self.control_channels, self.config.patch_size, dim)
        for block in self.blocks:
            block.__class__ = WorldBlock  # what the stock constructor made, with one method more
            block.injector = ControlInjector(dim)

    # diffusers reads the config keys from the signature.
    __init__.__signature__ = inspect.signature(CausalWanTransformer3DModel.__init__).replace(  # type: ignore[attr-defined]
        parameters=[
            *inspect.signature(CausalWanTransformer3DModel.__init__).parameters.values(),
            inspect.Parameter("control_dim", inspect.Parameter.KEYWORD_ONLY, default=6, annotation=int),
        ]
    )

    @property
    def control_channels(self) -> int:
        """Channels of the controls: the values of the pixels of one latent."""
        return self.config.control_dim * CELL * CELL

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *args: Any,
        controls: Tensor | None = None,
        kv_cache: KVCache | None = None,
        **kwargs: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run one pass; see `CausalWanTransformer3DModel.forward`.

        Args:
            hidden_states: latents, then the channels of the condition, `[B, in_channels, F, H, W]`.
            timestep: see there.
            encoder_hidden_states: see there.
            *args: see there.
            controls: `[B or 1, control_channels, F, H, W]`, or None to run without injection. With a cache, what is
                computed from them is kept for further passes with the same tensor, in 8 bits if K/V are.
            kv_cache: see there.
            **kwargs: see there.

        Raises:
            ValueError: the controls have another shape.
        """
        injections = None if controls is None else self._injections(controls, hidden_states, kv_cache)
        with _injected(self.blocks, injections):
            return super().forward(hidden_states, timestep, encoder_hidden_states, *args, kv_cache=kv_cache, **kwargs)

    def _injections(self, controls: Tensor, latents: Tensor, kv_cache: KVCache | None) -> list[Injection]:
        """Return the injection of every block, from the cache if it has those of the same controls."""
        kept = None if kv_cache is None else kv_cache.injections
        if kept is not None and kept[0] is controls:
            return kept[1]
        expected = (self.control_channels, *latents.shape[2:])
        if controls.ndim != 5 or controls.shape[1:] != expected or controls.shape[0] not in (1, latents.shape[0]):
            raise ValueError(
                f"controls have shape {list(controls.shape)}, expected [{latents.shape[0]} or 1, "
                f"{', '.join(map(str, expected))}]"
            )
        tokens = self.control_embedder(controls.to(latents.device, latents.dtype))
        if self.context_parallel is not None:
            tokens = self.context_parallel.split(tokens.shape[1]).own(tokens)
        eight_bits = kv_cache is not None and kv_cache.storage in ("int8", "fp8")
        injections = [Injection.of(block.injector(tokens), eight_bits) for block in self.blocks]
        if kv_cache is not None and not torch.is_grad_enabled():
            kv_cache.injections = (controls, injections)
        return injections

    def to_json_string(self) -> str:
        """Return the config as JSON, under the name of this class."""
        config = json.loads(super().to_json_string())
        return json.dumps(config | {"_class_name": type(self).__name__}, indent=2, sort_keys=True) + "\n"


def transformer_class(config: Mapping[str, Any]) -> type[CausalWanTransformer3DModel]:
    """Return the class of a causal transformer with these arguments."""
    return WorldWanTransformer3DModel if "control_dim" in config else CausalWanTransformer3DModel


@contextmanager
def _injected(blocks: nn.ModuleList, injections: Sequence[Injection] | None) -> Iterator[None]:
    """Hand each block its injection for the duration of one pass."""
    try:
        for block, injection in zip(blocks, injections or [None] * len(blocks), strict=True):
            block.injection = injection
        yield
    finally:
        for block in blocks:
            block.injection = None
