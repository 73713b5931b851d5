"""Load the bundled model as the scripts of this folder use it, and write their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qarvd_diffusers import ARVDPipeline, bundled_model_path


def load_bundled(**fields: Any) -> ARVDPipeline:
    """Load the bundled float model in float32, on the GPU if there is one, without progress bars.

    Args:
        **fields: replace those of its config.
    """
    pipe = ARVDPipeline.from_pretrained(bundled_model_path(), dtype=torch.float32, **fields)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_json(value: Any, path: str | Path) -> None:
    """Write a JSON file; its folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def append_json_line(value: Any, path: str | Path) -> None:
    """Append a line to a file of JSON lines; its folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
