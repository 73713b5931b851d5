"""Connect pipelines to ComfyUI's own samplers."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..compat import NodeError, output, schema, work
from ..handles import PipelineHandle, PipelineType
from ..latents import normalize, one_video


class QARVDToModel(io.ComfyNode):
    """Convert the transformer to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDToModel",
            display_name="Q-ARVD To Model",
            description="Converts the pipeline's transformer to a ComfyUI MODEL, with its quantized layers, for "
            "Sampler AR Video, LoRA loaders and other nodes that take a MODEL. Needs ComfyUI 0.21 or later.",
            search_aliases=["unet", "diffusion model", "lora", "native sampler"],
            inputs=[PipelineType.Input("pipeline", tooltip="A float or quantized pipeline.")],
            outputs=[output(io.Model, "model", "The transformer, for Sampler AR Video and LoRA loaders.")],
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle) -> io.NodeOutput:
        """Return the MODEL."""
        from ..core_model import to_model

        return io.NodeOutput(to_model(pipeline))


class QARVDDecode(io.ComfyNode):
    """Decode latents with the pipeline's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDDecode",
            display_name="Q-ARVD Decode",
            description="Decodes video latents with the pipeline's own VAE. For models with Wan's VAE, ComfyUI's VAE "
            "Decode does the same.",
            search_aliases=["vae decode", "latent to video"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="The pipeline whose VAE decodes."),
                io.Latent.Input("latent", tooltip="Latents in the VAE's own (raw) space, as samplers return them."),
            ],
            outputs=[output(io.Image, "images", "All frames of the video.")],
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle, latent: dict[str, torch.Tensor]) -> io.NodeOutput:
        """Return images `[frames, height, width, 3]` in [0, 1]."""
        pipe = pipeline.pipe
        if pipe.vae is None:
            raise NodeError(f"{pipeline.name} has no VAE.", "Decode with ComfyUI's VAE Decode and Wan's VAE.")
        samples = one_video("latent", latent["samples"], pipe.vae.config.z_dim, pipeline.name)
        pipeline.load("vae")
        raw = samples.to(device=pipeline.device, dtype=pipe.vae.dtype)
        pixels = pipe.make_decoder().decode(normalize(pipe.vae, raw))
        return io.NodeOutput((pixels[0].permute(1, 2, 3, 0).float().cpu() / 2 + 0.5).clamp(0, 1))
