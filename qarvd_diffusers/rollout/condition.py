"""Make the input channels that show an image-to-video transformer the picture that its video starts with."""

from __future__ import annotations

from collections.abc import Callable

import torch

MASK_CHANNELS = 4  # one per pixel frame of a latent frame, as in Wan's image-to-video models
STEADY = 30  # latent frames; the encoding of still pixels changes no more after them, as Wan's encoder sees 29 back


def condition_frames(num_frames: int | None) -> int:
    """Return the latent frames to encode for a video of `num_frames` latent ones (None: endless)."""
    return max(2, min(STEADY, num_frames or STEADY))


def image_latents(
    picture: torch.Tensor, num_frames: int | None, temporal_scale: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Encode a picture and grey frames after it; return `[B, C, F, h, w]`.

    Args:
        picture: `[B, 3, 1, height, width]` in [-1, 1].
        num_frames: latent frames of the video, None if it is endless.
        temporal_scale: pixel frames per latent frame after the first.
        encode: returns the normalized latents of pixels.
    """
    after = temporal_scale * (condition_frames(num_frames) - 1)
    return encode(torch.nn.functional.pad(picture, (0, 0, 0, 0, 0, after)))


def start_condition(latents: torch.Tensor) -> torch.Tensor:
    """Return `StreamInputs.condition` `[B, 4 + C, F, h, w]`: a mask, 1 in frame 0, then the image latents."""
    mask = torch.zeros_like(latents[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


def check_image_latents(latents: torch.Tensor, batch: int, channels: int, num_frames: int | None) -> None:
    """Check image latents that the caller passes.

    Raises:
        ValueError: their shape is not `[B or 1, channels, F, h, w]`, or they end before they are steady and before the
            video ends.
    """
    got, least = list(latents.shape), condition_frames(num_frames)
    if len(got) != 5 or got[0] not in (1, batch) or got[1] != channels or got[2] < least:
        raise ValueError(
            f"image_latents has shape {got}, expected [{batch}, {channels}, F, h, w] with at least {least} latent "
            "frames: the encoding of the picture and of grey frames after it"
        )
