"""Nodes that meet ComfyUI's own samplers."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..compat import NodeError, schema, work
from ..handles import PipelineHandle, PipelineType
from ..latents import normalize


class QARVDToModel(io.ComfyNode):
    """The transformer as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDToModel",
            display_name="Q-ARVD To Model",
            description="The pipeline's transformer as a ComfyUI MODEL, quantized layers included, for Sampler AR Video, LoRA "
            "loaders and everything else that takes one. Needs ComfyUI 0.21 or later.",
            search_aliases=["unet", "diffusion model", "lora", "native sampler"],
            inputs=[PipelineType.Input("pipeline", tooltip="A float or quantized pipeline.")],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle) -> io.NodeOutput:
        from ..core_model import to_model

        return io.NodeOutput(to_model(pipeline))


class QARVDDecode(io.ComfyNode):
    """Latents to images with the pipeline's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QARVDDecode",
            display_name="Q-ARVD Decode",
            description="Decodes video latents with the pipeline's own VAE. For Wan's VAE, ComfyUI's VAE Decode does the same.",
            search_aliases=["vae decode", "latent to video"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="The pipeline whose VAE decodes."),
                io.Latent.Input("latent", tooltip="Latents in the VAE's own (raw) space, as samplers give them."),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    @work
    def execute(cls, pipeline: PipelineHandle, latent: dict[str, torch.Tensor]) -> io.NodeOutput:
        pipe, samples = pipeline.pipe, latent["samples"]
        if pipe.vae is None or samples.ndim != 5 or samples.shape[1] != pipe.vae.config.z_dim:
            raise NodeError(
                f"Latents of shape {list(samples.shape)} do not fit the VAE of {pipeline.name}.",
                "Connect video latents of this pipeline, [1, channels, frames, height, width].",
            )
        pipeline.load("vae")
        raw = samples[:1].to(device=pipeline.device, dtype=pipe.vae.dtype)
        pixels = pipe.make_decoder().decode(normalize(pipe.vae, raw))
        return io.NodeOutput((pixels[0].permute(1, 2, 3, 0).float().cpu() / 2 + 0.5).clamp(0, 1))
