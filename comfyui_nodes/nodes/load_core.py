"""Load models from ComfyUI's own folders, with the VAE and text encoder of ComfyUI's own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy_api.latest import io

from .. import folders
from ..compat import FAMILY, NodeError, output, schema, widget, work
from ..core_vae import pipeline_vae
from ..handles import PipelineHandle, PipelineType
from ..library import library
from ..report import describe
from .load import DTYPES, _is_ours, _presets

AUTO = "auto"
KIND = "diffusion_models"


class QARVDLoadDiffusionModel(io.ComfyNode):
    """Load a transformer file of ComfyUI, and take the VAE from ComfyUI."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDLoadDiffusionModel",
            display_name="Q-ARVD Load Diffusion Model",
            description="Loads an autoregressive Wan model (Self-Forcing family) from a file in "
            "models/diffusion_models, with ComfyUI's own VAE. Encode prompts with ComfyUI's CLIP Text Encode and "
            "Wan's umt5. Nothing is converted or stored twice.",
            search_aliases=[*FAMILY, "load diffusion model", "unet loader", "safetensors"],
            inputs=[
                widget(
                    io.Combo,
                    "model",
                    options=folder_paths.get_filename_list(KIND),
                    tooltip="A file in models/diffusion_models, or in a folder of extra_model_paths.yaml.",
                ),
                io.Vae.Input("vae", tooltip="From Load VAE, with the VAE of Wan 2.1."),
                widget(
                    io.Combo,
                    "rollout",
                    options=[AUTO, *_presets()],
                    default=AUTO,
                    tooltip="Which member of the family the file is; auto decides by its name and size.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="Type of weights and activations. auto: bfloat16 on a GPU, float32 on the CPU.",
                ),
            ],
            outputs=[
                output(PipelineType, "pipeline", "The loaded pipeline, without a text encoder."),
                output(io.String, "info", "Scheme, size and rollout of the pipeline."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str = "", **_: Any) -> str:
        """Return text that changes with the file."""
        path = folder_paths.get_full_path(KIND, model or "")
        return folders.stamp(Path(path)) if path else ""

    @classmethod
    @work
    def execute(cls, model: str, vae: Any, rollout: str = AUTO, dtype: str = "auto") -> io.NodeOutput:
        """Return the pipeline and its description."""
        if dtype not in DTYPES:
            raise NodeError(f"dtype is {dtype!r}.", f"Choose one of {', '.join(DTYPES)}.")
        found = folder_paths.get_full_path(KIND, model)
        if found is None:
            raise NodeError(
                f"There is no file {model!r} in models/diffusion_models.",
                "Put it there and press R.",
            )
        on_cpu = management.get_torch_device().type == "cpu"
        wanted = DTYPES[dtype] or (torch.float32 if on_cpu else torch.bfloat16)
        path, own_vae = Path(found), pipeline_vae(vae)
        try:
            if _is_ours(path):
                values = (
                    {} if rollout == AUTO else library("conversion.families").find_family(rollout).fields.to_dict()
                )
                pipe = library().ARVDPipeline.from_single_file(path, dtype=wanted, vae=own_vae, **values)
            else:
                transformer, config = library("conversion").load_original(path, rollout, wanted)
                pipe = library().ARVDPipeline(transformer=transformer, vae=own_vae, scheduler=None, **config)
                pipe.source = str(path)
        except (OSError, ValueError) as error:
            raise NodeError(
                f"{model} cannot be loaded: {' '.join(str(error).split())}",
                "Choose a model of the Self-Forcing family, or another rollout.",
            ) from error
        pipe.vae.to(wanted)
        handle = PipelineHandle(pipe, model)
        return io.NodeOutput(handle, describe(handle))
