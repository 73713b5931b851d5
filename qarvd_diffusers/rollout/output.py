"""Define what pipelines return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

Frames = np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]
"""`np`: `[B, F, H, W, 3]` float32 in [0, 1]; `pt`: `[B, F, 3, H, W]` in [0, 1]; `pil`: a list of images per sample;
`latent`: `[B, C, F, H, W]`."""


@dataclass
class Chunk:
    """One step of a stream.

    Attributes:
        index: index of the generated chunk; -1 for `initial_latents`, which come first.
        frames: decoded frames in the requested `output_type`, see `Frames`.
        latents: clean latents `[B, C, F, H, W]`.
        seconds: wall-clock time spent on this chunk: denoising, cache refresh and decoding.
    """

    index: int
    frames: Frames
    latents: torch.Tensor
    seconds: float


@dataclass
class ARVDPipelineOutput(BaseOutput):
    """A whole video.

    Attributes:
        frames: decoded frames in the requested `output_type`, see `Frames`.
    """

    frames: Frames


def concatenate(parts: list[Any], output_type: str) -> Frames:
    """Join `Frames` of successive chunks along time."""
    if output_type == "pil":
        return [[image for part in parts for image in part[sample]] for sample in range(len(parts[0]))]
    if output_type == "np":
        return np.concatenate(parts, axis=1)
    return torch.cat(parts, dim=2 if output_type == "latent" else 1)
