"""Choose the run-time options of a stream that fit into a memory budget, and apply them to a pipeline."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan

from ..vae.streaming import optimize_vae
from .estimate import WINDOW, MemoryChoice, MemoryPlan, estimate
from .shapes import ModelShapes

if TYPE_CHECKING:
    from ..rollout.host import PipelineHost

DATA_FREE = "w8a8_dynamic"  # what a float model is quantized to: it needs no calibration, so no memory for it


def parse_budget(memory: str | float) -> int | None:
    """Convert `"8GB"`, `"8"` or `8` (10^9 bytes each), `"8GiB"` or `"8192MiB"` to bytes, and `"max"` to None.

    Raises:
        ValueError: for anything else.
    """
    if memory == "max":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]i?B|G|M|)\s*", str(memory), re.IGNORECASE)
    if match is None or (not match[2] and float(match[1]) >= 10_000):  # probably a number of bytes
        raise ValueError(
            f"memory is {memory!r}, expected a size such as '8GB', '8' (the same), '8GiB' or '500MB', or 'max'"
        )
    unit = match[2].lower() or "g"
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** (3 if unit[0] == "g" else 2))


def choose(shapes: ModelShapes, memory: str, *, scheme: str | None = None, **options: Any) -> MemoryPlan:
    """Return the choices that cost least quality and time among those that fit.

    Tries, in this order: the text encoder off the device, an 8-bit K/V cache, a quantized transformer, a smaller
    window.

    Args:
        shapes: of the model.
        memory: see `parse_budget`.
        scheme: what the caller quantizes to in any case.
        **options: see `estimate`.

    Raises:
        ValueError: if nothing fits; shows what the smallest choice needs.
    """
    budget = parse_budget(memory)
    if budget is None:
        return estimate(shapes, MemoryChoice(scheme=scheme), **options)
    for choice in _candidates(shapes, scheme):
        plan = estimate(shapes, choice, budget=budget, **options)
        if plan.fits:
            return plan
    raise ValueError(
        f"{shapes.name} does not fit into {budget / 1e9:g}GB: with 8-bit K/V, a window of {plan.choice.window} "
        "latent frames and a "
        f"streamed text encoder it needs {plan.total / 1e9:.1f} GB\n{plan.describe()}\nAsk for a smaller picture, or "
        "a model of fewer parameters or bits."
    )


def _candidates(shapes: ModelShapes, scheme: str | None) -> Iterator[MemoryChoice]:
    """Yield choices, those of least cost in quality and time first."""
    fields = shapes.fields
    own = fields.local_attention_frames if fields.local_attention_frames != -1 else WINDOW
    least = (
        fields.sink_frames + 2 * fields.num_frames_per_chunk
    )  # a chunk that sees only its own sink is cut off from the past
    windows = [own, *(w for w in range(own - fields.num_frames_per_chunk, least - 1, -fields.num_frames_per_chunk))]
    schemes = [scheme] if scheme or shapes.quantization else [None, DATA_FREE]
    for window, quantized, storage, encoder in itertools.product(
        windows, schemes, ("auto", "int8"), ("keep", "cpu", "stream")
    ):
        unchanged = window == fields.local_attention_frames
        yield MemoryChoice(quantized, storage, encoder, None if unchanged else window)


def apply_choice(pipe: PipelineHost, choice: MemoryChoice) -> None:
    """Set up a loaded pipeline and move it to the GPU if there is one, with the VAE modules that need least memory.

    On a GPU it also enables expandable segments in torch's allocator, for the whole process: less memory is lost to
    fragmentation.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        _enable_expandable_segments()
        if isinstance(getattr(pipe, "vae", None), AutoencoderKLWan):
            optimize_vae(pipe.vae)
    pipe.kv_cache, pipe.window = choice.kv_cache, choice.window
    if choice.text_encoder != "keep":
        pipe.offload_text_encoder(choice.text_encoder, device)
    pipe.to(device)


def _enable_expandable_segments() -> None:
    if torch.cuda.get_allocator_backend() == "native":
        # The only public way is an environment variable, which is read too early. The second setter is the older one.
        setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (setter or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
