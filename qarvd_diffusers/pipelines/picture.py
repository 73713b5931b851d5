"""Check and encode the picture or clip that a stream of `ARVDPipeline` starts with, or goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from ..rollout.condition import MASK_CHANNELS, check_image_latents, image_latents, start_condition
from ..rollout.config import RolloutConfig
from ..rollout.inputs import StreamInputs, check_tensors
from ..rollout.video_start import Picture, encode_pixels, fit_length, start_pixels
from .components import latent_size


class PictureMixin:
    """Encode the start of a stream; a part of `ARVDPipeline`."""

    if TYPE_CHECKING:  # the host's
        transformer: Any
        vae: Any
        video_processor: Any
        rollout_config: RolloutConfig
        vae_scale_factor_spatial: int
        vae_scale_factor_temporal: int
        _execution_device: torch.device

        def align_modules(self) -> None: ...

    def encode_start(
        self,
        image: Picture | Sequence[Picture] | None = None,
        video: Any = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
    ) -> torch.Tensor:
        """Encode a picture or a clip as initial latents `[B, C, F, h, w]`.

        Args:
            image: a picture, or one per sample; see `Picture` for the types. If the model has no single first frame,
                it is repeated for one chunk.
            video: a clip, or one per sample; its longest end of whole chunks is used.
            height: pixels; each picture is cropped to the aspect ratio around its centre and resized. None takes that
                of the pipeline's config.
            width: see `height`.
            batch: number of samples; a single start is used for all.

        Raises:
            ValueError: if there is no VAE, the clip is too short, or the numbers of starts and samples differ.
        """
        if self.vae is None:
            raise ValueError("the pipeline has no vae to encode a start with: pass initial_latents")
        scale = self.vae_scale_factor_spatial
        size = [scale * pixels for pixels in latent_size(self, height, width, None)]
        pixels = start_pixels(image, video, self.video_processor, tuple(size))
        if len(pixels) not in (1, batch):
            raise ValueError(
                f"{len(pixels)} starts for a batch of {batch}: pass one, or one per sample; pass a clip as video="
            )
        pixels = fit_length(pixels, self.rollout_config, self.vae_scale_factor_temporal)
        self.align_modules()
        return self.encode_frames(pixels).expand(batch, -1, -1, -1, -1)

    def encode_frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `ARVDMixin.encode_frames`."""
        return encode_pixels(self.vae, pixels, self._execution_device)


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
