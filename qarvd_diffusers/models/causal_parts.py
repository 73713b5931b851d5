"""Replace stock parts in causal passes: a float64 timestep sinusoid, RoPE with an offset, attention over a cache.

`CausalWanTransformer3DModel` installs the parts once; `bind` hands them cache, offset and split for one pass. Unbound
parts compute exactly what the stock parts compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import nn

from ..kv_cache.cache import KVCache
from ..kv_cache.layer import KVLayerCache
from .context_parallel import TokenSplit


class CausalTimesteps(Timesteps):
    """Embed timesteps as sinusoids, in float64 if asked to.

    The causal Wan models were trained with a float64 sinusoid. The stock float32 one changes their output by up to
    3e-5.

    Attributes:
        float64: whether to compute in float64; False outside of cached passes.
    """

    def __init__(self, stock: Timesteps) -> None:
        super().__init__(stock.num_channels, stock.flip_sin_to_cos, stock.downscale_freq_shift, stock.scale)
        self.float64 = False

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Embed timesteps `[N]`; return float32 `[N, num_channels]`."""
        if not self.float64 or timesteps.device.type == "mps":  # MPS has no float64
            return super().forward(timesteps)
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=torch.float64, device=timesteps.device) / (
            half - self.downscale_freq_shift
        )
        angle = self.scale * timesteps.double()[:, None] * torch.pow(10000.0, -exponent)[None, :]
        parts = (angle.cos(), angle.sin()) if self.flip_sin_to_cos else (angle.sin(), angle.cos())
        return nn.functional.pad(torch.cat(parts, dim=-1), (0, self.num_channels % 2)).float()


class CausalWanRotaryPosEmbed(WanRotaryPosEmbed):
    """Compute Wan's 3D RoPE from the position `frame_offset` on; uses the tables of a stock module.

    What a block needs to know of a pass is returned with cos and sin: the stock forward passes RoPE's result on to
    every block, and a compiled block is not recompiled if only its arguments change.

    Attributes:
        frame_offset: position of the first latent frame.
        cache_start: token at which the pass writes its K/V, or None outside of cached passes.
        window_frames: latent frames in the window, if keys are stored before RoPE, else None.
        split: this process's share of the tokens, or None.
    """

    def __init__(self, stock: WanRotaryPosEmbed) -> None:
        nn.Module.__init__(self)
        for name in ("attention_head_dim", "patch_size", "max_seq_len", "t_dim", "h_dim", "w_dim"):
            setattr(self, name, getattr(stock, name))
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, getattr(stock, name), persistent=False)
        self.frame_offset = 0
        self.cache_start: int | None = None
        self.window_frames: int | None = None
        self.split: TokenSplit | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple:
        """Return cos and sin of the positions of latents `[B, C, F, H, W]`, and what a cached pass needs beside them.

        Returns:
            cos and sin, each `[1, tokens, 1, head_dim]`, of the own tokens of `split`. If `cache_start` is set, it is
            the third value. If `window_frames` is set too, cos and sin of all frames in the window follow: earlier
            frames count from 0, those of the pass have their own positions.

        Raises:
            ValueError: a position is beyond the end of the table.
        """
        sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        starts = [self.frame_offset // self.patch_size[0], 0, 0]
        for axis, start, size in zip(("frame", "row", "column"), starts, sizes, strict=True):
            if start + size > self.max_seq_len:
                raise ValueError(
                    f"{axis} position {start + size - 1} is beyond the end of the RoPE table, which has "
                    f"rope_max_seq_len = {self.max_seq_len} positions: use a smaller picture or fewer "
                    "local_attention_frames, or load the transformer with a larger rope_max_seq_len in its config"
                )
        present = self._table(self.freqs_cos, starts, sizes), self._table(self.freqs_sin, starts, sizes)
        tables = present if self.split is None else tuple(self.split.own(table) for table in present)
        if self.cache_start is None or self.window_frames is None:
            return tables if self.cache_start is None else (*tables, self.cache_start)
        past = [self.window_frames // self.patch_size[0] - sizes[0], *sizes[1:]]
        window = (
            torch.cat([self._table(freqs, [0, 0, 0], past), own], dim=1)
            for freqs, own in zip((self.freqs_cos, self.freqs_sin), present, strict=True)
        )
        return (*tables, self.cache_start, *window)

    def rotation(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, float32 `[t_dim / 2]` each, of the angles between positions that are `frames` apart."""
        times, rest = divmod(frames, self.max_seq_len - 1)
        rows = [self.max_seq_len - 1, rest]
        cos, sin = (table[rows, : self.t_dim].cpu().double() for table in (self.freqs_cos, self.freqs_sin))
        last, rotation = torch.complex(cos[:, 0::2], sin[:, 1::2])
        rotation = rotation * last**times
        device = self.freqs_cos.device
        return rotation.real.float().to(device), rotation.imag.float().to(device)

    def _table(self, freqs: torch.Tensor, starts: list[int], sizes: list[int]) -> torch.Tensor:
        """Return `[1, tokens, 1, head_dim]`: `freqs` at the positions of a box of frames, rows and columns."""
        parts = []
        for axis, part in enumerate(freqs.split([self.t_dim, self.h_dim, self.w_dim], dim=1)):
            view = [1, 1, 1, part.shape[1]]
            view[axis] = sizes[axis]
            parts.append(part[starts[axis] : starts[axis] + sizes[axis]].view(view).expand(*sizes, -1))
        return torch.cat(parts, dim=-1).reshape(1, -1, 1, freqs.shape[1])


def rotate(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to the interleaved pairs of `[B, tokens, heads, head_dim]`.

    Args:
        hidden_states: queries or keys.
        cos: `[1, tokens, 1, head_dim]` of `WanRotaryPosEmbed`.
        sin: likewise.
    """
    first, second = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).type_as(hidden_states)


class CausalWanAttnProcessor(WanAttnProcessor):
    """Run Wan attention over the K/V of the bound cache; without one, behave like the stock processor.

    Attributes:
        cache: K/V of the block, or None outside of cached passes.
        split: this process's share of the tokens, or None. Self-attention exchanges it for all tokens of its own
            heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache: KVLayerCache | None = None
        self.split: TokenSplit | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple | None = None,
    ) -> torch.Tensor:
        """Attend as in `WanAttnProcessor`; `rotary_emb` is what `CausalWanRotaryPosEmbed` returned."""
        if self.cache is None or attn.add_k_proj is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if encoder_hidden_states is None:
            cos, sin, start, *window = rotary_emb
            query, key, value = self._project_self(attn, hidden_states)
            query, key = rotate(query, cos, sin), key if window else rotate(key, cos, sin)
            if self.split is not None:
                query, key, value = self.split.to_heads(query, key, value)
            key, value = self.cache.update(key, value, start)
            key = rotate(key, *window) if window else key
        else:
            query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
            key, value = self.text(attn, encoder_hidden_states)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
        )
        if encoder_hidden_states is None and self.split is not None:
            hidden_states = self.split.to_tokens(hidden_states)
        hidden_states = hidden_states.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](hidden_states))

    @staticmethod
    def _project_self(
        attn: WanAttention, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return normalized q and k, and v, each `[B, tokens, heads, head_dim]`."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        return query, key, value

    def text(self, attn: WanAttention, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cross-attention K/V, each `[B, text_tokens, heads, head_dim]`; they are projected once and cached."""
        # With gradients they are not cached: they would carry an autograd graph that the first backward frees.
        cached = None if torch.is_grad_enabled() else self.cache.get_text()
        if cached is not None:
            return cached
        if attn.fused_projections:
            key, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if not torch.is_grad_enabled():
            self.cache.store_text(key, value)
        return key, value


@contextmanager
def bind(
    transformer: WanTransformer3DModel,
    kv_cache: KVCache | None,
    frame_offset: int,
    latents: torch.Tensor,
    split: TokenSplit | None,
) -> Iterator[None]:
    """Bind cache, frame offset and split to the installed parts of a transformer for the duration of one pass.

    Args:
        transformer: has the parts of this module.
        kv_cache: is made ready for the pass; None binds the offset alone.
        frame_offset: absolute index of the first latent frame.
        latents: `[B, C, F, H, W]`.
        split: how the tokens are divided among processes, or None.

    Raises:
        ValueError: the cache and the transformer, or the cache and the pass, do not fit together.
    """
    unbound = [None] * len(transformer.blocks)
    layers, place = unbound, (frame_offset, None, None)
    if kv_cache is not None:
        _check_bindable(transformer, kv_cache)
        layers, place = kv_cache.layers, _begin_pass(transformer, kv_cache, frame_offset, latents, split)
    hooks = []
    if split is not None:  # every process computes what comes before and after the blocks for all tokens
        hooks.append(transformer.patch_embedding.register_forward_hook(split.own_patches))
        hooks.append(transformer.proj_out.register_forward_hook(split.gathered))
    try:
        _set_parts(transformer, layers, place, split)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _set_parts(transformer, unbound, (0, None, None), None)


def tokens_per_frame(transformer: WanTransformer3DModel, latents: torch.Tensor) -> int:
    """Return how many tokens one latent frame of `[B, C, F, H, W]` has."""
    _, p_h, p_w = transformer.config.patch_size
    return (latents.shape[3] // p_h) * (latents.shape[4] // p_w)


def _begin_pass(
    transformer: WanTransformer3DModel,
    kv_cache: KVCache,
    frame_offset: int,
    latents: torch.Tensor,
    split: TokenSplit | None,
) -> tuple[int, int, int | None]:
    """Make room in the cache; return the `frame_offset`, `cache_start` and `window_frames` to bind to RoPE."""
    rope, config = transformer.rope, transformer.config
    heads = config.num_attention_heads // (1 if split is None else split.parallel.size)
    frames, tokens = latents.shape[2] // config.patch_size[0], tokens_per_frame(transformer, latents)
    start = kv_cache.begin_pass(frame_offset, frames, tokens, (heads, config.attention_head_dim), latents)
    if kv_cache.rope_mode == "window":
        window = len(kv_cache.frames)
        return window - frames + kv_cache.shift, start, window
    return kv_cache.reindex(frames, rope.max_seq_len, rope.rotation), start, None


def _set_parts(
    transformer: WanTransformer3DModel,
    layers: Sequence[KVLayerCache | None],
    place: tuple[int, int | None, int | None],
    split: TokenSplit | None,
) -> None:
    rope = transformer.rope
    rope.frame_offset, rope.cache_start, rope.window_frames = place
    rope.split = split
    transformer.condition_embedder.timesteps_proj.float64 = rope.cache_start is not None
    for block, layer in zip(transformer.blocks, layers, strict=True):
        for processor in (block.attn1.processor, block.attn2.processor):
            processor.cache, processor.split = layer, split


def _check_bindable(transformer: WanTransformer3DModel, kv_cache: KVCache) -> None:
    """Raise a ValueError if no pass of the transformer can use the cache."""
    blocks = transformer.blocks
    if len(kv_cache.layers) != len(blocks):
        raise ValueError(f"kv_cache has {len(kv_cache.layers)} layers, the transformer has {len(blocks)} blocks")
    processors = [processor for block in blocks for processor in (block.attn1.processor, block.attn2.processor)]
    foreign = {type(p).__name__ for p in processors if not isinstance(p, CausalWanAttnProcessor)}
    if foreign:
        raise ValueError(
            f"attention processors {sorted(foreign)} cannot read a kv_cache; "
            "restore them with transformer.set_attn_processor(CausalWanAttnProcessor())"
        )
    if torch.is_grad_enabled() and transformer.gradient_checkpointing:
        raise ValueError(
            "gradient checkpointing recomputes blocks after the kv_cache has changed: call "
            "disable_gradient_checkpointing(), or run without kv_cache"
        )
