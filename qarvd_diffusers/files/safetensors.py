"""Write safetensors files tensor by tensor, and read them checked: names, shapes, dtypes, sizes, values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .schema import check_mapping, check_value, parse_json
from .text import require_regular

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
# What others write, besides.
_READABLE = {name: dtype for dtype, name in _DTYPES.items()} | {
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
_ENTRY = {"dtype": str, "shape": tuple[int, ...], "data_offsets": tuple[int, int]}  # of a tensor in a header
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MAX_DIMENSIONS, _MAX_SIZE = 64, 2**63  # of a tensor in torch
_NAMED = 5  # names in an error
DOWNLOAD = "download or save it again"
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

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

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


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Read the header of a safetensors file, checked against the file's size; no tensor is read.

    Returns:
        The tensors by name, and the texts of the header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated, or no safetensors file; the message names file and entry.
    """
    require_regular(path)
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size - 8, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size, _MAX_HEADER):
            raise ValueError(f"{path}: truncated, or not a safetensors file; {DOWNLOAD}")
        entries: dict[str, Any] = parse_json(file.read(length), f"{path}: header")
    metadata = check_value(entries.pop("__metadata__", {}), dict[str, str], f"{path}: __metadata__")
    specs, ranges = {}, []
    for name, entry in entries.items():
        specs[name], data = _read_entry(entry, f"{path}: {name}")
        ranges.append(data)
    position = 0
    for start, end in sorted(ranges):
        if start != position:
            raise ValueError(f"{path}: its tensors overlap or leave a gap at byte {min(start, position)}; {DOWNLOAD}")
        position = end
    if position != size - length:
        raise ValueError(f"{path}: holds {size - length} bytes of tensors, its header lists {position}; {DOWNLOAD}")
    return specs, metadata


def _read_entry(entry: Any, where: str) -> tuple[TensorSpec, tuple[int, int]]:
    """Check what a header says of one tensor; return it with the range of its bytes."""
    values = check_mapping(check_value(entry, dict[str, Any], where), _ENTRY, where)
    dtype, shape, (start, end) = _READABLE.get(values["dtype"]), values["shape"], values["data_offsets"]
    if dtype is None or len(shape) > _MAX_DIMENSIONS or not all(0 <= size < _MAX_SIZE for size in (start, *shape)):
        raise ValueError(f"{where} is listed as {values['dtype']} {list(shape)} at {start}, which is no tensor")
    spec = TensorSpec(shape, dtype)
    if end - start != spec.nbytes:
        raise ValueError(f"{where} takes {spec.nbytes} bytes, its header lists {end - start}; {DOWNLOAD}")
    return spec, (start, end)


def read_specs(path: str | os.PathLike[str]) -> dict[str, TensorSpec]:
    """Read names, shapes and dtypes of the tensors in a safetensors file; see `read_header`."""
    return read_header(path)[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the texts in the header of a safetensors file; see `read_header`."""
    return read_header(path)[1]


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file as `safetensors.safe_open` does; check its header first.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated or damaged; the message names it.
    """
    read_header(path)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: unreadable or truncated ({error}); {DOWNLOAD}") from error


def check_specs(
    source: object,
    expected: Mapping[str, TensorSpec],
    found: Mapping[str, TensorSpec],
    remedy: str = DOWNLOAD,
    *,
    any_float: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that a file holds exactly the expected tensors.

    Args:
        source: the file, for errors.
        expected: the tensors by name.
        found: those of the file, from `read_specs`.
        remedy: what the user can do.
        any_float: tells for which names one floating-point dtype stands for any other: those cast when loaded.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape or dtype; the message names the first ones.
    """

    def differs(name: str) -> bool:
        want, got = expected[name], found[name]
        both = want.dtype.is_floating_point and got.dtype.is_floating_point and any_float(name)
        return want.shape != got.shape or (want.dtype != got.dtype and not both)

    faults = []
    for kind, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            faults.append(f"{len(names)} {kind} ({_listed(names)})")
    wrong = [name for name in sorted(expected.keys() & found.keys()) if differs(name)]
    if wrong:
        listed = [f"{name} is {found[name]}, expected {expected[name]}" for name in wrong[:_NAMED]]
        faults.append(f"{len(wrong)} of another shape or dtype ({'; '.join(listed)})")
    if faults:
        raise ValueError(f"{source}: tensors {' and '.join(faults)}. The file does not fit: {remedy}.")


def _listed(names: Iterable[str]) -> str:
    """List the first names."""
    names = sorted(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def check_finite(tensor: torch.Tensor, where: str, *, positive: bool = False) -> None:
    """Check the values of a tensor on any device; raise ValueError for NaN, infinity or, if `positive`, <= 0."""
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch compares no float8
    if tensor.numel() == 0:
        return
    low, high = (bound.item() for bound in tensor.aminmax())  # NaN if there is one; takes no memory
    if not (-math.inf < low <= high < math.inf) or (positive and low <= 0):
        value = high if -math.inf < low and (low > 0 or not positive) else low
        raise ValueError(f"{where} holds {value}, expected {'positive ' if positive else ''}finite values")


def check_permutation(order: torch.Tensor, where: str) -> None:
    """Check that an integer tensor `[K]` holds each of 0..K-1 once; raise ValueError if not."""
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)):
        raise ValueError(f"{where} holds numbers twice or out of range, expected each of 0..{len(order) - 1} once")


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
