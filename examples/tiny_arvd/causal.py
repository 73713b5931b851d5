"""Causal attention over the stock `WanTransformer3DModel`: all chunks at once (training), or one by one (generation).

Both forms give a chunk the keys and values of its own tokens and of the clean versions of the chunks it may see: the
sink (chunk 0) and the latest ones inside the rolling window. Rotary positions are absolute latent frame indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from coupling import write_state
from diffusers import WanTransformer3DModel

CHUNK_FRAMES = 3
LOCAL_ATTENTION_FRAMES = 15  # sink and current chunk included
SINK_FRAMES = 3
DENOISING_TIMESTEPS = (1000, 750, 500, 250)
TIMESTEP_SHIFT = 5.0
STATE_STEP = 2  # the last denoising step whose noise chooses the scene of chunk 0


def sigmas() -> list[float]:
    """Noise level of each denoising step: the shifted table 5s / (1 + 4s), read at the unshifted timesteps."""
    plain = [t / 1000 for t in DENOISING_TIMESTEPS]
    return [TIMESTEP_SHIFT * s / (1 + (TIMESTEP_SHIFT - 1) * s) for s in plain]


def visible_chunks(chunk: int) -> list[int]:
    """Earlier chunks that `chunk` attends to."""
    sink = SINK_FRAMES // CHUNK_FRAMES
    local = (LOCAL_ATTENTION_FRAMES - SINK_FRAMES) // CHUNK_FRAMES - 1
    return sorted({*range(min(sink, chunk)), *range(max(0, chunk - local), chunk)})


def rotary_table(model: WanTransformer3DModel, num_chunks: int, latent_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [chunks, tokens, 1, head_dim], with absolute frame positions."""
    probe = torch.empty(1, 1, num_chunks * CHUNK_FRAMES, latent_size, latent_size, device=model.device)
    cos, sin = model.rope(probe)
    return cos[0].unflatten(0, (num_chunks, -1)), sin[0].unflatten(0, (num_chunks, -1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _project(attn, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as [N, tokens, heads, head_dim]."""
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
    return tuple(y.unflatten(-1, (attn.heads, -1)) for y in (q, k.to(q.dtype), v.to(q.dtype)))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


@dataclass
class Layout:
    """How a training batch is laid out: `clips * chunks * 2` elements (clean, noisy), then `singles` lone chunks 0."""

    clips: int
    chunks: int
    singles: int

    @property
    def paired(self) -> int:
        return self.clips * self.chunks * 2


class ParallelSelfAttention:
    """attn1 processor for training: every chunk, clean and noisy, in one pass."""

    def __init__(self, layout: Layout, rotary: tuple[torch.Tensor, torch.Tensor]):
        self.layout = layout
        self.cos, self.sin = rotary
        groups: dict[int, list[int]] = {}
        for chunk in range(layout.chunks):
            groups.setdefault(len(visible_chunks(chunk)), []).append(chunk)
        # chunks that see equally many others are contiguous and share one dense attention call
        self.groups = [
            (c[0], c[-1] + 1, torch.tensor([visible_chunks(i) for i in c], dtype=torch.long, device=self.cos.device))
            for c in groups.values()
        ]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        layout = self.layout
        q, k, v = _project(attn, hidden_states, hidden_states)
        singles = slice(layout.paired, None)
        lone_q, lone_k = (_rotate(y[singles], self.cos[0], self.sin[0]) for y in (q, k))
        lone = _attend(lone_q, lone_k, v[singles])
        q, k, v = (y[: layout.paired].unflatten(0, (layout.clips, layout.chunks, 2)) for y in (q, k, v))
        q, k = (_rotate(y, self.cos[:, None], self.sin[:, None]) for y in (q, k))
        parts = []
        for start, stop, visible in self.groups:
            own = (q[:, start:stop], k[:, start:stop], v[:, start:stop])
            parts.append(self._group(own, k[:, :, 0], v[:, :, 0], visible))
        out = torch.cat(parts, dim=1).flatten(0, 2)
        return attn.to_out[0](torch.cat([out, lone]).to(hidden_states.dtype))

    @staticmethod
    def _group(own, clean_k, clean_v, visible: torch.Tensor) -> torch.Tensor:
        q, k, v = own  # [clips, n, 2, tokens, heads, head_dim]; visible: int64 [n, seen]
        if visible.shape[1]:
            k, v = (
                torch.cat([clean[:, visible].flatten(2, 3)[:, :, None].expand(-1, -1, 2, -1, -1, -1), y], dim=3)
                for clean, y in ((clean_k, k), (clean_v, v))
            )
        return _attend(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)).unflatten(0, q.shape[:3])


class ParallelCrossAttention:
    """attn2 processor for training: the text is given once per clip (then once per lone chunk)."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        layout = self.layout
        q, k, v = _project(attn, hidden_states, encoder_hidden_states)
        main = q[: layout.paired].reshape(layout.clips, -1, *q.shape[2:])
        out = _attend(main, k[: layout.clips], v[: layout.clips]).view(layout.paired, *hidden_states.shape[1:])
        lone = _attend(q[layout.paired :], k[layout.clips :], v[layout.clips :])
        return attn.to_out[0](torch.cat([out, lone]).to(hidden_states.dtype))


class StreamSelfAttention:
    """attn1 processor for generation; keeps the keys and values of earlier chunks."""

    def __init__(self, rotary: tuple[torch.Tensor, torch.Tensor]):
        self.cos, self.sin = rotary
        self.chunk = 0
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = _project(attn, hidden_states, hidden_states)
        q, k = (_rotate(y, self.cos[self.chunk], self.sin[self.chunk]) for y in (q, k))
        visible = visible_chunks(self.chunk)
        self.cache = {c: kv for c, kv in self.cache.items() if c in visible}
        self.cache[self.chunk] = (k, v)
        k, v = (
            torch.cat(parts, dim=1) for parts in zip(*(self.cache[c] for c in (*visible, self.chunk)), strict=True)
        )
        return attn.to_out[0](_attend(q, k, v).to(hidden_states.dtype))


def make_parallel(model: WanTransformer3DModel, layout: Layout, latent_size: int) -> None:
    self_attention = ParallelSelfAttention(layout, rotary_table(model, layout.chunks, latent_size))
    cross_attention = ParallelCrossAttention(layout)
    for block in model.blocks:
        block.attn1.set_processor(self_attention)
        block.attn2.set_processor(cross_attention)


@torch.no_grad()
def generate(
    model: WanTransformer3DModel,
    text: torch.Tensor,
    num_chunks: int,
    latent_size: int = 8,
    state: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Stream normalised latents chunk by chunk: four denoising steps, then a refresh pass at timestep 0.

    Args:
        text: [N, tokens, text_dim] prompt embeddings.
        state: [N, 8] if given, the scene is forced by writing it into the noise of chunk 0 (see `coupling.py`).

    Returns:
        [N, num_chunks, 4, 16, 3, H, W]: every step's estimate of the clean chunk; `[:, :, -1]` is the output.
    """
    rotary = rotary_table(model, num_chunks, latent_size)
    processors = [StreamSelfAttention(rotary) for _ in model.blocks]
    for block, processor in zip(model.blocks, processors, strict=True):
        block.attn1.set_processor(processor)
    levels, size = sigmas(), (len(text), model.config.in_channels, CHUNK_FRAMES, latent_size, latent_size)

    def noise() -> torch.Tensor:
        device = generator.device if generator is not None else text.device
        return torch.randn(size, generator=generator, device=device).to(text.device)

    estimates = []
    for chunk in range(num_chunks):
        for processor in processors:
            processor.chunk = chunk
        x = noise()
        for step, sigma in enumerate(levels):
            if chunk == 0 and step == STATE_STEP and state is not None:
                x = write_state(x, state, sigma)
            timestep = torch.full((len(text),), 1000 * sigma, device=text.device)
            x0 = x - sigma * model(x, timestep, text, return_dict=False)[0].float()
            estimates.append(x0)
            if step + 1 < len(levels):
                x = (1 - levels[step + 1]) * x0 + levels[step + 1] * noise()
        model(x0, torch.zeros(len(text), device=text.device), text, return_dict=False)
    return torch.stack(estimates, dim=1).unflatten(1, (num_chunks, len(levels)))
