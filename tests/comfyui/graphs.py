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
        "4": save_video(["3", 2], "test"),
    }


def save_video(source: list, name: str) -> dict[str, Any]:
    return node("SaveVideo", video=source, filename_prefix=f"video/{name}", format="auto", codec="auto")


def second_stream(**inputs: Any) -> dict:
    """One more chunk "5" and its SaveVideo "6", for `stream_graph`; `inputs` are those of "5", such as its start."""
    defaults = {"pipeline": ["1", 0], "positive": ["2", 0], "num_chunks": 1, "seed": 0, "preview": "off"}
    return {"5": node("QARVDStreamGenerate", **{**defaults, **inputs}), "6": save_video(["5", 2], "more")}


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
