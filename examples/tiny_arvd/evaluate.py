"""Adherence of the generator on held-out prompts, and a contact sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from causal import generate
from PIL import Image
from parallel_vae import decode_video, latent_statistics
from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts
from scenes import to_uint8
from text import encode, tokenize


@torch.no_grad()
def stream_videos(model, tokenizer, vae, prompts: list[str], num_chunks: int, seed: int = 0) -> np.ndarray:
    """uint8 [N, frames, 64, 64, 3] for the prompts; noise from a CPU generator, so that it is the same everywhere."""
    device = vae.device
    text = encode(model.text_encoder, tokenize(tokenizer, prompts).to(device))
    generator = torch.Generator().manual_seed(seed)
    size = 64 // vae.config.scale_factor_spatial
    latents = generate(model.transformer, text, num_chunks, size, generator=generator)[:, :, -1]
    mean, std = latent_statistics(vae, device)
    latents = latents.transpose(1, 2).flatten(2, 3) * std + mean
    return np.concatenate([to_uint8(decode_video(vae, part).float()) for part in latents.split(16)])


def evaluate(model, tokenizer, vae, count: int, num_chunks: int, sheet: Path | None = None) -> dict[str, float]:
    """Share of `count` held-out prompts that are right, over the whole clip and in its last chunk alone."""
    prompts = held_out_prompts(count)
    videos = stream_videos(model, tokenizer, vae, prompts, num_chunks)
    frames = videos.shape[1]
    whole = [adherence(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    last = [adherence(v, p, (max(0, frames - 12), frames)) for v, p in zip(videos, prompts, strict=True)]
    if sheet is not None:
        save_sheet(videos[:24], sheet)
    names = ("correct", "color", "shape", "motion", "size", "background")
    result = {name: float(np.mean([getattr(found, name) for found in whole])) for name in names}
    return {k: round(v, 3) for k, v in result.items()} | {"last": round(float(np.mean([f.correct for f in last])), 3)}


def save_sheet(videos: np.ndarray, path: Path, columns: int = 15) -> None:
    """One row per video: its first frames four apart, then frames evenly spread over the rest."""
    head = list(range(0, min(25, videos.shape[1]), 4))
    tail = np.linspace(25, videos.shape[1] - 1, columns - len(head)).astype(int) if videos.shape[1] > 25 else []
    rows = [np.concatenate([np.pad(video[i], ((1, 1), (1, 1), (0, 0))) for i in [*head, *tail]], axis=1) for video in videos]
    Image.fromarray(np.concatenate(rows)).save(path)
