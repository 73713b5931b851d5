"""Save stream states in `output/qarvd_states`, and list and load them.

A state `name` is `name.frames.safetensors`, the latents of all frames, and, to continue exactly, `name.safetensors`,
which is the library's own file: `ARVDPipeline.restore_stream` reads it, too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .compat import NodeError
from .folders import check_name
from .handles import StreamState
from .library import library

FRAMES = ".frames.safetensors"
EXACT = ".safetensors"
_KEY = "qarvd_state"


def folder() -> Path:
    """Return the folder of saved states."""
    return Path(folder_paths.get_output_directory()) / "qarvd_states"


def names() -> list[str]:
    """List the saved states, at any depth of folders."""
    root = folder()
    found = (path.relative_to(root).as_posix() for path in root.rglob(f"*{FRAMES}") if path.is_file())
    return sorted(name.removesuffix(FRAMES) for name in found)


def files_of(name: str) -> tuple[Path, Path]:
    """Return the paths of a state's frames and of what it continues exactly from; raise NodeError for a bad name."""
    path = check_name(name, folder())
    if path.name.endswith(".frames"):  # its second file would have the name of another state's first
        raise NodeError(f"The name {name!r} ends in .frames.", "Give another name, such as wan/stream.")
    return path.with_name(path.name + FRAMES), path.with_name(path.name + EXACT)


def save(state: StreamState, name: str) -> Path:
    """Save a state, and return the path of its frames; files of that name are replaced."""
    frames, exact = files_of(name)
    frames.parent.mkdir(parents=True, exist_ok=True)
    note = {"model": state.model, "settings": state.settings, "exact": ""}
    if state.saved is None:
        exact.unlink(missing_ok=True)
    else:
        state.saved.save(exact)
        note["exact"] = _digest(state.saved.header)
    tensors = {"latents": state.latents.contiguous(), "generator": state.generator.contiguous()}
    with library("files.atomic").atomic_file(frames) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(note)})
    return frames


def _digest(header: dict) -> str:
    """Hash the header of a saved stream, to tell whether two files belong together."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def load(name: str) -> StreamState:
    """Load a state.

    Raises:
        NodeError: if there is none, or a file is damaged, missing or of another state.
    """
    frames, exact = files_of(name)
    if not frames.is_file():
        listed = ", ".join(names()[:12]) or "nothing"
        raise NodeError(
            f"There is no state {name!r} in output/qarvd_states (found: {listed}).",
            "Save one with Q-ARVD Save State, press R, and choose it.",
        )
    try:
        with safe_open(frames, "pt") as file:
            note = json.loads((file.metadata() or {})[_KEY])
            latents, generator = file.get_tensor("latents"), file.get_tensor("generator")
        if latents.ndim != 5 or not torch.isfinite(latents).all():
            raise ValueError(f"the latents {list(latents.shape)} are not those of a video, or not finite")
        torch.Generator("cpu").set_state(generator)
        saved = None
        if note["exact"]:
            saved = library("rollout.saved_state").SavedStream.load(exact)
            if _digest(saved.header) != note["exact"]:
                raise ValueError(f"{exact.name} belongs to another state")
        return StreamState(note["model"], latents, generator, note["settings"], saved)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise NodeError(
            f"The state {name} cannot be loaded: {text}.",
            "Save it again; its two files, NAME.frames.safetensors and NAME.safetensors, belong together.",
        ) from error
