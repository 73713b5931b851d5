"""Between ComfyUI's latents (raw VAE space) and the pipeline's (normalized), and from pictures to either."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from qarvd_diffusers import ARVDPipeline


def _statistics(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like), std.to(like)


def normalize(vae: AutoencoderKLWan, raw: torch.Tensor) -> torch.Tensor:
    """Raw latents `[B, C, F, H, W]` with the mean and deviation of the VAE's config taken out."""
    mean, std = _statistics(vae, raw)
    return (raw - mean) / std


def denormalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalize`."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def encode_start(
    pipe: ARVDPipeline, images: torch.Tensor, size: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Normalized latents of the pictures a video starts with.

    Chunks are whole: a clip is cut to as many as it fills, and one that fills none is held at its last picture.

    Args:
        pipe: its VAE encodes.
        images: `[frames, height, width, 3]` in [0, 1].
        size: width and height in pixels to scale to.
        device: where the VAE is.
    """
    fields, scale = pipe.causal_fields, pipe.vae_scale_factor_temporal
    pieces = [1] if fields.independent_first_frame else [fields.num_frames_per_chunk]
    latent_frames = sum(pieces)
    while 1 + scale * (latent_frames + fields.num_frames_per_chunk - 1) <= len(images):
        latent_frames += fields.num_frames_per_chunk
    frames = 1 + scale * (latent_frames - 1)
    clip = torch.cat([images[:frames], images[-1:].expand(max(0, frames - len(images)), -1, -1, -1)])
    pixels = clip[..., :3].permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[-2:]) != (size[1], size[0]):
        pixels = torch.nn.functional.interpolate(pixels, (size[1], size[0]), mode="bilinear", antialias=True)
    tensor = (pixels * 2 - 1).transpose(0, 1)[None].to(device=device, dtype=pipe.vae.dtype)
    return normalize(pipe.vae, pipe.vae.encode(tensor).latent_dist.mode().float())
