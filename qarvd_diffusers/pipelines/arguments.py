"""Check the arguments of loaders: aliases, misspelt fields, repositories of other models."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, WanTransformer3DModel

from ..rollout.arguments import parameters

# Of `DiffusionPipeline.from_pretrained`; what is in no list goes on to it, which says what it does not know.
_LOADER = frozenset(
    (
        "cache_dir",
        "custom_pipeline",
        "custom_revision",
        "device_map",
        "disable_mmap",
        "dtype",
        "force_download",
        "load_connected_pipeline",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "memory",
        "mirror",
        "offload_folder",
        "offload_state_dict",
        "output_loading_info",
        "provider",
        "provider_options",
        "proxies",
        "quantization_config",
        "revision",
        "sess_options",
        "subfolder",
        "token",
        "trust_remote_code",
        "use_flashpack",
        "use_onnx",
        "use_safetensors",
        "variant",
    )
)
_CLOSE = 0.75  # similarity of names from which one is taken for the other, misspelt


def loading_arguments(owner: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a loader with `torch_dtype` under its newer name `dtype`.

    Args:
        owner: the pipeline's class; a loader takes the parameters of its constructor too.
        given: arguments.

    Raises:
        ValueError: `dtype` and `torch_dtype` disagree.
        TypeError: an argument is no loader's, and spelt almost as a parameter of the constructor.
    """
    found = {name: value for name, value in given.items() if value is not None or name not in ("dtype", "torch_dtype")}
    alias = found.pop("torch_dtype", None)
    if alias is not None and found.setdefault("dtype", alias) != alias:
        raise ValueError(f"dtype is {found['dtype']} and torch_dtype is {alias}, two names of one argument: give one")
    fields, open_ended = parameters(owner.__init__)
    for name in () if open_ended else sorted(found.keys() - set(fields) - _LOADER):
        near = difflib.get_close_matches(name, fields, 1, _CLOSE)
        if near:
            raise TypeError(f"{owner.__name__} has no field {name!r}: did you mean {near[0]!r}?")
    return found


def require_wan(owner: type[DiffusionPipeline], source: str | os.PathLike, given: Mapping[str, Any]) -> None:
    """Refuse the repository of another model by what its `model_index.json` says, before anything is loaded.

    Args:
        owner: the pipeline's class.
        source: folder or Hub id.
        given: arguments of the loader.

    Raises:
        ValueError: its transformer is a class of diffusers, and no `WanTransformer3DModel`.
    """
    options = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    try:
        index = owner.load_config(source, **{name: given[name] for name in options if name in given})
    except (OSError, ValueError):
        return  # which the loader meets too, and tells
    library, name = index.get("transformer") or (None, None)
    found = getattr(diffusers, name, None) if library == "diffusers" and name else None
    if isinstance(found, type) and not issubclass(found, WanTransformer3DModel):
        pipeline = index.get("_class_name", "its own pipeline class")
        raise ValueError(
            f"{source} has a {name}, {owner.__name__} runs a WanTransformer3DModel: load it with {pipeline}, and quantize its "
            f"transformer with {name}.from_pretrained(..., quantization_config=QARVDConfig(...))"
        )
