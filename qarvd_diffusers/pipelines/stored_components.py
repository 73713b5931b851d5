"""Check that the files of a pipeline's components hold what was loaded from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..files.safetensors import DOWNLOAD, TensorSpec, read_specs
from ..files.schema import check_value, read_json
from ..quantization.model import quantized_linears

_INDEX = ".safetensors.index"
_NAMED = 5


def check_components(components: Mapping[str, object], variant: str | None = None) -> None:
    """Compare the headers of all weight files with the models that were loaded from their folders.

    diffusers and transformers only log what a file lacks, and go on with weights that were never set. Headers are read
    only, no tensors. Files may hold more than a model has: an encoder is loaded from encoder and decoder.

    Args:
        components: of a pipeline, by name; those that were loaded from no local folder are not checked.
        variant: of the weight files that were loaded.

    Raises:
        ValueError: a tensor is missing, of another shape, or integer where the model has floats; the file holds a
            quantized model; or an index and its shards disagree. The message names file and tensor.
    """
    for component in components.values():
        folder = _folder(component)
        if isinstance(component, nn.Module) and folder is not None and not quantized_linears(component):
            found = stored_specs(folder, variant)
            if found:
                _check(component, found, folder)


def stored_specs(folder: Path, variant: str | None = None) -> dict[str, tuple[TensorSpec, Path]]:
    """Read shape, dtype and file of every tensor that the weight files in a folder hold.

    Raises:
        ValueError: a file is damaged, or an index lists other tensors than its shards hold.
    """
    suffix = f".{variant}" if variant else ""
    indexes = sorted(folder.glob(f"*{_INDEX}{suffix}.json"))
    if not indexes:
        files = [path for path in sorted(folder.glob("*.safetensors")) if _variant(path.stem) == (variant or "")]
        return {name: (spec, path) for path in files for name, spec in read_specs(path).items()}
    listed = check_value(read_json(indexes[0]).get("weight_map"), dict[str, str], f"{indexes[0]}: weight_map")
    stored = {name: (spec, folder / file) for file in set(listed.values()) for name, spec in _shard(folder, file)}
    for name in listed.keys() | stored.keys():
        if name not in stored or listed.get(name) != stored[name][1].name:
            holder = stored[name][1] if name in stored else "no shard"
            raise ValueError(f"{indexes[0]} lists {name} in {listed.get(name)}, {holder} holds it: {DOWNLOAD}")
    return stored


def _shard(folder: Path, file: str) -> Iterable[tuple[str, TensorSpec]]:
    """Read the header of a shard that an index names."""
    if Path(file).name != file or not (folder / file).is_file():
        raise ValueError(f"{folder}: the index names the shard {file!r}, which is not in the folder: {DOWNLOAD}")
    return read_specs(folder / file).items()


def _variant(stem: str) -> str:
    """Return the variant in `diffusion_pytorch_model.fp16-00001-of-00002`; empty if there is none."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem).partition(".")[2]


def _folder(component: object) -> Path | None:
    """Return the local folder that a model was loaded from, or None."""
    config = getattr(component, "config", {})
    names = getattr(component, "name_or_path", None), getattr(config, "_name_or_path", None)
    folder = next((Path(name) for name in names if isinstance(name, str | os.PathLike) and name), None)
    return folder if folder is not None and folder.is_dir() else None


def _check(model: nn.Module, found: Mapping[str, tuple[TensorSpec, Path]], folder: Path) -> None:
    """Compare a model with the tensors of its files."""
    state = model.state_dict(keep_vars=True)
    wrong = {name: tensor for name, tensor in state.items() if name in found and not _fits(tensor, found[name][0])}
    for name, tensor in wrong.items():
        spec, file = found[name]
        raise ValueError(f"{file}: {name} is {spec}, expected {TensorSpec.of(tensor)}: {DOWNLOAD}")
    loaded = {id(tensor) for name, tensor in state.items() if name in found}
    missing = sorted(name for name, tensor in state.items() if name not in found and id(tensor) not in loaded)
    if not missing or getattr(model, "_checkpoint_conversion_mapping", None):
        return
    file = next(iter(found.values()))[1]
    if any(name.endswith(".weight_packed") for name in found):
        raise ValueError(
            f"{file} holds a quantized model, {folder}/config.json lacks its quantization_config: {DOWNLOAD}"
        )
    listed = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
    raise ValueError(
        f"{file if len({path for _, path in found.values()}) == 1 else folder}: {len(missing)} tensors of "
        f"{type(model).__name__} are missing ({listed}): {DOWNLOAD}"
    )


def _fits(tensor: Tensor, spec: TensorSpec) -> bool:
    """Return whether a stored tensor can have become this one: floats of any dtype are cast."""
    same = tensor.dtype.is_floating_point == spec.dtype.is_floating_point
    return same and tuple(tensor.shape) == tuple(spec.shape)
