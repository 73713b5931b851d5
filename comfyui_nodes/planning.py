"""Plan how the stream of a loaded pipeline fits into a GPU's memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .compat import NodeError
from .handles import PipelineHandle
from .library import library

if TYPE_CHECKING:
    from qarvd_diffusers.memory.estimate import MemoryPlan

NO_LIMIT = "no limit"
SIZES = [NO_LIMIT, "6GB", "8GB", "10GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB"]


def plan(pipeline: PipelineHandle, memory: str, size: tuple[int, int] | None = None, with_text: bool = False) -> Any:
    """Return the `MemoryPlan` of a stream that fits into `memory`, such as `8GB`, or `no limit`.

    Args:
        pipeline: the pipeline; a float one is planned as float.
        memory: what may be in use, CUDA's own memory included.
        size: width and height in pixels; None takes the model's.
        with_text: count the text encoder, too; ComfyUI unloads it before the stream if there is no room for both.

    Raises:
        NodeError: if nothing fits.
    """
    width, height = size or (None, None)
    planner = library("memory.plan")
    budget = "max" if memory == NO_LIMIT else memory
    dtype = pipeline.pipe.transformer.dtype
    try:
        found: MemoryPlan = planner.choose(
            _shapes(pipeline, with_text), budget, dtype=dtype, height=height, width=width
        )
    except ValueError as error:
        problem = str(error).partition("\n")[0]
        raise NodeError(
            f"{problem}.", "Allow more memory, quantize the model to w4a8, or make a smaller picture."
        ) from error
    return found


def _shapes(pipeline: PipelineHandle, with_text: bool) -> Any:
    """Return the configs of a loaded pipeline, as those of a folder."""
    pipe = pipeline.pipe
    transformer = _plain(pipe.transformer.config)
    transformer.pop("quantization_config", None)
    if pipe.quantization is not None:
        transformer["quantization_config"] = pipe.quantization.to_dict()
    vae = None if pipe.vae is None else _plain(pipe.vae.config)
    text = None if pipe.text_encoder is None or not with_text else pipe.text_encoder.config.to_dict()
    index = {name: value for name, value in pipe.config.items() if name not in pipe.components}
    parts = (index, transformer, vae, text)
    parts = (None if part is None else json.loads(json.dumps(part, default=str)) for part in parts)
    return library("memory.shapes").ModelShapes(pipeline.name, *parts)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what diffusers notes in it."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def describe(found: MemoryPlan) -> str:
    """Describe a plan in lines of text: GB per component and phase, the choices, the total."""
    choice = found.choice
    chosen = [f"kv_cache {choice.kv_cache}"]
    if choice.window is not None:
        chosen.append(f"local_attention_frames {choice.window}")
    if choice.scheme is not None:
        chosen.append(f"quantized to {choice.scheme}")
    limit = "" if found.budget is None else f" of {found.budget / 1e9:g} GB"
    total = f"needs {found.total / 1e9:.2f} GB{limit}, including the memory of CUDA itself"
    return "\n".join([found.describe(), ", ".join(chosen), total])
