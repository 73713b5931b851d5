"""Offload the text encoder between prompts, and save prompt embeddings that need no text encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.hooks import apply_group_offloading
from safetensors.torch import save_file
from torch import nn

from ..files.atomic import atomic_file
from ..files.safetensors import check_finite, open_tensors, read_specs

if TYPE_CHECKING:
    from .host import StreamHost

OFFLOADS = ("keep", "cpu", "stream", "free")
"""`keep`: it stays with the other components. `cpu`: it is in host memory and moves to the device to encode. `stream`:
its layers move to the device one by one while it encodes, so that the device never holds more than the largest of
them; the token embedding table stays in host memory, because a prompt needs only a few rows. `free`: it is dropped
after the first prompt; later prompts must be embeddings.
"""

_KEY = "prompt_embeds"


def offload_text_encoder(pipe: StreamHost, mode: str, device: torch.device | str | None = None) -> None:
    """Choose where the pipeline's text encoder is kept between prompts.

    Args:
        pipe: its other components stay where they are.
        mode: one of `OFFLOADS`.
        device: where it runs in mode `stream`; None takes the pipeline's device.

    Raises:
        ValueError: for an unknown mode, for another mode after `stream` (diffusers' hooks stay), or for streaming an
            int8 encoder, whose packed weights those hooks do not move.
    """
    if mode not in OFFLOADS:
        raise ValueError(f"the text encoder's offload is {mode!r}, expected one of {', '.join(OFFLOADS)}")
    if pipe.text_encoder_offload == "stream" != mode:
        raise ValueError("a streamed text encoder stays streamed: load the pipeline again")
    encoder = getattr(pipe, "text_encoder", None)
    if encoder is not None and mode == "stream" and pipe.text_encoder_offload != "stream":
        if any(type(module).__name__ == "QLinear" for module in encoder.modules()):
            raise ValueError("an int8 text encoder cannot be streamed: use 'cpu', or load it in float")
        _stream_layers(encoder, torch.device(device or pipe.device))
    elif encoder is not None and mode in ("cpu", "free"):
        encoder.to("cpu")
    pipe.text_encoder_offload = mode


def _stream_layers(encoder: nn.Module, device: torch.device) -> None:
    home = torch.device("cpu")
    table: nn.Parameter = encoder.get_input_embeddings().weight  # type: ignore[operator]
    encoder.to(home)
    for part in _parts_without(encoder, table):
        apply_group_offloading(part, device, home, offload_type="leaf_level")
    for module in encoder.modules():
        if _holds(module, table, recurse=False):  # several may be tied to it
            module.register_forward_pre_hook(lambda module, tokens: tuple(ids.to(home) for ids in tokens))
            module.register_forward_hook(lambda module, tokens, rows: rows.to(device))


def _holds(module: nn.Module, parameter: nn.Parameter, recurse: bool = True) -> bool:
    """Return whether a module, or one of its submodules, holds this very parameter."""
    return any(own is parameter for own in module.parameters(recurse))


def _parts_without(module: nn.Module, excluded: nn.Parameter) -> Iterator[nn.Module]:
    """Yield the largest submodules that do not hold `excluded`."""
    for child in module.children():
        if not _holds(child, excluded):
            yield child
        else:
            yield from _parts_without(child, excluded)


@contextmanager
def text_encoder_at_work(pipe: StreamHost) -> Iterator[None]:
    """Move the text encoder to the device, and back when the block ends."""
    encoder, mode = getattr(pipe, "text_encoder", None), pipe.text_encoder_offload
    if encoder is None or mode not in ("cpu", "free"):
        yield
        return
    device = pipe._execution_device
    encoder.to(device)
    try:
        yield
    finally:
        encoder.to("cpu")
        if mode == "free":
            pipe.text_encoder = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def save_prompt_embeds(prompt_embeds: torch.Tensor, path: str | os.PathLike[str]) -> None:
    """Write embeddings `[B, text_tokens, text_dim]` to a safetensors file that `prompt_embeds=path` reads."""
    with atomic_file(path) as temporary:
        save_file({_KEY: prompt_embeds.detach().cpu().contiguous()}, temporary)


def load_prompt_embeds(prompt_embeds: torch.Tensor | str | os.PathLike[str] | None) -> torch.Tensor | None:
    """Return embeddings as they are, or read them from a file of `save_prompt_embeds`.

    Raises:
        ValueError: if it is not a safetensors file, or has no finite `prompt_embeds` of three dimensions.
    """
    if not isinstance(prompt_embeds, str | os.PathLike):
        return prompt_embeds
    with open_tensors(prompt_embeds) as file:
        found = read_specs(prompt_embeds)
        if _KEY not in found:
            raise ValueError(f"{prompt_embeds} has no tensor named {_KEY!r}, but {list(found)[:5]}")
        spec = found[_KEY]
        if not spec.dtype.is_floating_point or len(spec.shape) != 3 or 0 in spec.shape:
            raise ValueError(f"{prompt_embeds}: {_KEY} is {spec}, expected floats [B, text_tokens, text_dim]")
        embeds: torch.Tensor = file.get_tensor(_KEY)
    check_finite(embeds, f"{prompt_embeds}: {_KEY}")
    return embeds
