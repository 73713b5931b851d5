"""Nodes that load a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from comfy_api.latest import io

from .. import folders
from ..compat import NodeError, schema, widget, work
from ..handles import PipelineHandle, PipelineType
from ..library import library
from ..report import describe

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _load(folder: Path, name: str, dtype: str) -> io.NodeOutput:
    if dtype not in DTYPES:
        raise NodeError(f"dtype is {dtype!r}.", f"Choose one of {', '.join(DTYPES)}.")
    on_cpu = management.get_torch_device().type == "cpu"
    chosen = DTYPES[dtype] or (torch.float32 if on_cpu else torch.bfloat16)
    try:
        pipe = library().ARVDPipeline.from_pretrained(str(folder), dtype=chosen)
    except (OSError, ValueError) as error:
        raise NodeError(
            f"{name} cannot be loaded: {' '.join(str(error).split())}",
            f"Check the folder {folder}: copy or save the model again.",
        ) from error
    handle = PipelineHandle(pipe, name)
    return io.NodeOutput(handle, describe(handle))


class QARVDLoadPipeline(io.ComfyNode):
    """A float or quantized pipeline from a diffusers folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDLoadPipeline",
            display_name="Q-ARVD Load Pipeline",
            description="Loads an autoregressive Wan model (Self-Forcing family) from a diffusers folder in "
            "models/qarvd or models/diffusers, or the small model that ships with the library.",
            search_aliases=["self-forcing", "causal wan", "autoregressive video", "load streaming model"],
            inputs=[
                widget(
                    io.Combo,
                    "model",
                    options=[folders.BUNDLED, *folders.model_folders()],
                    default=folders.BUNDLED,
                    tooltip="A diffusers folder with model_index.json in models/qarvd, models/diffusers or output/qarvd.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="Compute type. auto: bfloat16 on a GPU, float32 on the CPU.",
                ),
            ],
            outputs=[PipelineType.Output(display_name="pipeline"), io.String.Output(display_name="info")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str = "", **kwargs: Any) -> str:
        found = folders.model_folders()
        return folders.stamp(found[model]) if model in found else ""

    @classmethod
    @work
    def execute(cls, model: str, dtype: str = "auto") -> io.NodeOutput:
        if model == folders.BUNDLED:
            return _load(Path(library().bundled_model_path()), "tiny-arvd", dtype)
        return _load(folders.find_model(model), model, dtype)


class QARVDLoadQuantized(io.ComfyNode):
    """A quantized pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        quantized = [name for name, folder in folders.model_folders().items() if folders.is_quantized(folder)]
        return schema(
            node_id="QARVDLoadQuantized",
            display_name="Q-ARVD Load Quantized",
            description="Loads a model saved by Q-ARVD Save Quantized (or by qarvd quantize), packed as it is on disk.",
            search_aliases=["w4a8", "w8a8", "int4", "int8", "load quantized video model"],
            inputs=[
                widget(
                    io.Combo,
                    "checkpoint",
                    options=quantized,
                    tooltip="A quantized model in output/qarvd, models/qarvd or models/diffusers.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="Type of everything that is not quantized. auto: bfloat16 on a GPU, float32 on the CPU.",
                ),
            ],
            outputs=[PipelineType.Output(display_name="pipeline"), io.String.Output(display_name="info")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        # Instead of ComfyUI's "value not in list", which does not say what to do.
        try:
            cls._find(checkpoint)
        except NodeError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str = "", **kwargs: Any) -> str:
        found = folders.model_folders()
        return folders.stamp(found[checkpoint]) if checkpoint in found else ""

    @classmethod
    def _find(cls, checkpoint: str) -> Path:
        folder = folders.find_model(checkpoint)
        if not folders.is_quantized(folder):
            raise NodeError(
                f"{checkpoint} is a float model, not a quantized one.",
                "Load it with Q-ARVD Load Pipeline and connect Q-ARVD Quantize.",
            )
        return folder

    @classmethod
    @work
    def execute(cls, checkpoint: str, dtype: str = "auto") -> io.NodeOutput:
        return _load(cls._find(checkpoint), checkpoint, dtype)
