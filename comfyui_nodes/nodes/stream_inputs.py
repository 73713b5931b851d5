"""Check and convert the inputs of Stream Generate."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..compat import NodeError
from ..handles import PipelineHandle
from ..latents import normalize, one_video
from ..planning import NO_LIMIT, plan
from ..prompts import CHUNK, OVER, SWITCH, PromptAt, schedule_of

logger = logging.getLogger(__name__)

ACTIVATION_CHUNKS = 16  # working memory of a pass, in units of one chunk's hidden states

# Used, or without effect: embeddings of Wan's text encoder are zero where its mask is.
_OF_EVERY_PROMPT = ("pooled_output", "attention_mask", CHUNK, SWITCH, OVER)
_OF_EVERY_LATENT = ("samples", "batch_index", "downscale_ratio_spacial", "downscale_ratio_temporal")


def check_choice(**choices: tuple[str, list[str]]) -> None:
    """Check values of combo widgets against their options; raise NodeError for another value."""
    for name, (value, options) in choices.items():
        if value not in options:
            raise NodeError(f"{name} is {value!r}.", f"Choose one of: {', '.join(options)}.")


def prompts_of(pipeline: PipelineHandle, positive: list, num_chunks: int) -> list[PromptAt]:
    """Return the prompts of a CONDITIONING, with embeddings `[1, tokens, text_dim]`, in the order of their chunks."""
    expected = pipeline.pipe.transformer.config.text_dim
    prompts = []
    for embeds, options, prompt in schedule_of(positive, num_chunks):
        _warn_of_unused("positive", options, _OF_EVERY_PROMPT)
        if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[-1] != expected:
            raise NodeError(
                f"The conditioning has shape {list(embeds.shape)}, expected [1, tokens, {expected}] for "
                f"{pipeline.name}.",
                "Encode the prompt with Q-ARVD Encode Prompt and this pipeline.",
            )
        prompts.append(prompt)
    return prompts


def _warn_of_unused(name: str, entries: dict[str, Any], used: tuple[str, ...]) -> None:
    """Log which entries of an input are not used."""
    unused = sorted(key for key, value in entries.items() if value is not None and key not in used)
    if unused:
        logger.warning("Q-ARVD Stream Generate does not use these entries of %s: %s", name, ", ".join(unused))


def check_size(pipeline: PipelineHandle, width: int, height: int) -> tuple[int, int]:
    """Return width and height in pixels, checked."""
    pipe = pipeline.pipe
    patch = pipe.transformer.config.patch_size
    size = (width or pipe.config.width, height or pipe.config.height)
    for name, value, cells in (("width", size[0], patch[2]), ("height", size[1], patch[1])):
        multiple = pipe.vae_scale_factor_spatial * cells
        if value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise NodeError(
                f"{name} is {value}, expected a multiple of {multiple} for {pipeline.name}.",
                f"Set {name} to {nearest}, or to 0 for the model's own.",
            )
    return size


def start_of(pipeline: PipelineHandle, size: tuple[int, int], **starts: Any) -> dict[str, torch.Tensor]:
    """Return what the video starts with, as an argument of `stream`."""
    named = [name for name, value in starts.items() if value is not None]
    if not named:
        return {}
    if len(named) > 1:
        raise NodeError(
            f"{' and '.join(named)} are both connected.", "Connect only one of them: a video has one start."
        )
    value, pipe = starts[named[0]], pipeline.pipe
    if named[0] == "start_image":
        pictures = value.permute(0, 3, 1, 2).clamp(0, 1)  # resampling in ComfyUI overshoots
        return {"image": pictures[0]} if len(pictures) == 1 else {"video": pictures}
    samples = value.latents if named[0] == "state" else value["samples"]
    latents = one_video(named[0], samples, pipe.vae.config.z_dim, pipeline.name)
    if named[0] == "start_latent":
        _warn_of_unused(named[0], value, _OF_EVERY_LATENT)
        latents = normalize(pipe.vae, latents.float())
    elif value.model != pipeline.name:
        logger.warning("the state was made with %s, %s continues from it", value.model, pipeline.name)
    try:
        pipe.rollout_config.context_pieces(latents.shape[2])
    except ValueError as error:
        raise NodeError(
            f"{named[0]} has {latents.shape[2]} latent frames, which is not a whole number of chunks.",
            f"Connect a multiple of {pipe.rollout_config.num_frames_per_chunk} latent frames.",
        ) from error
    expected = (size[1] // pipe.vae_scale_factor_spatial, size[0] // pipe.vae_scale_factor_spatial)
    if tuple(latents.shape[-2:]) != expected:
        got = [side * pipe.vae_scale_factor_spatial for side in latents.shape[-2:]]
        raise NodeError(
            f"{named[0]} is {got[1]} x {got[0]} pixels, but the video is {size[0]} x {size[1]}.",
            f"Set width to {got[1]} and height to {got[0]}.",
        )
    return {"initial_latents": latents}


def working_bytes(pipe: Any, size: tuple[int, int], frames: int) -> int:
    """Estimate the bytes of K/V cache and activations, for ComfyUI to keep free."""
    config = pipe.transformer.config
    scale, patch = pipe.vae_scale_factor_spatial, config.patch_size
    tokens = (size[0] // scale // patch[2]) * (size[1] // scale // patch[1])
    window = pipe.config.local_attention_frames
    width = config.num_attention_heads * config.attention_head_dim
    hidden = tokens * width * pipe.transformer.dtype.itemsize
    cached = 2 * config.num_layers * hidden * (frames if window == -1 else window)
    controls = 2 * config.num_layers if "control_dim" in config else 0  # scale and shift of every block
    return cached + (ACTIVATION_CHUNKS + controls) * hidden * pipe.rollout_config.num_frames_per_chunk


def fitted(
    pipeline: PipelineHandle, memory: str, size: tuple[int, int], kv_window: int, kv_cache: str
) -> tuple[int, str]:
    """Return window and K/V cache that fit into `memory`; what the user has set stays."""
    if memory == NO_LIMIT:
        return kv_window, kv_cache
    choice = plan(pipeline, memory, size).choice
    if choice.scheme is not None:
        raise NodeError(
            f"{pipeline.name} fits into {memory} only quantized.",
            f"Connect Q-ARVD Quantize with {choice.scheme} or w4a8, or set memory to {NO_LIMIT} and offload to "
            "blocks.",
        )
    window = kv_window or choice.window or 0
    storage = choice.kv_cache if kv_cache == "auto" else kv_cache
    logger.info(
        "Q-ARVD Stream Generate: for %s, kv_cache is %s and local_attention_frames %s", memory, storage, window
    )
    return window, storage
