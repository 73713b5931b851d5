"""Check the files of a pipeline's components before they are loaded, and what was loaded from them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers
from torch import nn

from ..files.safetensors import DOWNLOAD, TensorSpec, read_specs
from ..files.schema import check_mapping, check_value, read_json
from ..quantization.stored_model import (
    build_empty,
    build_encoder,
    check_arguments,
    check_float_values,
    check_sizes,
    check_tensors,
)

_INDEX = ".safetensors.index"
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_STEPS = 2**20  # what an integer of a scheduler may be at most


def check_folder(owner: type, folder: Path, passed: Collection[str], variant: str | None = None) -> None:
    """Check all JSON files of a pipeline's folder, and its models' tensors by name and shape, before loading.

    Only what diffusers and transformers load is checked, and no class of the folder's own.

    Args:
        owner: class of the pipeline.
        folder: where `model_index.json` is.
        passed: components that the caller passes, whose files are not read.
        variant: of the weight files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or config and weights do not fit; the message names file and entry.
    """
    index = folder / "model_index.json"
    components = owner._get_signature_keys(owner)[0]  # type: ignore[attr-defined]
    entries: dict[str, Any] = read_json(index)
    check_arguments(owner, {name: each for name, each in entries.items() if name not in {*components, *passed}}, index)
    for name, entry in entries.items():
        if name not in components or name in passed:
            continue
        library, kind = check_value(entry, tuple[str | None, str | None], f"{index}: {name}")
        read = {path.name: read_json(path, object) for path in sorted((folder / name).glob("*.json"))}
        if library in _LIBRARIES:
            cls = getattr(_LIBRARIES[library], kind or "", None)
            if not isinstance(cls, type):
                raise ValueError(f"{index}: {name} is {entry}, but {library} has no such class: {DOWNLOAD}")
            _check_component(cls, folder / name, read, variant)


def _check_component(cls: type, folder: Path, read: Mapping[str, Any], variant: str | None) -> None:
    """Check config and tensors of a model, or the config of a scheduler."""
    scheduler = issubclass(cls, diffusers.SchedulerMixin)
    path = folder / ("scheduler_config.json" if scheduler else "config.json")
    if not (scheduler or issubclass(cls, nn.Module)) or path.name not in read:
        return
    values: dict[str, Any] = check_value(read[path.name], dict[str, Any], path)
    if scheduler:
        check_arguments(cls, values, path)
        check_sizes(values, path, _STEPS)
        return
    check_value(values.get("quantization_config"), dict[str, Any] | None, f"{path}: quantization_config")
    found = stored_specs(folder, variant)
    build = build_empty if issubclass(cls, diffusers.ModelMixin) else build_encoder
    model = build(cls, values, found, path)
    if model is not None and found:
        check_tensors(model, found, folder)


@contextmanager
def named_errors(source: str, folder: Path | None, passed: Collection[str]) -> Iterator[None]:
    """Let errors of loading a pipeline name where it was loaded from.

    Raises:
        OSError: a file is truncated or damaged; the message names it.
        ValueError: the message names the source; for a tokenizer that cannot be loaded, its folder.
    """
    try:
        yield
    except OSError as error:
        if "Unable to load weights" not in str(error):
            raise
        raise OSError(f"{error}. The file is truncated or damaged: {DOWNLOAD}.") from error
    except ValueError as error:
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except Exception:
        if folder is not None:
            _explain(folder, passed)
        raise


def _explain(folder: Path, passed: Collection[str]) -> None:
    """Raise ValueError for what cannot be loaded by itself: tokenizers and processors, which are read by others."""
    for name, entry in read_json(folder / "model_index.json").items():
        pair = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        cls = getattr(transformers, str(pair[1]), None) if pair[0] == "transformers" else None
        if name not in passed and isinstance(cls, type) and not issubclass(cls, nn.Module):
            try:
                cls.from_pretrained(folder / name)  # type: ignore[attr-defined]
            except Exception as error:
                raise ValueError(f"{folder / name}: {cls.__name__} cannot read it ({error}): {DOWNLOAD}") from error


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
        if isinstance(component, nn.Module) and folder is not None:
            found = stored_specs(folder, variant)
            if found:
                check_tensors(component, found, folder)
                check_float_values(component, found, folder)
    _check_tokenizer(components.get("tokenizer"), components.get("text_encoder"))


def _check_tokenizer(tokenizer: Any, encoder: Any) -> None:
    """Check that a tokenizer can pad, and makes no special token that its text encoder has no row for."""
    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase) and isinstance(encoder, nn.Module):
        rows = len(encoder.get_input_embeddings().weight)  # type: ignore[operator,arg-type,union-attr]
        pad, largest = tokenizer.pad_token_id, max(tokenizer.all_special_ids, default=0)
        if pad is None or largest >= rows:
            raise ValueError(
                f"{tokenizer.name_or_path}: pad_token is {tokenizer.pad_token!r} and the largest special token "
                f"{largest}, expected a pad_token and tokens below {rows}, those of the text encoder: {DOWNLOAD}"
            )


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
    entries = {"metadata": dict[str, Any], "weight_map": dict[str, str]}
    listed = check_mapping(read_json(indexes[0]), entries, indexes[0], optional=("metadata",), extra=True)[
        "weight_map"
    ]
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
