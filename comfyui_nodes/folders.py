"""Where models are looked for and saved: `models/qarvd`, `models/diffusers` and `output/qarvd`."""

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

# What no folder or file on Windows can be called, in any case and with any suffix.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
_SHOWN = 12  # names in an error message
_LONGEST = 200  # bytes of a name, of the 255 that file systems take: suffixes and temporary names need some


def register() -> None:
    """Add our folders to ComfyUI's; entries of extra_model_paths.yaml stay first."""
    folder_paths.add_model_folder_path("qarvd", os.path.join(folder_paths.models_dir, "qarvd"))
    folder_paths.add_model_folder_path("qarvd", str(saved_folder()))


def saved_folder() -> Path:
    """Where quantized models are saved."""
    return Path(folder_paths.get_output_directory()) / "qarvd"


def converted_folder() -> Path:
    """Where originals that were chosen in a loader are converted to; hidden, and so in no list."""
    return saved_folder() / ".converted"


def _roots() -> list[Path]:
    kinds = [kind for kind in ("qarvd", "diffusers") if kind in folder_paths.folder_names_and_paths]
    roots = [Path(root) for kind in kinds for root in folder_paths.get_folder_paths(kind)]
    return list({os.path.realpath(root): root for root in reversed(roots)}.values())[::-1]  # the first of the same


def scan() -> tuple[dict[str, Path], dict[str, Path]]:
    """Name -> folder of every diffusers pipeline in our model folders, and name -> single file (safetensors, or an original).

    A name is the path below the root; where a root before holds the same, the root is named, too. Files inside a pipeline are
    its own, and what is hidden is not listed.
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
    """Pipelines (True) and single files (False) at any depth; links are followed, but not in circles.

    Args:
        folder: where to look.
        real: the same without links.
        above: `real` of the folders that lead here.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not there, or not ours to read
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
    if architecture not in ("WanTransformer3DModel", "CausalWanTransformer3DModel"):
        kind = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")
        raise NodeError(
            f"{name} is a {kind} with {architecture}, not an autoregressive Wan model.",
            "Choose a model of the Self-Forcing family: its diffusers folder, or its original checkpoint, which is converted.",
        )
    return folder


def stamp(path: Path) -> str:
    """Changes when a file, or a file of a folder, does: makes ComfyUI load a model again that was saved again."""
    files = [file for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    return ";".join(f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files)


def check_name(name: str, root: Path) -> Path:
    """Where `name` is below `root`, if it can be a folder there on every system and would be listed.

    Raises:
        NodeError: it cannot; the folders that exist are not looked at.
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
    """What is wrong with one part of a name; empty if nothing is."""
    bad = sorted({character for character in part if character in '<>:"|?*' or ord(character) < 32})
    if bad:
        return f"has {', '.join(map(repr, bad))}, which no name on Windows can have"
    if part.partition(".")[0].strip().lower() in _RESERVED:
        return "is reserved on Windows"
    if part[-1] in ". ":
        return "ends in a dot or a space, which Windows takes away"
    if part[0] == ".":
        return "begins with a dot and would not be listed"
    return f"is longer than {_LONGEST} bytes" if len(part.encode()) > _LONGEST else ""
