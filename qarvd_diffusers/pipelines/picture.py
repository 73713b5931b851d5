"""Check and encode the picture that an image-to-video model of `ARVDPipeline` goes on from."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..rollout.condition import MASK_CHANNELS, check_image_latents, image_latents, start_condition
from ..rollout.inputs import StreamInputs, check_tensors
from ..rollout.video_start import Picture, start_pixels


def latent_channels(pipe: DiffusionPipeline) -> int:
    """Return the channels of the latents: those that the transformer puts out."""
    config = pipe.transformer.config
    return config.out_channels or config.in_channels


def check_picture(
    pipe: DiffusionPipeline,
    image: Any,
    latents: torch.Tensor | None,
    video: Any,
    initial_latents: torch.Tensor | None,
) -> bool:
    """Check the start of a stream, and return whether the transformer has channels for a picture.

    Args:
        pipe: an `ARVDPipeline`.
        image: argument of the call.
        latents: `image_latents` of the call.
        video: likewise.
        initial_latents: likewise.

    Raises:
        ValueError: the model needs a picture and gets none or both forms of it, or gets a start that it cannot take.
    """
    channels = latent_channels(pipe)
    wanted = pipe.transformer.config.in_channels - channels
    if not wanted:
        if latents is not None:
            raise ValueError(
                "this model has no input channels for a picture: pass image= or initial_latents= instead of "
                "image_latents="
            )
        return False
    if wanted != MASK_CHANNELS + channels:
        raise ValueError(
            f"the transformer has {wanted} input channels beside the {channels} of the latents, expected "
            f"{MASK_CHANNELS + channels}: a mask and a picture"
        )
    if video is not None or initial_latents is not None:
        name = "video" if video is not None else "initial_latents"
        raise ValueError(f"this model goes on from one picture and takes no {name}: pass image= alone")
    if (image is None) == (latents is None):
        got = "none" if image is None else "image and image_latents"
        raise ValueError(f"this model goes on from a picture: pass image= (or image_latents=), got {got}")
    if latents is None and pipe.vae is None:
        raise ValueError("the pipeline has no vae to encode the picture with: pass image_latents")
    check_tensors(image_latents=latents)
    return True


def picture_condition(
    pipe: DiffusionPipeline, inputs: StreamInputs, image: Picture | None, latents: torch.Tensor | None
) -> torch.Tensor:
    """Return `StreamInputs.condition` on the pipeline's device; arguments are those of `check_picture`.

    Raises:
        ValueError: the picture cannot be read, or the numbers of pictures and samples or the sizes do not fit.
    """
    batch, channels, height, width = inputs.shape
    frames = inputs.num_latent_frames
    if latents is None:
        scale = pipe.vae_scale_factor_spatial
        pixels = start_pixels(image, None, pipe.video_processor, (scale * height, scale * width))
        if len(pixels) not in (1, batch):
            raise ValueError(f"{len(pixels)} pictures for a batch of {batch}: pass one, or one per sample")
        pipe.align_modules()
        latents = image_latents(pixels, frames, pipe.vae_scale_factor_temporal, pipe.encode_frames)
    check_image_latents(latents, batch, channels, frames)
    condition = start_condition(latents.to(pipe._execution_device))
    return condition.expand(batch, -1, -1, -1, -1)
