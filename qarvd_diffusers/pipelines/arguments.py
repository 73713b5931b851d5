"""Check the arguments of loaders: aliases, misspelled names, repositories of other models."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, WanTransformer3DModel

from ..files.schema import read_json
from ..rollout.arguments import parameters

# Arguments of `DiffusionPipeline.from_pretrained`. Unknown names are passed on to it, and it reports them.
_LOADER = frozenset((
    "cache_dir", "custom_pipeline", "custom_revision", "device_map", "disable_mmap", "dtype", "force_download",
    "load_connected_pipeline", "local_files_only", "low_cpu_mem_usage", "max_memory", "memory", "mirror",
    "offload_folder", "offload_state_dict", "output_loading_info", "provider", "provider_options", "proxies",
    "quantization_config", "revision", "sess_options", "subfolder", "token", "trust_remote_code", "use_flashpack",
    "use_onnx", "use_safetensors", "variant",
))  # fmt: skip
_CLOSE = 0.75  # similarity from which a name counts as a misspelling of another


def loading_arguments(owner: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check a loader's arguments, and rename `torch_dtype` to its newer name `dtype`.

    Args:
        owner: the pipeline's class; the loader also takes the parameters of its constructor.
        arguments: name -> value.

    Raises:
        ValueError: if `dtype` and `torch_dtype` disagree.
        TypeError: if an unknown argument is spelled almost like a parameter of the constructor.
    """
    dtypes = ("dtype", "torch_dtype")
    checked = {name: value for name, value in arguments.items() if value is not None or name not in dtypes}
    alias = checked.pop("torch_dtype", None)
    if alias is not None and checked.setdefault("dtype", alias) != alias:
        raise ValueError(
            f"dtype is {checked['dtype']} and torch_dtype is {alias}, two names of one argument: pass only one of them"
        )
    fields, open_ended = parameters(owner.__init__)
    for name in () if open_ended else sorted(checked.keys() - set(fields) - _LOADER):
        near = difflib.get_close_matches(name, fields, 1, _CLOSE)
        if near:
            raise TypeError(f"{owner.__name__} has no field {name!r}: did you mean {near[0]!r}?")
    return checked


def require_wan(owner: type[DiffusionPipeline], source: str | os.PathLike, arguments: Mapping[str, Any]) -> None:
    """Check by `model_index.json`, before anything is loaded, that a repository has a Wan transformer.

    Args:
        owner: the pipeline's class.
        source: folder or Hub id.
        arguments: arguments of the loader.

    Raises:
        ValueError: if its transformer is a diffusers class other than `WanTransformer3DModel`.
    """
    options = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    try:
        if os.path.isdir(source):
            read_json(os.path.join(source, "model_index.json"))  # stricter than diffusers, which may raise anything
        index = owner.load_config(source, **{name: arguments[name] for name in options if name in arguments})
    except (OSError, ValueError):
        return  # the loader reports the same error
    entry = index.get("transformer")
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    kind = getattr(diffusers, name, None) if library == "diffusers" and isinstance(name, str) else None
    if isinstance(kind, type) and not issubclass(kind, WanTransformer3DModel):
        pipeline = index.get("_class_name", "its own pipeline class")
        raise ValueError(
            f"{source} has a {name}, {owner.__name__} runs a WanTransformer3DModel: load it with {pipeline}, and "
            f"quantize its transformer with {name}.from_pretrained(..., quantization_config=QARVDConfig(...))"
        )
