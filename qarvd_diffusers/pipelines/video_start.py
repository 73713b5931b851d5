"""A given picture or clip as the start of a stream: pixels -> the latents that the video begins with."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from ..models.causal_fields import CausalFields

Picture = PIL.Image.Image | np.ndarray | torch.Tensor
"""A PIL image, `[H, W, 3]` (array; uint8, or float in [0, 1]) or `[3, H, W]` (tensor; float in [0, 1])."""


def start_pixels(image: Picture | None, video: Any, processor: VideoProcessor, size: tuple[int, int]) -> torch.Tensor:
    """Frames as the VAE wants them.

    Args:
        image: one picture.
        video: pictures in order, an array `[F, H, W, 3]` or a tensor `[F, 3, H, W]`, instead of `image`; an outermost
            dimension of samples is allowed.
        processor: resizes.
        size: height and width in pixels.

    Returns:
        `[B, 3, F, height, width]` in [-1, 1], float32.

    Raises:
        ValueError: if both are given, or a video has no frames.
    """
    if image is not None and video is not None:
        raise ValueError("give either image or video as a start, got both")
    frames = [image] if image is not None else video
    nested = isinstance(frames, list | tuple) and len(frames) and isinstance(frames[0], list | tuple)
    samples = list(frames) if nested or getattr(frames, "ndim", 0) == 5 else [frames]
    if not all(len(sample) for sample in samples):
        raise ValueError("the video that the stream is to start with has no frames")
    return torch.stack(
        [torch.cat([_picture(frame, processor, size) for frame in sample]).movedim(0, 1) for sample in samples]
    )


def _picture(frame: Picture, processor: VideoProcessor, size: tuple[int, int]) -> torch.Tensor:
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8:
        frame = frame.astype(np.float32) / 255
    if isinstance(frame, np.ndarray | torch.Tensor) and frame.ndim != 3:
        raise ValueError(
            f"a frame of the start has shape {tuple(frame.shape)}, expected [H, W, 3] or, as tensor, [3, H, W]"
        )
    return processor.preprocess(frame, *size).float()


def fit_length(pixels: torch.Tensor, fields: CausalFields, temporal_scale: int) -> torch.Tensor:
    """The last frames of `[B, 3, F, H, W]` that make a start of whole chunks (or, clamped, frames); a single picture stands still for the shortest start.

    Raises:
        ValueError: if the video is shorter than the shortest start.
    """
    chunk = 1 if fields.clamped_start else fields.num_frames_per_chunk
    lead = 1 if fields.independent_first_frame else 0
    least = lead or chunk
    given = pixels.shape[2]
    if given == 1:
        return pixels.expand(-1, -1, 1 + temporal_scale * (least - 1), -1, -1)
    latent_frames = 1 + (given - 1) // temporal_scale
    if latent_frames < least:
        raise ValueError(
            f"a start of {given} frames is too short: this model starts with at least {1 + temporal_scale * (least - 1)}"
        )
    latent_frames -= (latent_frames - lead) % chunk
    return pixels[:, :, -(1 + temporal_scale * (latent_frames - 1)) :]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKLWan, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pixels `[B, 3, F, H, W]` in [-1, 1] -> normalized latents `[B, C, frames, h, w]`, the mode of the posterior."""
    latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std
