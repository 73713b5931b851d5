"""Prompts for the API that several tests use, and how to read the videos that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

BUNDLED = "bundled: moving shapes, 64x64"
PROMPT = "a large red circle moving left on a navy background"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def stream_graph(source: dict[str, Any] | None = None, chunks: int = 2, prompt: str = PROMPT, **options: Any) -> dict:
    """A pipeline node "1" (default: the bundled float model), its prompt "2", the stream "3" and SaveVideo "4"."""
    return {
        "1": source or node("QARVDLoadPipeline", model=BUNDLED),
        "2": node("QARVDEncodePrompt", pipeline=["1", 0], text=prompt),
        "3": node(
            "QARVDStreamGenerate", pipeline=["1", 0], positive=["2", 0], num_chunks=chunks, **{"seed": 0, **options}
        ),
        "4": node("SaveVideo", video=["3", 2], filename_prefix="video/test", format="auto", codec="auto"),
    }


def quantize_graph(scheme: str = "w8a16", name: str = "tiny", **options: Any) -> dict:
    """Load "11", quantize "12", save "13": w8a16 needs no calibration and so no time."""
    return {
        "11": node("QARVDLoadPipeline", model=BUNDLED),
        "12": node("QARVDQuantize", pipeline=["11", 0], scheme=scheme, **options),
        "13": node("QARVDSaveQuantized", pipeline=["12", 0], name=name),
    }


def read_video(path: Path) -> np.ndarray:
    """uint8 `[frames, height, width, 3]`."""
    return np.stack(list(imageio.imiter(path, plugin="FFMPEG")))
