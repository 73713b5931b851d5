"""Check the arguments of a call by name: misspelled ones, those of other pipelines, unsuitable components."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# Arguments of other pipelines -> (whether a value other than None changes nothing, by the denoising steps of a chunk;
# the remedy if it does change something).
_Argument = tuple[Callable[[Any, int], bool], str]
_GUIDANCE: _Argument = (
    lambda value, _: isinstance(value, int | float) and value <= 1,
    "distilled models take no guidance: leave it out, or give at most 1",
)
_NEGATIVE: _Argument = (
    lambda value, _: not any([value] if isinstance(value, str) else value),
    "without guidance there is no negative prompt: leave it out",
)
_COUNT: _Argument = (lambda value, _: value == 1, "give the prompt as a list, once for every video")
_STEPS: _Argument = (
    lambda value, steps: value == steps,
    "a chunk takes the steps of denoising_timesteps in the pipeline's config ({steps} here): leave it out",
)
_SCALES: _Argument = (_NEGATIVE[0], "set_adapters() sets the scales of adapters")


def _never(value: Any, steps: int) -> bool:
    return False


_FOREIGN: dict[str, _Argument] = {
    "guidance_scale": _GUIDANCE,
    "guidance_scale_2": _GUIDANCE,
    "true_cfg_scale": _GUIDANCE,
    "negative_prompt": _NEGATIVE,
    "negative_prompt_embeds": (_never, _NEGATIVE[1]),
    "num_videos_per_prompt": _COUNT,
    "num_images_per_prompt": _COUNT,
    "num_inference_steps": _STEPS,
    "timesteps": (_never, _STEPS[1]),
    "sigmas": (_never, _STEPS[1]),
    "attention_kwargs": _SCALES,
    "cross_attention_kwargs": _SCALES,
    "seed": (_never, "give generator=torch.Generator().manual_seed(seed)"),
    "fps": (_never, "export_to_video(frames, path, fps=...) sets the frame rate of a file"),
    "callback": (_never, "use callback_on_step_end, or on_pass of stream()"),
}


def start_arguments(
    owner: str, arguments: Mapping[str, Any], check: Callable[..., Any], call: Callable[..., Any], steps: int
) -> dict[str, Any]:
    """Return the arguments of a call that the pipeline has; arguments of other pipelines are dropped if they change
    nothing.

    Args:
        owner: the pipeline's class, for messages.
        arguments: those that have no parameter of their own in `call`.
        check: the function that takes them; if it takes any name, all are kept.
        call: the function that the user called.
        steps: denoising steps of a chunk.

    Raises:
        TypeError: for an argument that the pipeline does not have; names it and what to use instead.
    """
    (known, open_ended), kept = parameters(check), {}
    for name, value in arguments.items():
        if open_ended or name in known:
            kept[name] = value
            continue
        if name in _FOREIGN:
            changes_nothing, remedy = _FOREIGN[name]
            if value is None or changes_nothing(value, steps):
                continue
            remedy = remedy.format(steps=steps)
        else:
            near = difflib.get_close_matches(name, [*known, *parameters(call)[0]], 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}"
        raise TypeError(f"{owner} got an unexpected argument {name!r}: {remedy}")
    return kept


def parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return the names of a function's parameters, and whether it takes any other keyword."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [name for name, kind in kinds.items() if kind not in variadic and name != "self"]
    return names, inspect.Parameter.VAR_KEYWORD in kinds.values()


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler has the timesteps of each chunk.

    Raises:
        ValueError: if it has not; names its class.
    """
    names, open_ended = parameters(scheduler.set_timesteps)
    if "chunk_index" not in names and not open_ended:
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}, which has no timesteps per chunk: give one whose "
            "set_timesteps takes chunk_index, such as FewStepRenoiseScheduler"
        )


def check_cache_maker(make_cache: Callable[..., Any], storage: str) -> None:
    """Check that a pipeline's cache has a storage.

    Raises:
        ValueError: if it has not; names the storage.
    """
    names, open_ended = parameters(make_cache)
    if storage != "auto" and "storage" not in names and not open_ended:
        raise ValueError(
            f"kv_cache is {storage!r}, but this pipeline's make_cache takes no storage: leave it at 'auto'"
        )
