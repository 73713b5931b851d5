"""Find and name models: `models/qarvd`, `models/diffusers` and `output/qarvd`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths

from .compat import NodeError

BUNDLED = "bundled: moving shapes, 64x64"
INDEX = "model_index.json"  # makes a folder a diffusers pipeline
SUFFIXES = (".safetensors", ".pt", ".pth")

# Names that Windows reserves, in upper or lower case and with any suffix.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
_SHOWN = 12  # names in an error message
_LONGEST = 200  # bytes of a name; file systems allow 255, but suffixes and temporary names need some


def register() -> None:
    """Add our folders to ComfyUI's; entries of extra_model_paths.yaml stay first."""
    folder_paths.add_model_folder_path("qarvd", os.path.join(folder_paths.models_dir, "qarvd"))
    folder_paths.add_model_folder_path("qarvd", str(saved_folder()))


def saved_folder() -> Path:
    """Return the folder for quantized models."""
    return Path(folder_paths.get_output_directory()) / "qarvd"


def converted_folder() -> Path:
    """Return the folder for converted original checkpoints; hidden, and so in no list."""
    return saved_folder() / ".converted"


def _roots() -> list[Path]:
    """List our model folders, each once."""
    kinds = [kind for kind in ("qarvd", "diffusers") if kind in folder_paths.folder_names_and_paths]
    roots = [Path(root) for kind in kinds for root in folder_paths.get_folder_paths(kind)]
    return list({os.path.realpath(root): root for root in reversed(roots)}.values())[::-1]  # the first of the same


def scan() -> tuple[dict[str, Path], dict[str, Path]]:
    """List the models in our model folders.

    A name is the path below the root. If an earlier root holds the same path, the name includes the root. Files inside
    a pipeline and hidden files are not listed.

    Returns:
        Name -> folder of every diffusers pipeline, and name -> single file (safetensors, or an original checkpoint).
    """
    folders: dict[str, Path] = {}
    files: dict[str, Path] = {}
    for root in _roots():
        for path, is_folder in _models_in(str(root), os.path.realpath(root)):
            name = root.name if path == root else path.relative_to(root).as_posix()
            found = folders if is_folder else files
            if name in found:
                name = f"{name} [{root.parent.name}/{root.name}]"
            found.setdefault(name, path)
    return folders, files


def _models_in(folder: str, real: str, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, bool]]:
    """Yield pipelines (True) and single files (False) at any depth; links are followed, except into circles.

    Args:
        folder: folder to search.
        real: its path with links resolved.
        above: `real` of the folders that contain it.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # missing, or not readable
        return
    if any(entry.name == INDEX for entry in entries):
        yield Path(folder), True
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inner = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if inner not in (*above, real):
                yield from _models_in(entry.path, inner, (*above, real))
        elif entry.name.endswith(SUFFIXES) and entry.is_file():
            yield Path(entry.path), False


def transformer_config(folder: Path) -> dict[str, Any]:
    """Return the transformer's `config.json`; empty if it is missing or not readable."""
    try:
        return json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_quantized(folder: Path) -> bool:
    """Tell whether a folder holds a quantized pipeline."""
    return transformer_config(folder).get("quantization_config") is not None


def find_model(name: str) -> Path:
    """Return the folder or file of a listed model; a folder must hold a Wan pipeline.

    Raises:
        NodeError: if there is no model of this name, or it has another architecture.
    """
    models, files = scan()
    if name in files:
        return files[name]
    if name not in models:
        names = [*models, *files]
        listed = ", ".join([*names[:_SHOWN], *["..."] * (len(names) > _SHOWN)]) or "nothing"
        raise NodeError(
            f"There is no model {name!r} in models/qarvd, models/diffusers or output/qarvd (found: {listed}).",
            "Put its diffusers folder there, or save one with Q-ARVD Save Quantized, and choose it again.",
        )
    folder = models[name]
    architecture = transformer_config(folder).get("_class_name", "no transformer")
    if architecture not in ("WanTransformer3DModel", "CausalWanTransformer3DModel", "WorldWanTransformer3DModel"):
        kind = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")
        raise NodeError(
            f"{name} is a {kind} with {architecture}, not an autoregressive Wan model.",
            "Choose a model of the Self-Forcing family: its diffusers folder, or its original checkpoint.",
        )
    return folder


def stamp(path: Path) -> str:
    """Return text that changes with a file or a folder's files, so that ComfyUI loads a model that was saved again."""
    files = [file for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    return ";".join(f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files)


def check_name(name: str, root: Path) -> Path:
    """Return the path of `name` below `root`, if it is a valid folder name on every system and would be listed.

    Raises:
        NodeError: if it is not valid; which folders exist does not matter.
    """
    parts = name.replace("\\", "/").split("/")
    if not name.strip() or any(part.strip() in ("", ".", "..") for part in parts):
        raise NodeError(
            f"The name {name!r} is not inside {root}.", "Give a plain name, or a name in a subfolder such as wan/w4a8."
        )
    for part in parts:
        if fault := _fault(part):
            raise NodeError(
                f"The name {name!r} cannot be used: {part!r} {fault}.", "Give another name, such as wan/w4a8."
            )
    return root.resolve().joinpath(*parts)


def _fault(part: str) -> str:
    """Describe what is wrong with one part of a name; empty if nothing is."""
    bad = sorted({character for character in part if character in '<>:"|?*' or ord(character) < 32})
    if bad:
        return f"has {', '.join(map(repr, bad))}, which Windows does not allow in names"
    if part.partition(".")[0].strip().lower() in _RESERVED:
        return "is reserved on Windows"
    if part[-1] in ". ":
        return "ends in a dot or a space, which Windows removes"
    if part[0] == ".":
        return "begins with a dot and would not be listed"
    return f"is longer than {_LONGEST} bytes" if len(part.encode()) > _LONGEST else ""
