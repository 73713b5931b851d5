"""Check the file of a saved stream: the facts in its header, and every tensor against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch

from ..files.safetensors import TensorSpec, check_specs
from ..files.schema import check_mapping
from .chunk_loop import ChunkLoop
from .config import RolloutConfig
from .decoder import StatefulDecoder
from .inputs import StreamInputs, check_tensors

T = TypeVar("T")

REMEDY = "save the stream again"
_FLOAT = torch.float32  # stands for every float dtype
_PARTS = ("cache.", "decoder.")  # prefixes of the tensors that only a cache and a decoder can tell
_FACTS = {
    "version": int,
    "model": Mapping[str, str],
    "adapters": Mapping[str, Mapping[str, float]] | None,
    "fields": Mapping[str, Any],
    "output_type": Literal["pil", "np", "pt", "latent"],
    "kv_cache": Literal["auto", "bf16", "int8", "fp8"],
    "next_prompts": list[Literal["keep", "recache", "new_text_only", "cut"]],
    "controls": bool,
    "cache": Mapping[str, Any],
    "loop": Mapping[str, Any],
    "inputs": Mapping[str, Any],
}
_INPUTS = {
    "shape": tuple[int, int, int, int],
    "num_chunks": int | None,
    "generator_device": str,
    "one_generator": bool,
}


def below(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def check_state(path: str, facts: Mapping[str, Any], found: Mapping[str, TensorSpec]) -> None:
    """Check the facts of a saved stream, and against them all tensors but those of cache and decoder.

    Args:
        path: of the file, for errors.
        facts: JSON of its header.
        found: its tensors.

    Raises:
        ValueError: a fact of another type, facts that contradict each other, or a tensor that is missing, unexpected
            or of another shape or kind; the message names file and entry.
    """
    facts = check_mapping(facts, _FACTS, path, optional=("adapters", "controls"))
    state = check_mapping(facts["inputs"], _INPUTS, f"{path}: inputs")
    batch, count = state["shape"][0], state["num_chunks"]
    prompt = found.get("prompt_embeds", TensorSpec((), _FLOAT)).shape
    if len(prompt) != 3 or prompt[0] != batch or not prompt[1] or (count is not None and count < 1):
        raise ValueError(
            f"{path}: the shape is {list(state['shape'])}, num_chunks {count} and prompt_embeds {list(prompt)}, "
            f"expected [B, C, H, W], at least 1 and [B, tokens, text_dim]: {REMEDY}"
        )
    try:
        fields = RolloutConfig.from_config(facts["fields"])
    except ValueError as error:
        raise ValueError(f"{path}: fields: {error}: {REMEDY}") from error
    inputs = _inputs(path, fields, state, below("inputs.", found))
    count = sum(name.startswith("loop.") for name in found)
    loop = ChunkLoop.expected_state(inputs, facts["loop"], _FLOAT, count, f"{path}: loop")
    expected = {f"loop.{name}": spec for name, spec in loop.items()} | {"prompt_embeds": TensorSpec(prompt, _FLOAT)}
    for index in range(len(facts["next_prompts"])):
        tokens = getattr(found.get(f"next_prompt.{index}"), "shape", prompt)[1:2]
        expected[f"next_prompt.{index}"] = TensorSpec((batch, *tokens, prompt[2]), _FLOAT)
    for index in range(1 if state["one_generator"] else batch):
        size = getattr(found.get(f"inputs.generator.{index}"), "shape", ())[:1]
        expected[f"inputs.generator.{index}"] = TensorSpec(size, torch.uint8)
    renoise = [f"renoise.{index}" for index in range(len(inputs.renoise_latents or ()))]
    for name in (
        "inputs.latents",
        "inputs.initial_latents",
        "inputs.condition",
        *(f"inputs.{name}" for name in renoise),
    ):
        expected |= {name: found[name]} if name in found else {}  # `StreamInputs` has checked them
    rest = {name: spec for name, spec in found.items() if not name.startswith(_PARTS)}
    check_specs(path, expected, rest, REMEDY, any_float=lambda name: True)


def _inputs(
    path: str, fields: RolloutConfig, state: Mapping[str, Any], found: Mapping[str, TensorSpec]
) -> StreamInputs:
    """Build the inputs of a stream from tensors without content, which checks their shapes."""
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in found.items()}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("generator.")}
    renoise = [own[name] for index in range(len(own)) if (name := f"renoise.{index}") in own]
    latents, initial = own.get("latents"), own.get("initial_latents")
    try:
        check_tensors(**own)
        inputs = StreamInputs(
            fields, state["shape"], state["num_chunks"], latents, renoise or None, initial, None, own.get("condition")
        )
        needed = (inputs.num_latent_frames or 0) - inputs.context_frames
        if latents is not None and not 0 < needed <= latents.shape[2]:
            raise ValueError(f"latents have {latents.shape[2]} frames, {state['num_chunks']} chunks need {needed}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {REMEDY}") from error
    return inputs


def check_parts(
    path: str, facts: Mapping[str, Any], found: Mapping[str, TensorSpec], cache: Any, decoder: StatefulDecoder | None
) -> None:
    """Check the tensors of cache and decoder of a saved stream that `check_state` has checked.

    Args:
        path: of the file, for errors.
        facts: JSON of its header.
        found: its tensors.
        cache: empty cache of the resumed stream; what has no `expected_state` is not checked.
        decoder: of the resumed stream; None if it needs none.

    Raises:
        ValueError: see `check_state`.
    """
    shape, frames = tuple(facts["inputs"]["shape"]), facts["loop"]["_frames_done"]
    if hasattr(cache, "expected_state"):
        stored = below("cache.", found)
        expected = cache.expected_state(facts["cache"], stored, shape, frames, f"{path}: cache")
        check_specs(f"{path}: cache", expected, stored, REMEDY)
    stored = below("decoder.", found)
    in_decoder = None if decoder is None else decoder.expected_state(shape, frames, stored)
    if in_decoder is not None:
        check_specs(f"{path}: decoder", in_decoder, stored, REMEDY)
