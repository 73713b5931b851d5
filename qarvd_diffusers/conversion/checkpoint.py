"""Read checkpoint files of any nesting: memory-mapped, shard by shard, never unpickled."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files.safetensors import TensorSpec
from ..files.schema import check_mapping, read_json
from .layout import StateDict, choose, is_network, own_keys, state_dicts, tensors_of

logger = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"  # of the weight files in a diffusers folder
NESTINGS = ("generator_ema", "generator", "model")
LORA_NESTINGS = ("generator_lora", "generator_ema_lora", "lora", "model")
_SAMPLES = 16  # values per tensor that are compared to tell whether two files hold the same weights


@dataclass(frozen=True, eq=False)
class Shard:
    """Describe one file of a checkpoint.

    Attributes:
        path: the file.
        weights: name of the chosen nested state dict, None for a flat file.
        specs: key -> shape and dtype of its tensors.
    """

    path: Path
    weights: str | None
    specs: Mapping[str, TensorSpec]

    def load(self) -> dict[str, torch.Tensor]:
        """Map the tensors from the file: memory is taken as they are read, and freed with the last of them."""
        content = _contents(self.path)[self.weights]
        return {key: content[key] for key in self.specs}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Describe a checkpoint whose tensors have not been read.

    Attributes:
        path: file, or folder of shards.
        weights: name of the chosen nested state dict, None for flat files.
        found: names of its nested state dicts; only of the Wan networks, if there are any.
        shards: its files, in order.
        reasons: sentences that say what was left out.
    """

    path: Path
    weights: str | None
    found: tuple[str, ...]
    shards: tuple[Shard, ...]
    reasons: tuple[str, ...] = ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Map every key to its shape and dtype."""
        return {key: spec for shard in self.shards for key, spec in shard.specs.items()}


class NoStateDict(ValueError):
    """Report a readable file without the expected state dict; one among others in a folder is left out."""


def open_checkpoint(path: str | Path, weights: str | None = None, nestings: Sequence[str] = NESTINGS) -> Checkpoint:
    """Open a checkpoint, a file or a folder of shards (with or without an index), without reading its tensors.

    In a folder without an index, hidden files are left out. If some files hold a Wan network, so are all others:
    adapters, a VAE, a text encoder. If the same weights exist in two formats, the safetensors files are used.

    Args:
        path: `.pt`, `.pth`, `.bin` (opened with `weights_only=True`, nothing is unpickled) or `.safetensors`, or a
            folder of them.
        weights: nested state dict to use (`generator`, `generator.model`); None takes the first of `nestings` that is
            present, or the only one that is a Wan network, or the file itself if it is flat.
        nestings: names under which training code stores a state dict, in order of preference.

    Raises:
        ValueError: for another suffix, an unreadable or truncated file, one without tensors, a missing shard, or
            shards of different nesting or with a common key; the message names the file.
    """
    path = Path(path)
    files, reasons = _files(path)
    opened, refused = [], None
    for file in files:
        try:
            opened.append(_open(file, weights, nestings))
        except NoStateDict as error:
            refused = error
            reasons.append(f"left out: {file.name}, {str(error).removeprefix(f'{file}: ').partition(';')[0]}")
    networks = [each for each in opened if is_network(list(each.shard.specs))]
    if refused is not None and not networks:
        raise refused
    if networks and path.is_dir():
        reasons += [f"left out: {each.shard.path.name}, not a Wan network" for each in opened if each not in networks]
        opened = networks
    opened, twice = _one_format(opened)
    reasons += [*twice, *(reason for each in opened for reason in each.reasons)]
    found = tuple(dict.fromkeys(name for each in opened for name in each.found))
    _check_shards(path, [each.shard for each in opened])
    return Checkpoint(path, opened[0].shard.weights, found, tuple(each.shard for each in opened), tuple(reasons))


def load_checkpoint(
    path: str | Path, weights: str | None = None, nestings: Sequence[str] = NESTINGS
) -> dict[str, torch.Tensor]:
    """Load the state dict of a checkpoint, memory-mapped if the format allows; see `open_checkpoint` for arguments."""
    checkpoint = open_checkpoint(path, weights, nestings)
    for reason in checkpoint.reasons:
        logger.warning("%s: %s", path, reason)
    return {key: tensor for shard in checkpoint.shards for key, tensor in shard.load().items()}


def folder_tensors(path: Path) -> tuple[dict[str, TensorSpec], Callable[[str], torch.Tensor]]:
    """Return the specs of all tensors in a safetensors file or folder, and a function that maps one of them."""
    checkpoint = open_checkpoint(path, nestings=())
    loaded = {shard.path: shard for shard in checkpoint.shards}
    where = {key: shard.path for shard in checkpoint.shards for key in shard.specs}
    tensors: dict[Path, dict[str, torch.Tensor]] = {}

    def fetch(name: str) -> torch.Tensor:
        if where[name] not in tensors:
            tensors.clear()
            tensors[where[name]] = loaded[where[name]].load()
        return tensors[where[name]][name]

    return checkpoint.specs, fetch


def _check_shards(path: Path, shards: Sequence[Shard]) -> None:
    """Raise ValueError if shards hold different weights or have keys in common."""
    if len({shard.weights for shard in shards}) > 1:
        listed = ", ".join(f"{shard.path.name}: {shard.weights or 'flat'}" for shard in shards)
        raise ValueError(
            f"{path}: the shards hold different weights ({listed}); averaged (EMA) and plain weights must not be "
            "mixed: select one with weights=, or remove the shards of the other"
        )
    seen: dict[str, Path] = {}
    for shard in shards:
        if twice := seen.keys() & shard.specs.keys():
            key = min(twice)
            raise ValueError(f"{path}: {key!r} is in {seen[key].name} and in {shard.path.name}: shards of two models")
        seen.update(dict.fromkeys(shard.specs, shard.path))


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """List the files that may hold tensors, and sentences that say which were left out."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    files = sorted(file for file in path.iterdir() if file.suffix in _LOADERS)
    hidden = [file.name for file in files if file.name.startswith(".")]
    reasons = [f"left out: {hidden[:5]} ({len(hidden)} in all), hidden files"] if hidden else []
    files = [file for file in files if file.name not in hidden]
    indexes = sorted(index for index in path.glob("*.index.json") if not index.name.startswith("."))
    if indexes:
        index = min(indexes, key=lambda index: ".safetensors" not in index.name)
        listed = _listed(index, files)
        if others := [file.name for file in files if file not in listed]:
            reasons.append(f"left out: {others[:5]} ({len(others)} in all), which {index.name} does not list")
        files = listed
    if not files:
        raise ValueError(f"{path}: holds no {', '.join(_LOADERS)} files")
    return files, reasons


def _listed(index: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files that an index lists; raise ValueError if one is missing."""
    expected = {"weight_map": dict[str, str]}
    listed = set(check_mapping(read_json(index), expected, index, extra=True)["weight_map"].values())
    missing = sorted(listed - {file.name for file in files})
    if missing:
        raise ValueError(f"{index.parent}: {index.name} lists {missing}, which are missing: download them")
    return [file for file in files if file.name in listed]


@dataclass(frozen=True, eq=False)
class _Opened:
    """Hold an opened file, the names of its state dicts and sentences that say what was left out."""

    shard: Shard
    found: tuple[str, ...]
    reasons: tuple[str, ...]


def _open(path: Path, weights: str | None, nestings: Sequence[str]) -> _Opened:
    """Open one file and choose a state dict in it."""
    contents = _contents(path)
    names = [name for name in contents if name is not None]
    try:
        chosen = choose(contents, weights, nestings)
    except KeyError as error:
        raise NoStateDict(f"{path}: {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state_dict = contents.get(chosen, {})
    keys, reasons = own_keys(state_dict)
    if not keys:
        content = f"no tensors outside {names}" if names else "no tensors"
        if state_dict:
            content = f"non-tensor entries {list(state_dict)[:5]}"
        raise NoStateDict(f"{path}: {content}; expected a flat state dict, or one below {', '.join(nestings)}")
    for key in keys:
        _check_plain(state_dict[key], f"{path}: {key}")
    networks = [name for name in names if is_network(tensors_of(contents[name]))]
    specs = {key: TensorSpec.of(state_dict[key]) for key in keys}
    return _Opened(
        Shard(path, chosen, specs), tuple(networks or names), tuple(f"{path.name}: {each}" for each in reasons)
    )


def _check_plain(tensor: torch.Tensor, where: str) -> None:
    """Check that a tensor has its values in the file, each once: a pickle may claim any size, layout and device."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not dense or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        kind = f"{tensor.layout} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{where} is {kind}, expected a dense tensor that is stored as a whole: save it again")


def _one_format(opened: list[_Opened]) -> tuple[list[_Opened], list[str]]:
    """Leave out pickles whose tensors are in safetensors files too; return sentences that name them."""
    safe = [each for each in opened if each.shard.path.suffix == ".safetensors"]
    others = [each for each in opened if each not in safe]
    specs = [{key: spec for each in part for key, spec in each.shard.specs.items()} for part in (safe, others)]
    if not safe or not others or specs[0] != specs[1]:
        return opened, []
    samples = [{key: value for each in part for key, value in _samples(each.shard).items()} for part in (safe, others)]
    if any(not torch.equal(samples[0][key], samples[1][key]) for key in samples[0]):
        return opened, []
    names = [each.shard.path.name for each in others]
    return safe, [f"left out: {names[:5]} ({len(names)} in all), the same weights as in {safe[0].shard.path.name}"]


def _samples(shard: Shard) -> dict[str, torch.Tensor]:
    """Return a few values of every tensor."""
    flat = {key: tensor.flatten() for key, tensor in shard.load().items()}
    return {key: tensor[:: max(1, len(tensor) // _SAMPLES)].float() for key, tensor in flat.items()}


def _contents(path: Path) -> dict[str | None, StateDict]:
    """Return all state dicts in a file by name; None is the name of a flat one."""
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return state_dicts(content)


def _read(path: Path) -> Any:
    """Read a file by its suffix; raise ValueError if it is damaged, or would have to be unpickled."""
    if path.suffix not in _LOADERS:
        raise ValueError(f"{path}: unknown checkpoint format {path.suffix!r}, expected {', '.join(_LOADERS)}")
    try:
        return _LOADERS[path.suffix](path)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: unreadable or truncated ({error}); download the file again") from error
    except Exception as error:  # pickle errors: torch raises its own class for anything but plain tensors
        objects = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise NoStateDict(
            f"{path}: holds more than plain tensors ({objects[1] if objects else type(error).__name__}), which are "
            "never unpickled here; save only the state dict with torch.save, or use safetensors. For a file whose "
            f"origin you trust: torch.save(torch.load({path.name!r}, weights_only=False)[STATE_DICT], 'weights.pt')"
        ) from error


def _load_torch(path: Path) -> Any:
    # Only zip archives can be mapped; the older format is read into memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


_LOADERS = {".pt": _load_torch, ".pth": _load_torch, ".bin": _load_torch, ".safetensors": load_file}
