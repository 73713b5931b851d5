"""Names of arguments: aliases, those that other pipelines have, and typing errors, each answered by its name."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, WanTransformer3DModel

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


def _absent(value: Any, steps: int) -> bool:
    return value is None


def _no_guidance(value: Any, steps: int) -> bool:
    return value is None or (isinstance(value, int | float) and value <= 1)


def _nothing(value: Any, steps: int) -> bool:
    return value is None or not any([value] if isinstance(value, str) else value)


def _one(value: Any, steps: int) -> bool:
    return value in (None, 1)


def _all_steps(value: Any, steps: int) -> bool:
    return value in (None, steps)


# Arguments of other pipelines -> whether a value asks for nothing that does not happen anyway, and what to say if it does.
_GUIDANCE = (_no_guidance, "distilled models take no guidance: leave it out, or give at most 1")
_NEGATIVE = (_nothing, "without guidance there is no negative prompt: leave it out")
_COUNT = (_one, "give the prompt as a list, once for every video")
_STEPS = (
    _all_steps,
    "a chunk takes the steps of denoising_timesteps in the pipeline's config ({steps} here): leave it out",
)
_SCALES = (_nothing, "set_adapters() sets the scales of adapters")
_FOREIGN: dict[str, tuple[Callable[[Any, int], bool], str]] = {
    "guidance_scale": _GUIDANCE,
    "guidance_scale_2": _GUIDANCE,
    "true_cfg_scale": _GUIDANCE,
    "negative_prompt": _NEGATIVE,
    "negative_prompt_embeds": (_absent, _NEGATIVE[1]),
    "num_videos_per_prompt": _COUNT,
    "num_images_per_prompt": _COUNT,
    "num_inference_steps": _STEPS,
    "timesteps": (_absent, _STEPS[1]),
    "sigmas": (_absent, _STEPS[1]),
    "attention_kwargs": _SCALES,
    "cross_attention_kwargs": _SCALES,
    "seed": (_absent, "give generator=torch.Generator().manual_seed(seed)"),
    "fps": (
        _absent,
        "frames are written at a rate by export_to_video(frames, path, fps=...)",
    ),
    "callback": (_absent, "use callback_on_step_end, or on_pass of stream()"),
}


def start_arguments(
    owner: str, given: Mapping[str, Any], check: Callable[..., Any], call: Callable[..., Any], steps: int
) -> dict[str, Any]:
    """Those of the arguments of a call that are the pipeline's; of others, neutral values are dropped.

    Args:
        owner: the pipeline's class, for messages.
        given: arguments that have no parameter of their own in `call`.
        check: what takes them; if it takes any name, all pass.
        call: what the user called.
        steps: denoising steps of a chunk.

    Raises:
        TypeError: an argument that the pipeline does not have; names it, and what to use instead.
    """
    (known, open_ended), kept = parameters(check), {}
    for name, value in given.items():
        if open_ended or name in known:
            kept[name] = value
            continue
        neutral, remedy = _FOREIGN.get(name, (None, None))
        if remedy is None:
            near = difflib.get_close_matches(name, [*known, *parameters(call)[0]], 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}"
        if neutral is None or not neutral(value, steps):
            raise TypeError(f"{owner} got an unexpected argument {name!r}: {remedy.format(steps=steps)}")
    return kept


def parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of a function's parameters, and whether it takes any further name."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [name for name, kind in kinds.items() if kind not in variadic and name != "self"]
    return names, inspect.Parameter.VAR_KEYWORD in kinds.values()


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


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that cannot be asked for the timesteps of a chunk.

    Raises:
        ValueError: names its class.
    """
    names, open_ended = parameters(scheduler.set_timesteps)
    if "chunk_index" not in names and not open_ended:
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}, which knows no chunks: give one whose set_timesteps takes chunk_index, "
            "such as FewStepRenoiseScheduler"
        )


def check_cache_maker(make_cache: Callable[..., Any], storage: str) -> None:
    """Refuse a storage that a pipeline's cache does not have.

    Raises:
        ValueError: names it.
    """
    names, open_ended = parameters(make_cache)
    if storage != "auto" and "storage" not in names and not open_ended:
        raise ValueError(
            f"kv_cache is {storage!r}, but this pipeline's make_cache takes no storage: leave it at 'auto'"
        )
