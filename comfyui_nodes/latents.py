"""Convert between ComfyUI's latents (raw VAE space) and the pipeline's (normalized)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .compat import NodeError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def _statistics(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of a VAE's latents, shaped to broadcast over `like`."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like), std.to(like)


def normalize(vae: AutoencoderKLWan, raw: torch.Tensor) -> torch.Tensor:
    """Normalize raw latents `[B, C, F, H, W]` by the mean and standard deviation in the VAE's config."""
    mean, std = _statistics(vae, raw)
    return (raw - mean) / std


def denormalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Invert `normalize`."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def one_video(name: str, samples: Any, channels: int, model: str) -> torch.Tensor:
    """Return `samples` of the input `name` if they are latents of one video, `[1, channels, frames, height, width]`.

    Raises:
        NodeError: if they are latents of pictures, of several videos, or of another VAE than `model`'s.
    """
    wanted = f"[1, {channels}, frames, height, width]"
    remedy = "Connect the latents of a video, from Q-ARVD Stream Generate or from VAE Encode with this model's VAE."
    if not isinstance(samples, torch.Tensor) or samples.ndim != 5:
        shape = list(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise NodeError(f"{name} holds no video: it is {shape}, expected {wanted} for {model}.", remedy)
    if samples.shape[1] != channels:
        raise NodeError(f"{name} has {samples.shape[1]} channels, latents of {model} have {channels}.", remedy)
    if len(samples) != 1:
        raise NodeError(
            f"{name} holds {len(samples)} videos, expected one.", "Select one of them with Latent From Batch."
        )
    return samples
