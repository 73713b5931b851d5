"""Convert a picture or clip to the pixels and latents that a stream starts with."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from ..vae.streaming import latent_statistics
from .config import RolloutConfig

Picture = PIL.Image.Image | np.ndarray | torch.Tensor | str | os.PathLike
"""A PIL image of any mode except F, the path of an image file, an array `[H, W, C]` or a tensor `[C, H, W]` (or the
other order if only that one is possible), or grey `[H, W]`. C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
Values are bool, uint8, uint16, or float in [0, 1]; floats are read as [-1, 1] if any is below `_SIGNED_BELOW`.
Transparent pixels become white.
"""

_CHANNELS = (1, 2, 3, 4)
_FULL_SCALE = {"bool": 1, "uint8": 255, "uint16": 65535}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SLACK = 1e-3  # rounding error of half precision
_SIGNED_BELOW = -0.1  # resampling a picture in [0, 1] undershoots by less


@torch.no_grad()
def start_pixels(
    image: Picture | Sequence[Picture] | None, video: Any, processor: VideoProcessor, size: tuple[int, int]
) -> torch.Tensor:
    """Convert pictures to the VAE's input: upright, without alpha, cropped to the aspect ratio of `size` and resized.

    Args:
        image: one picture, or one per sample (a sequence, or a further leading dimension).
        video: pictures in order, an array `[F, H, W, C]` or a tensor `[F, C, H, W]`, instead of `image`; or one of
            these per sample.
        processor: maps [0, 1] to the values of the VAE.
        size: height and width in pixels.

    Returns:
        `[B, 3, F, height, width]` in [-1, 1], float32.

    Raises:
        ValueError: if both are passed, a video has no frames, samples differ in length, or a picture has an
            unsupported shape, dtype or range of values.
    """
    if image is not None and video is not None:
        raise ValueError("give either image or video as a start, got both")
    samples = _clips(video) if image is None else [[picture] for picture in _pictures(image)]
    if not samples or not all(len(sample) for sample in samples):
        raise ValueError("the video that the stream is to start with has no frames")
    lengths = [len(sample) for sample in samples]
    if len(set(lengths)) > 1:
        raise ValueError(f"the starts of the samples have {lengths} frames, expected the same number in all")
    frames = [frame for sample in samples for frame in sample]
    for frame in frames:
        _check(frame)
    # Decided for all frames at once: a bright frame has no value below zero.
    signed = _is_signed([frame for frame in frames if _dtype(frame) in _FLOATS])
    clips = [torch.stack([_fit(_rgb(frame, signed), size) for frame in sample], dim=1) for sample in samples]
    return torch.as_tensor(processor.normalize(torch.stack(clips)))


def read_picture(path: str | os.PathLike) -> PIL.Image.Image:
    """Read an image file, rotated as its EXIF orientation says.

    Raises:
        ValueError: if it is a URL, or is not a readable image.
        FileNotFoundError: if there is no such file.
    """
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"the picture is a URL ({path}): load it with diffusers.utils.load_image")
    try:
        with PIL.Image.open(path) as picture:
            return PIL.ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: is no picture that can be read ({error})") from error


def _pictures(image: Any) -> Sequence[Picture]:
    """Return the picture of every sample."""
    return list(image) if isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4 else [image]


def _clips(video: Any) -> Sequence[Any]:
    """Return the frames of every sample."""
    if isinstance(video, str | os.PathLike):
        raise ValueError(f"video is a path ({video}): read it with diffusers.utils.load_video")
    if isinstance(video, list | tuple):
        nested = len(video) and (isinstance(video[0], list | tuple) or getattr(video[0], "ndim", 0) == 4)
        return video if nested else [video]
    if not isinstance(video, np.ndarray | torch.Tensor):
        raise ValueError(f"video is a {type(video).__name__}, expected a list of pictures, an array or a tensor")
    if video.ndim not in (4, 5):
        raise ValueError(f"video has shape {tuple(video.shape)}, expected [F, H, W, 3] or, as tensor, [F, 3, H, W]")
    return list(video) if video.ndim == 5 else [video]


def _dtype(frame: Picture) -> str | None:
    """Return the name of an array's or tensor's dtype; None for anything else."""
    if isinstance(frame, np.ndarray):
        return frame.dtype.name
    return str(frame.dtype).removeprefix("torch.") if isinstance(frame, torch.Tensor) else None


def _check(frame: Any) -> None:
    """Raise ValueError if `_rgb` cannot read a frame."""
    if isinstance(frame, PIL.Image.Image | str | os.PathLike):
        return
    if not isinstance(frame, np.ndarray | torch.Tensor):
        raise ValueError(
            f"a frame of the start is a {type(frame).__name__}, expected a PIL image, an array or a tensor"
        )
    shape = tuple(frame.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"a frame of the start has shape {shape}, expected [H, W, 3] or, as tensor, [3, H, W]")
    if len(shape) == 3 and shape[0] not in _CHANNELS and shape[2] not in _CHANNELS:
        raise ValueError(
            f"a frame of the start has shape {shape} and so {shape[_usual_axis(frame)]} channels, expected 1 (grey), "
            "2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)"
        )
    if _dtype(frame) not in (*_FULL_SCALE, *_FLOATS):
        raise ValueError(
            f"a frame of the start is of dtype {_dtype(frame)}, expected uint8, uint16, or float with values from 0 "
            "to 1"
        )


def _is_signed(floats: Sequence[Any]) -> bool:
    """Return whether float frames are in [-1, 1] rather than [0, 1].

    Raises:
        ValueError: if their values are in neither.
    """
    ends = [(float(frame.min()), float(frame.max())) for frame in floats]
    if not ends:
        return False
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    finite = all(math.isfinite(value) for pair in ends for value in pair)
    if finite and high <= 1 + _SLACK:
        if low >= -_SLACK:
            return False
        if -1 - _SLACK <= low <= _SIGNED_BELOW:
            return True
    raise ValueError(
        f"float pictures of the start have values from {low:g} to {high:g}, expected 0 to 1: divide those of 0 to "
        "255 by 255, clamp what resampling left outside"
        if finite
        else "float pictures of the start have values that are not finite (NaN or infinity)"
    )


def _rgb(frame: Picture, signed: bool) -> torch.Tensor:
    """Return a frame as `[3, H, W]` in [0, 1], float32; floats are in [-1, 1] if `signed`."""
    if isinstance(frame, str | os.PathLike):
        frame = read_picture(frame)
    if isinstance(frame, PIL.Image.Image):
        frame = _array(frame)
    dtype, axis = _dtype(frame), _channel_axis(frame)
    if isinstance(frame, np.ndarray):
        frame = torch.from_numpy(frame.astype(np.float32))
    pixels = frame.cpu().float()
    pixels = (pixels + 1) / 2 if signed and dtype in _FLOATS else pixels / _FULL_SCALE.get(str(dtype), 1)
    pixels = (pixels[None] if pixels.ndim == 2 else pixels.movedim(axis, 0)).clamp(0, 1)
    if len(pixels) in (2, 4):
        pixels = 1 + (pixels[:-1] - 1) * pixels[-1:]  # over white
    return pixels.expand(3, -1, -1)


def _usual_axis(frame: np.ndarray | torch.Tensor) -> int:
    """Return the channel axis by convention: last in arrays, first in tensors."""
    return 2 if isinstance(frame, np.ndarray) else 0


def _channel_axis(frame: np.ndarray | torch.Tensor) -> int:
    """Return the channel axis: the usual one, unless only the other end is possible."""
    usual = _usual_axis(frame)
    return 2 - usual if frame.ndim == 3 and frame.shape[usual] not in _CHANNELS else usual


def _array(picture: PIL.Image.Image) -> np.ndarray:
    """Convert a picture to uint8 `[H, W, 3]` or `[H, W, 4]`, or one with 16 bits to uint16 `[H, W]`.

    Raises:
        ValueError: if the range of its values is unknown.
    """
    picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("the range of values of a PIL picture of mode F is unknown: give an array in [0, 1]")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture)
        low, high = int(grey.min()), int(grey.max())
        # Mode I has 32 bits. Older versions of Pillow read 16-bit files into it; other code puts 8 bits there.
        if low < 0 or high > 65535 or (picture.mode == "I" and 0 < high < 256):
            raise ValueError(
                f"a PIL picture of mode I has values from {low} to {high}, expected 16 bits (to 65535): give an "
                "array, uint8 if it has 8"
            )
        return grey.astype(np.uint16)
    return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))


def _fit(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop the middle of `[3, H, W]` in [0, 1] to the aspect ratio of `size`; resize it to `[3, height, width]`."""
    (height, width), (rows, columns) = size, pixels.shape[1:]
    kept = (max(1, min(rows, round(columns * height / width))), max(1, min(columns, round(rows * width / height))))
    top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
    middle = pixels[None, :, top : top + kept[0], left : left + kept[1]]
    return torch.nn.functional.interpolate(middle, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def fit_length(pixels: torch.Tensor, fields: RolloutConfig, temporal_scale: int) -> torch.Tensor:
    """Return the last frames of `[B, 3, F, H, W]` that make whole chunks, or whole latent frames with `clamped_start`.

    A single picture is repeated to the length of the shortest start.

    Raises:
        ValueError: if a video is shorter than the shortest start.
    """
    chunk = 1 if fields.clamped_start else fields.num_frames_per_chunk
    lead = 1 if fields.independent_first_frame else 0
    least = lead or chunk
    num_frames = pixels.shape[2]
    if num_frames == 1:
        return pixels.expand(-1, -1, 1 + temporal_scale * (least - 1), -1, -1)
    latent_frames = 1 + (num_frames - 1) // temporal_scale
    if latent_frames < least:
        raise ValueError(
            f"a start of {num_frames} frames is too short: this model starts with at least "
            f"{1 + temporal_scale * (least - 1)}"
        )
    latent_frames -= (latent_frames - lead) % chunk
    return pixels[:, :, -(1 + temporal_scale * (latent_frames - 1)) :]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKLWan, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Encode pixels `[B, 3, F, H, W]` in [-1, 1] to normalized latents `[B, C, frames, h, w]`, the mode of the
    posterior.
    """
    latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std
