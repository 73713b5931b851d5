"""Send finished chunks to the browser: small mp4 files in ComfyUI's temp folder, and one event per chunk."""

from __future__ import annotations

import base64
import os
from fractions import Fraction
from io import BytesIO
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types
from PIL import Image

from .runs import Run, send

EVENT = "qarvd.chunk"
STEP_EVENT = "qarvd.step"
SUBFOLDER = "qarvd"


def video(images: torch.Tensor, fps: float) -> Any:
    """Make a ComfyUI VIDEO of images `[frames, height, width, 3]` in [0, 1]."""
    return InputImpl.VideoFromComponents(
        Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(fps).limit_denominator(1000))
    )


def picture(image: torch.Tensor) -> Image.Image:
    """Convert one image `[height, width, 3]` in [0, 1] for ComfyUI's own previews."""
    return Image.fromarray((image.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().astype(np.uint8))


class ChunkFeed:
    """Show the chunks of one run in its node.

    Args:
        run: the run; it records the chunks.
        fps: frames per second.
    """

    def __init__(self, run: Run, fps: float) -> None:
        self._run, self._fps = run, fps

    def show(self, images: torch.Tensor, seconds: float) -> None:
        """Write a chunk `[frames, height, width, 3]` and notify the browser that queued the run."""
        folder = os.path.join(folder_paths.get_temp_directory(), SUBFOLDER)
        os.makedirs(folder, exist_ok=True)
        index = len(self._run.chunks)
        name = f"{self._run.id}_{index:04d}.mp4"
        video(images, self._fps).save_to(
            os.path.join(folder, name), format=Types.VideoContainer("mp4"), codec=Types.VideoCodec("h264")
        )
        chunk = {"index": index, "frames": len(images), "seconds": round(seconds, 3)}
        chunk |= {"filename": name, "subfolder": SUBFOLDER, "type": "temp"}
        self._run.chunks.append({**self._run.status(), **chunk})
        send(EVENT, self._run.chunks[-1])

    def step(self, image: Image.Image) -> None:
        """Show a picture of the chunk in progress."""
        buffer = BytesIO()
        image.save(buffer, "PNG")
        still = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        send(STEP_EVENT, {**self._run.status(), "image": still})


class LatentPreview:
    """Approximate the colours of latents without decoding: a least-squares linear map, fitted to the latest chunk."""

    def __init__(self) -> None:
        self._map: torch.Tensor | None = None

    def fit(self, latents: torch.Tensor, images: torch.Tensor) -> None:
        """Fit the map to normalized latents `[1, C, F, h, w]` and their images `[frames, height, width, 3]`."""
        cells = latents[0, :, -1].float().cpu()
        colors = torch.nn.functional.adaptive_avg_pool2d(images[-1].permute(2, 0, 1), cells.shape[-2:])
        self._map = torch.linalg.lstsq(_with_one(cells), colors.flatten(1).T).solution

    def image(self, latents: torch.Tensor) -> Image.Image | None:
        """Return a small picture of the last frame of the latents; None before the first `fit`."""
        if self._map is None:
            return None
        cells = latents[0, :, -1].float().cpu()
        return picture((_with_one(cells) @ self._map).reshape(*cells.shape[-2:], 3))


def _with_one(cells: torch.Tensor) -> torch.Tensor:
    """Return cells `[C, h, w]` as rows `[h * w, C + 1]` with a constant column."""
    rows = cells.flatten(1).T
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
