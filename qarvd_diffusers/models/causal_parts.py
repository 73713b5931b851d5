"""What a causal pass needs in place of stock parts: a float64 timestep sinusoid, RoPE with an offset, attention over a cache.

`CausalWanTransformer3DModel` installs them once, and binds cache, offset and split to them for the length of a pass. Unbound
they compute exactly what the stock parts compute.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import nn

from ..kv_cache.layer import KVLayerCache
from .context_parallel import TokenSplit


class CausalTimesteps(Timesteps):
    """Timestep sinusoid that can be computed in float64.

    The causal Wan models were trained with a float64 sinusoid; the stock float32 one moves their output by up to 3e-5.
    """

    def __init__(self, stock: Timesteps) -> None:
        super().__init__(stock.num_channels, stock.flip_sin_to_cos, stock.downscale_freq_shift, stock.scale)
        self.float64 = False

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`[N]` timesteps -> `[N, num_channels]` float32."""
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
    """Wan's 3D RoPE whose first frame sits at `frame_offset`; takes over the tables of a stock module.

    With a `cache_start` bound it is a third output; with `window_frames` bound too, the table of all frames in the window is
    a fourth and a fifth: earlier frames count from 0, the pass has its own positions. With a `split` bound, cos and sin are those
    of its own tokens. The stock forward hands RoPE through to every block untouched, and of
    all values that reach a block only its arguments may change between passes without recompiling it.
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
        """Latents `[B, C, F, H, W]` -> cos and sin, each `[1, tokens, 1, head_dim]`, and what is bound.

        Raises:
            ValueError: if a position lies beyond the table.
        """
        sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        starts = [self.frame_offset // self.patch_size[0], 0, 0]
        for axis, start, size in zip(("frame", "row", "column"), starts, sizes, strict=True):
            if start + size > self.max_seq_len:
                raise ValueError(
                    f"{axis} position {start + size - 1} lies beyond the RoPE table of rope_max_seq_len = "
                    f"{self.max_seq_len} positions: choose a smaller picture or local_attention_frames, or load the "
                    "transformer with a larger rope_max_seq_len in its config"
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

    def turn(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, `[t_dim / 2]` each, of the angles by which `frames` positions differ."""
        times, rest = divmod(frames, self.max_seq_len - 1)
        rows = [self.max_seq_len - 1, rest]
        cos, sin = (table[rows, : self.t_dim].cpu().double() for table in (self.freqs_cos, self.freqs_sin))
        last, turned = torch.complex(cos[:, 0::2], sin[:, 1::2])
        turned = turned * last**times
        device = self.freqs_cos.device
        return turned.real.float().to(device), turned.imag.float().to(device)

    def _table(self, freqs: torch.Tensor, starts: list[int], sizes: list[int]) -> torch.Tensor:
        parts = []
        for axis, part in enumerate(freqs.split([self.t_dim, self.h_dim, self.w_dim], dim=1)):
            view = [1, 1, 1, part.shape[1]]
            view[axis] = sizes[axis]
            parts.append(part[starts[axis] : starts[axis] + sizes[axis]].view(view).expand(*sizes, -1))
        return torch.cat(parts, dim=-1).reshape(1, -1, 1, freqs.shape[1])


def rotate(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to interleaved pairs of `[B, tokens, heads, head_dim]`; `cos`, `sin` as from `WanRotaryPosEmbed`."""
    first, second = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).type_as(hidden_states)


class CausalWanAttnProcessor(WanAttnProcessor):
    """Wan attention over the K/V of a bound `KVLayerCache`; the stock processor while none is bound.

    With a `split` bound, tokens are those of this process, and self-attention exchanges them for all tokens of its heads.
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
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        return query, key, value

    def text(self, attn: WanAttention, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention K/V `[B, text_tokens, heads, head_dim]`: the cached ones, or projected and cached now."""
        # Cached tensors would carry a graph that the first backward frees: with gradients they are computed anew.
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
