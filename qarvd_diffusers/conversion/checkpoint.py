"""Reading checkpoint files: memory-mapped, shard by shard, never unpickled, whatever the nesting."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..tensor_files import TensorSpec

NESTINGS = ("generator_ema", "generator", "model")
LORA_NESTINGS = ("generator_lora", "generator_ema_lora", "lora", "model")
_PREFIXES = ("generator_ema", "generator")  # nestings that flat files spell as a prefix of every key


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of a checkpoint.

    Attributes:
        path: the file.
        weights: the nested state dict that was chosen, None for a flat file.
        specs: key -> shape and dtype of its tensors.
    """

    path: Path
    weights: str | None
    specs: Mapping[str, TensorSpec]

    def load(self) -> dict[str, torch.Tensor]:
        """The tensors, mapped from the file: memory is taken as they are read, and given back with the last of them."""
        return dict(_contents(self.path)[self.weights])


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose tensors have not been read.

    Attributes:
        path: file, or folder of shards.
        weights: the nested state dict that was chosen, None for flat files.
        found: all nested state dicts in it.
        shards: its files, in order.
    """

    path: Path
    weights: str | None
    found: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {key: spec for shard in self.shards for key, spec in shard.specs.items()}


def open_checkpoint(path: str | Path, weights: str | None = None, nestings: Sequence[str] = NESTINGS) -> Checkpoint:
    """Look into a checkpoint: a file, or a folder of shards (with or without an index).

    Args:
        path: `.pt`, `.pth` (opened with `weights_only=True`, nothing is unpickled) or `.safetensors`, or a folder of them.
        weights: which nested state dict to take; None takes the first of `nestings` that is present, or the file itself
            if it is flat.
        nestings: names under which training code stores a state dict, the preferred ones first.

    Raises:
        ValueError: for another suffix, an unreadable or truncated file, one without tensors, a missing shard, shards of
            different nesting or with the same key; names the file.
    """
    path = Path(path)
    shards = tuple(_open(file, weights, nestings) for file in _files(path))
    found = tuple(dict.fromkeys(name for _, names in shards for name in names))
    chosen = {shard.weights for shard, _ in shards}
    if len(chosen) > 1:
        listed = ", ".join(f"{shard.path.name}: {shard.weights or 'flat'}" for shard, _ in shards)
        raise ValueError(
            f"{path}: the shards hold different weights ({listed}); averaged (EMA) and plain weights must not be mixed: "
            "name one with weights=, or remove the shards of the other"
        )
    seen: dict[str, Path] = {}
    for shard, _ in shards:
        if twice := seen.keys() & shard.specs.keys():
            key = min(twice)
            raise ValueError(f"{path}: {key!r} is in {seen[key].name} and in {shard.path.name}: shards of two models")
        seen.update(dict.fromkeys(shard.specs, shard.path))
    return Checkpoint(path, chosen.pop(), found, tuple(shard for shard, _ in shards))


def load_checkpoint(
    path: str | Path, weights: str | None = None, nestings: Sequence[str] = NESTINGS
) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, memory-mapped where the format allows; arguments and errors of `open_checkpoint`."""
    checkpoint = open_checkpoint(path, weights, nestings)
    return {key: tensor for shard in checkpoint.shards for key, tensor in shard.load().items()}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    files = sorted(file for file in path.iterdir() if file.suffix in _LOADERS)
    for index in path.glob("*.index.json"):
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(listed - {file.name for file in files})
        if missing:
            raise ValueError(f"{path}: {index.name} lists {missing}, which are missing: download them")
        files = [file for file in files if file.name in listed]
    if not files:
        raise ValueError(f"{path}: holds no {', '.join(_LOADERS)} files")
    return files


def _open(path: Path, weights: str | None, nestings: Sequence[str]) -> tuple[Shard, list[str]]:
    contents = _contents(path)
    names = [name for name in contents if name is not None]
    if weights is not None and weights not in names:
        raise ValueError(f"{path}: has no state dict {weights!r}; it holds {names or 'flat tensors'}")
    chosen = weights or next((name for name in nestings if name in contents), None)
    state_dict = contents.get(chosen, {})
    strange = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strange or not state_dict:
        found = (
            f"non-tensor entries {strange[:5]}"
            if strange
            else f"no tensors outside {names}"
            if names
            else "no tensors"
        )
        raise ValueError(f"{path}: {found}; expected a flat state dict, or one below {', '.join(nestings)}")
    return Shard(path, chosen, {key: TensorSpec.of(tensor) for key, tensor in state_dict.items()}), names


def _contents(path: Path) -> dict[str | None, Mapping[str, Any]]:
    """All state dicts in a file by name; None is the flat one."""
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    nested = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    if nested:
        return nested
    found: dict[str | None, dict[str, Any]] = {}
    for key, value in content.items():
        name = next((prefix for prefix in _PREFIXES if key.startswith(f"{prefix}.")), None)
        found.setdefault(name, {})[key if name is None else key[len(name) + 1 :]] = value
    return found or {None: {}}


def _read(path: Path) -> Any:
    if path.suffix not in _LOADERS:
        raise ValueError(f"{path}: unknown checkpoint format {path.suffix!r}, expected {', '.join(_LOADERS)}")
    try:
        return _LOADERS[path.suffix](path)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: unreadable or truncated ({error}); download the file again") from error
    except Exception as error:  # pickle errors: torch raises its own class for anything but plain tensors
        raise ValueError(
            f"{path}: holds more than plain tensors, which are never unpickled here ({type(error).__name__}); "
            "save just the state dict with torch.save, or use safetensors"
        ) from error


def _load_torch(path: Path) -> Any:
    # Only zip archives can be mapped; the older format is read into memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


_LOADERS = {".pt": _load_torch, ".pth": _load_torch, ".bin": _load_torch, ".safetensors": load_file}
