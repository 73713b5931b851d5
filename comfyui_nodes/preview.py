"""Finished chunks on their way to the browser: small mp4 files in ComfyUI's temp folder, and one event each."""

from __future__ import annotations

import base64
import os
import uuid
from fractions import Fraction
from io import BytesIO
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types
from PIL import Image
from server import PromptServer

EVENT = "qarvd.chunk"
STEP_EVENT = "qarvd.step"
SUBFOLDER = "qarvd"


def video(images: torch.Tensor, fps: float) -> Any:
    """A ComfyUI VIDEO of images `[frames, height, width, 3]` in [0, 1]."""
    return InputImpl.VideoFromComponents(
        Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(fps).limit_denominator(1000))
    )


def picture(image: torch.Tensor) -> Image.Image:
    """One image `[height, width, 3]` in [0, 1] for ComfyUI's own previews."""
    return Image.fromarray((image.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().astype(np.uint8))


class ChunkFeed:
    """Shows the chunks of one run in the node that makes them.

    Args:
        node_id: the node's unique id; inside a subgraph it has the form `29:12`.
        total: chunks to come.
        fps: frames per second.
    """

    def __init__(self, node_id: str, total: int, fps: float) -> None:
        self.node_id, self.total, self.fps = node_id, total, fps
        self.shown: list[dict[str, Any]] = []
        self._run = uuid.uuid4().hex[:12]

    def show(self, images: torch.Tensor, seconds: float) -> None:
        """Write a chunk and tell the browser that asked for the run."""
        folder = os.path.join(folder_paths.get_temp_directory(), SUBFOLDER)
        os.makedirs(folder, exist_ok=True)
        name = f"{self._run}_{len(self.shown):04d}.mp4"
        video(images, self.fps).save_to(
            os.path.join(folder, name), format=Types.VideoContainer("mp4"), codec=Types.VideoCodec("h264")
        )
        self.shown.append(
            {
                "node": self.node_id,
                "run": self._run,
                "index": len(self.shown),
                "total": self.total,
                "frames": len(images),
                "seconds": round(seconds, 3),
                "filename": name,
                "subfolder": SUBFOLDER,
                "type": "temp",
            }
        )
        _send(EVENT, self.shown[-1])

    def step(self, image: Image.Image) -> None:
        """Show a still of the chunk in progress."""
        buffer = BytesIO()
        image.save(buffer, "PNG")
        still = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        _send(STEP_EVENT, {"node": self.node_id, "run": self._run, "image": still})


def _send(event: str, data: dict[str, Any]) -> None:
    server = PromptServer.instance
    server.send_sync(event, data, server.client_id)


class LatentPreview:
    """Colours of latents without decoding them: the linear map that explains the latest decoded chunk best."""

    def __init__(self) -> None:
        self._map: torch.Tensor | None = None

    def fit(self, latents: torch.Tensor, images: torch.Tensor) -> None:
        """Learn the map from normalized latents `[1, C, F, h, w]` and their images `[frames, height, width, 3]`."""
        cells = latents[0, :, -1].float().cpu()
        colors = torch.nn.functional.adaptive_avg_pool2d(images[-1].permute(2, 0, 1), cells.shape[-2:])
        self._map = torch.linalg.lstsq(_with_one(cells), colors.flatten(1).T).solution

    def image(self, latents: torch.Tensor) -> Image.Image | None:
        """A small picture of the last frame of the latents, or None before anything was decoded."""
        if self._map is None:
            return None
        cells = latents[0, :, -1].float().cpu()
        return picture((_with_one(cells) @ self._map).reshape(*cells.shape[-2:], 3))


def _with_one(cells: torch.Tensor) -> torch.Tensor:
    """Cells `[C, h, w]` as rows `[h * w, C + 1]` with a constant column."""
    rows = cells.flatten(1).T
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
