"""Write safetensors files tensor by tensor: a file of any size takes the memory of its largest tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first tensor; larger elements come first, so all are aligned to their size


@dataclass(frozen=True)
class TensorSpec:
    """Describe shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file; each tensor is fetched when it is written, and not kept.

    Args:
        path: the file; it is incomplete until this returns: pass a temporary name (`atomic_file`).
        specs: the tensors by name.
        fetch: name -> tensor on any device; called once per name, in the order of the file.
        metadata: texts for the header.

    Raises:
        ValueError: a dtype that safetensors does not know, or a fetched tensor that is not what `specs` says.
    """
    unknown = {name: spec.dtype for name, spec in specs.items() if spec.dtype not in _DTYPES}
    if unknown:
        raise ValueError(f"safetensors has no dtype for {unknown}; cast these tensors first")
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted((metadata or {}).items()))} if metadata else {}
    end = 0
    for name in names:
        spec, start = specs[name], end
        end = start + spec.nbytes
        header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = fetch(name)
            if TensorSpec.of(tensor) != specs[name]:
                raise ValueError(f"{name} is {TensorSpec.of(tensor)}, expected {specs[name]}")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the texts in the header of a safetensors file.

    Raises:
        ValueError: the file is truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: unreadable or truncated ({error}); download the file again") from error


def write_shards(
    folder: Path,
    stem: str,
    groups: list[Mapping[str, TensorSpec]],
    fetch: Callable[[str], torch.Tensor],
) -> None:
    """Write groups of tensors as the shards of one model with its index, named as diffusers names them.

    Args:
        folder: where the shards go; made if absent.
        stem: `diffusion_pytorch_model`.
        groups: the tensors of each shard; a single group makes one file without an index.
        fetch: as in `write_tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(groups)
    names = [
        f"{stem}-{i:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"
        for i in range(1, count + 1)
    ]
    for name, group in zip(names, groups, strict=True):
        write_tensors(folder / name, group, fetch, {"format": "pt"})
    if count > 1:
        total = sum(spec.nbytes for group in groups for spec in group.values())
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
