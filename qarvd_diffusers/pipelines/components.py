"""Prepare the scheduler, prompts, picture sizes and memory plan of an `ARVDPipeline`."""

from __future__ import annotations

import html
import logging
import os
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import is_ftfy_available

from ..config import QARVDConfig
from ..files.text import INVISIBLE
from ..memory.plan import MemoryChoice, choose
from ..memory.shapes import ModelShapes
from ..rollout.config import RolloutConfig
from ..rollout.inputs import whole_number
from ..schedulers import ChunkUniPCScheduler, FewStepRenoiseScheduler, IntegerRenoiseScheduler
from .quantization import split_config

logger = logging.getLogger(__name__)

SAMPLERS = {
    "renoise": FewStepRenoiseScheduler,
    "renoise_integer": IntegerRenoiseScheduler,
    "unipc": ChunkUniPCScheduler,
}


def clean_prompt(text: str) -> str:
    """Repair mojibake (if ftfy is installed), resolve HTML entities and collapse white space, as Wan's pipeline does.

    A byte order mark and zero-width spaces are removed too.
    """
    if is_ftfy_available():
        import ftfy

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).translate(INVISIBLE)).strip()


def fit_scheduler(
    scheduler: SchedulerMixin | None, config: RolloutConfig, warn: bool = False
) -> FewStepRenoiseScheduler | ChunkUniPCScheduler:
    """Return a few-step scheduler that agrees with the rollout config, or build one in place of any other scheduler.

    Args:
        scheduler: a few-step scheduler, a stock one, or None.
        config: values that the scheduler has to have.
        warn: log a warning if a stock scheduler is replaced.

    Raises:
        ValueError: if a few-step scheduler disagrees with the config.
    """
    names = ("denoising_timesteps", "first_chunk_timesteps", "warp_timesteps", "timestep_shift")
    expected = SAMPLERS[config.sampler](**{name: getattr(config, name) for name in names})
    if not isinstance(scheduler, tuple(SAMPLERS.values())):
        if warn and scheduler is not None:
            logger.warning(
                "The scheduler %s is replaced by %s, built from the pipeline's config: flow_shift or shift is its "
                "timestep_shift, the steps are its denoising_timesteps; pass them to from_pretrained.",
                type(scheduler).__name__,
                type(expected).__name__,
            )
        return expected

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list | tuple) else value

    differing = [name for name in names if plain(scheduler.config[name]) != plain(expected.config[name])]
    if type(scheduler) is not type(expected):
        differing.append("sampler")
    if differing:
        raise ValueError(
            f"scheduler and pipeline disagree on {differing}: pass the values to the pipeline, whose config is saved"
        )
    return scheduler


def latent_size(
    pipe: DiffusionPipeline, height: int | None, width: int | None, latents: torch.Tensor | None
) -> tuple[int, int]:
    """Return latent height and width of pixels, of latents `[B, C, F, h, w]`, or of the pipeline's config.

    Raises:
        ValueError: if pixels and latents disagree, or the size is not a multiple of a token's.
    """
    scale, patch = pipe.vae_scale_factor_spatial, pipe.transformer.config.patch_size[1:]
    if latents is not None and latents.ndim == 5:
        sizes = tuple(latents.shape[-2:])
        for name, pixels, size in (("height", height, sizes[0]), ("width", width, sizes[1])):
            if pixels not in (None, size * scale):
                raise ValueError(f"{name} is {pixels}, but the latents are {size * scale} pixels in {name}")
        return sizes
    pixels = []
    for name, value, step in zip(("height", "width"), (height, width), patch, strict=True):
        expected = "a positive number of pixels, or None"
        value = pipe.config[name] if value is None else whole_number(name, value, expected)
        if value % (scale * step) or value < 1:
            raise ValueError(f"{name} is {value}, expected a multiple of {scale * step}")
        pixels.append(value)
    return pixels[0] // scale, pixels[1] // scale


def plan_memory(source: str | os.PathLike, memory: str, options: dict[str, Any]) -> MemoryChoice:
    """Choose how a model fits into a GPU's memory, before it is loaded.

    Args:
        source: folder or Hub id of the model.
        memory: size, or `"max"`; see `memory.plan.choose`.
        options: arguments of the loader. `height` and `width` are removed; `dtype` and, for a float model that only
            fits quantized, `quantization_config` are added.

    Raises:
        ValueError: if nothing fits.
    """
    config, _ = split_config(options.get("quantization_config"))
    size = {name: options.pop(name) for name in ("height", "width") if name in options}
    dtype = options.setdefault("dtype", torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    access = {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
    choice = choose(
        ModelShapes.read(source, **access), memory, scheme=config and config.scheme, dtype=dtype, **size
    ).choice
    if choice.scheme and config is None:
        options["quantization_config"] = QARVDConfig(choice.scheme)
    return choice
