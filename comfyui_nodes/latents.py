"""Between ComfyUI's latents (raw VAE space) and the pipeline's (normalized)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


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
