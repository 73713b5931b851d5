"""Adherence on held-out prompts, and contact sheets: of a generator in training, or of a saved pipeline.

python evaluate.py --model tiny_arvd --chunks 7 --prompts 128 --sheet sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from causal import generate
from parallel_vae import decode_video, latent_statistics
from PIL import Image
from scenes import to_uint8
from text import encode, tokenize

from qarvd_diffusers.evaluation.moving_shapes import adherence, held_out_prompts


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
    """Adherence of a generator on `count` held-out prompts; see `judge`."""
    prompts = held_out_prompts(count)
    videos = stream_videos(model, tokenizer, vae, prompts, num_chunks)
    if sheet is not None:
        save_sheet(videos[:24], sheet)
    return judge(videos, prompts)


def judge(videos: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Share of correct videos, for each attribute over the whole clip, and (`last`) in the last chunk alone."""
    frames = videos.shape[1]
    whole = [adherence(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    last = [adherence(v, p, (max(0, frames - 12), frames)) for v, p in zip(videos, prompts, strict=True)]
    names = ("correct", "color", "shape", "motion", "size", "background")
    result = {name: float(np.mean([getattr(found, name) for found in whole])) for name in names}
    return {k: round(v, 3) for k, v in result.items()} | {"last": round(float(np.mean([f.correct for f in last])), 3)}


def save_sheet(videos: np.ndarray, path: Path, columns: int = 15) -> None:
    """One row per video: its first frames four apart, then frames evenly spread over the rest."""
    head = list(range(0, min(25, videos.shape[1]), 4))
    tail = np.linspace(25, videos.shape[1] - 1, columns - len(head)).astype(int) if videos.shape[1] > 25 else []
    rows = [
        np.concatenate([np.pad(video[i], ((1, 1), (1, 1), (0, 0))) for i in [*head, *tail]], axis=1)
        for video in videos
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


def pipeline_videos(pipeline, prompts: list[str], num_chunks: int, batch: int = 16) -> np.ndarray:
    """uint8 [N, frames, 64, 64, 3] from an `ARVDPipeline`."""
    generator, videos = torch.Generator().manual_seed(0), []
    for i in range(0, len(prompts), batch):
        part = pipeline(prompts[i : i + batch], num_chunks=num_chunks, generator=generator, output_type="np").frames
        videos.append((np.asarray(part) * 255).round().astype(np.uint8))
    return np.concatenate(videos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved pipeline")
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    from qarvd_diffusers import ARVDPipeline  # training needs no pipeline

    pipeline = ARVDPipeline.from_pretrained(args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(args.prompts)
    videos = pipeline_videos(pipeline, prompts, args.chunks)
    if args.sheet is not None:
        save_sheet(videos[:24], args.sheet)
    for video, prompt in zip(videos, prompts, strict=True):
        if not adherence(video, prompt).correct:
            print("wrong:", prompt)
    print(f"{args.prompts} prompts, {args.chunks} chunks:", judge(videos, prompts))


if __name__ == "__main__":
    main()
