"""Reading checkpoint files: memory-mapped, never unpickled, whatever the nesting."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

NESTINGS = ("generator_ema", "generator", "model")


def load_checkpoint(
    path: str | Path, weights: str | None = None, nestings: Sequence[str] = NESTINGS
) -> dict[str, torch.Tensor]:
    """Read the state dict of an original checkpoint, memory-mapped where the format allows.

    Args:
        path: `.pt`, `.pth` (opened with `weights_only=True`, nothing is unpickled) or `.safetensors`.
        weights: which nested state dict to take; None takes the first of `nestings` that is present, or the file itself
            if it is flat.
        nestings: names under which training code stores a state dict, the preferred ones first.

    Raises:
        ValueError: for another suffix, an unreadable or truncated file, or one without tensors; names the file.
    """
    path = Path(path)
    loaders = {".pt": _load_torch, ".pth": _load_torch, ".safetensors": load_file}
    if path.suffix not in loaders:
        raise ValueError(f"{path}: unknown checkpoint format {path.suffix!r}, expected {', '.join(loaders)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        content = loaders[path.suffix](path)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: unreadable or truncated ({error}); download the file again") from error
    except Exception as error:  # pickle errors: torch raises its own class for anything but plain tensors
        raise ValueError(
            f"{path}: holds more than plain tensors, which are never unpickled here ({type(error).__name__}); "
            "save just the state dict with torch.save, or use safetensors"
        ) from error
    return _unnest(content, path, weights, nestings)


def _load_torch(path: Path) -> Any:
    # Only zip archives can be mapped; the older format is read into memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _unnest(content: Any, path: Path, weights: str | None, nestings: Sequence[str]) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    nested = [name for name, value in content.items() if isinstance(value, Mapping)]
    if weights is not None and weights not in nested:
        raise ValueError(f"{path}: has no state dict {weights!r}; it holds {nested or 'flat tensors'}")
    chosen = weights or next((name for name in nestings if name in nested), None)
    state_dict = content[chosen] if chosen is not None else content
    strange = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strange or not state_dict:
        found = f"non-tensor entries {strange[:5]}" if strange else "no tensors"
        raise ValueError(f"{path}: {found}; expected a flat state dict, or one below {', '.join(nestings)}")
    return dict(state_dict)
