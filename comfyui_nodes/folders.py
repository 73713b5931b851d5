"""Where models are looked for and saved: `models/qarvd`, `models/diffusers` and `output/qarvd`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import folder_paths

from .compat import NodeError

BUNDLED = "bundled: moving shapes, 64x64"


def register() -> None:
    """Add our folders to ComfyUI's; entries of extra_model_paths.yaml stay first."""
    folder_paths.add_model_folder_path("qarvd", os.path.join(folder_paths.models_dir, "qarvd"))
    folder_paths.add_model_folder_path("qarvd", str(saved_folder()))


def saved_folder() -> Path:
    """Where quantized models are saved."""
    return Path(folder_paths.get_output_directory()) / "qarvd"


def _roots() -> list[Path]:
    kinds = [kind for kind in ("qarvd", "diffusers") if kind in folder_paths.folder_names_and_paths]
    return [Path(root) for kind in kinds for root in folder_paths.get_folder_paths(kind)]


def model_folders() -> dict[str, Path]:
    """Name -> folder of every diffusers pipeline in our model folders, at most two levels deep."""
    found: dict[str, Path] = {}
    for root in _roots():
        for index in sorted([*root.glob("*/model_index.json"), *root.glob("*/*/model_index.json")]):
            found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return found


def model_files() -> dict[str, Path]:
    """Name -> single file (safetensors, or an original .pt) in our model folders, at most two levels deep."""
    found: dict[str, Path] = {}
    for root in _roots():
        for path in sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern)):
            inside = any((folder / "model_index.json").is_file() for folder in path.parents[:2])
            if path.suffix in (".safetensors", ".pt") and path.is_file() and not inside:
                found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def transformer_config(folder: Path) -> dict[str, Any]:
    """The transformer's `config.json`, empty if there is none that can be read."""
    try:
        return json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_quantized(folder: Path) -> bool:
    return transformer_config(folder).get("quantization_config") is not None


def find_model(name: str) -> Path:
    """The folder or file of a listed model; a folder must hold a Wan pipeline.

    Raises:
        NodeError: there is none of this name, or it is of another architecture.
    """
    models = model_folders()
    if name in (files := model_files()):
        return files[name]
    if name not in models:
        listed = ", ".join([*models, *files]) or "nothing"
        raise NodeError(
            f"There is no model {name!r} in models/qarvd, models/diffusers or output/qarvd (found: {listed}).",
            "Put its diffusers folder there, or save one with Q-ARVD Save Quantized, and choose it again.",
        )
    folder = models[name]
    architecture = transformer_config(folder).get("_class_name", "no transformer")
    if architecture not in ("WanTransformer3DModel", "CausalWanTransformer3DModel"):
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        raise NodeError(
            f"{name} is a {kind} with {architecture}, not an autoregressive Wan model.",
            "Choose a model of the Self-Forcing family; original checkpoints become one with: qarvd convert.",
        )
    return folder


def stamp(folder: Path) -> str:
    """Changes when a file of the folder does: makes ComfyUI load a model again that was saved again."""
    files = [path for path in [folder, *sorted(folder.rglob("*"))] if path.is_file()]
    return ";".join(f"{path.name}:{path.stat().st_mtime_ns}:{path.stat().st_size}" for path in files)
