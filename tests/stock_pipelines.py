"""Tiny random pipelines of diffusers that generate video chunk by chunk, and one generation of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline
from stock_models import STOCK_MODELS, aligned
from tiny_pipeline import build_vae
from torch import Tensor, nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

_MODELS = {model.name: model for model in STOCK_MODELS}
_FOUR_CHANNELS = {"in_channels": 4, "out_channels": 4}  # as the VAE has


@dataclass(frozen=True)
class StockPipeline:
    """One pipeline class of diffusers, and how it is called.

    Attributes:
        name: of the class, with a remark behind a space where a class is called in several ways.
        transformer: class of its transformer.
        scheduler: its scheduler.
        call: arguments of one generation.
        chunks: that one generation makes, as told by the timesteps.
        components: the other components, beside the VAE of Wan.
        inputs: further arguments, drawn for every generation.
        config: of the transformer, beside `_FOUR_CHANNELS`.
    """

    name: str
    transformer: str
    scheduler: Callable[[], Any]
    call: dict[str, Any]
    chunks: int
    components: Callable[[], dict[str, Any]] = dict
    inputs: Callable[[torch.Generator], dict[str, Any]] = lambda generator: {}
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type[DiffusionPipeline]:
        return getattr(diffusers, self.name.split()[0])

    def build(self) -> DiffusionPipeline:
        """Build the pipeline with random weights, without text encoder."""
        model = _MODELS[self.transformer]
        model = type(model)(model.name, {**model.config, **_FOUR_CHANNELS, **self.config}, model.forward)
        transformer = model.build()
        torch.manual_seed(1)
        components = {"vae": build_vae(), "text_encoder": None, "tokenizer": None, **self.components()}
        pipe = self.cls(transformer=transformer, scheduler=self.scheduler(), **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, pipe: DiffusionPipeline, seed: int = 0, output_type: str = "pt") -> Tensor:
        """Generate one video from a random prompt and flatten it, `[N]`."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {"prompt_embeds": torch.randn(1, 12, 64, generator=generator), **self.inputs(generator)}
        call = {"height": 64, "width": 64, "generator": generator, "output_type": output_type, **self.call}
        # Masks of flexible attention are else compiled, which takes minutes on a CPU.
        with torch.compiler.set_stance("force_eager"):
            video = pipe(**inputs, **call).frames
        return torch.cat([part.flatten() for part in video]).float()

    def load(self, folder: str | os.PathLike[str]) -> DiffusionPipeline:
        """Load a saved pipeline with the stock class; what was None stays None."""
        index = self.cls.load_config(folder)
        absent = {name: None for name, value in index.items() if value == [None, None]}
        pipe = self.cls.from_pretrained(folder, **absent)
        pipe.set_progress_bar_config(disable=True)
        aligned(pipe.transformer), aligned(pipe.vae)
        return pipe

    def rollouts(self, pipe: DiffusionPipeline, count: int = 2, first_seed: int = 100) -> list[Callable[[], Tensor]]:
        """Make generations of different prompts, as `quantize` takes them."""
        return [lambda seed=first_seed + i: self.generate(pipe, seed, "latent") for i in range(count)]


def _framepack_components() -> dict[str, Any]:
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )
    return {
        "vae": vae.eval(),
        "text_encoder_2": None,
        "tokenizer_2": None,
        "image_encoder": SiglipVisionModel(vision).eval(),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
    }


def _framepack_inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "image": torch.rand(1, 3, 64, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        "prompt_attention_mask": torch.ones(1, 12),
    }


def _unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=8.0
    )


_SKYREELS = {"base_num_frames": 17, "guidance_scale": 1.0}

STOCK_PIPELINES = [
    StockPipeline(
        "AnyFlowFARPipeline",
        "AnyFlowFARTransformer3DModel",
        diffusers.FlowMapEulerDiscreteScheduler,
        {"num_frames": 25, "num_inference_steps": 2, "chunk_partition": [1, 2, 2, 2]},
        chunks=4,
    ),
    StockPipeline(
        "HeliosPipeline",
        "HeliosTransformer3DModel",
        lambda: diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3),
        {
            "num_frames": 24,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "num_latent_frames_per_chunk": 2,
        },
        chunks=4,
    ),
    StockPipeline(
        "SkyReelsV2DiffusionForcingPipeline long",
        "SkyReelsV2Transformer3DModel",
        _unipc,
        {"prompt": None, "num_frames": 41, "num_inference_steps": 2, "overlap_history": 5, **_SKYREELS},
        chunks=3,
    ),
    StockPipeline(
        "SkyReelsV2DiffusionForcingPipeline async",
        "SkyReelsV2Transformer3DModel",
        _unipc,
        {
            "prompt": None,
            "num_frames": 17,
            "num_inference_steps": 3,
            "ar_step": 1,
            "causal_block_size": 1,
            **_SKYREELS,
        },
        chunks=1,
    ),
    StockPipeline(
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepackTransformer3DModel",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        {"num_frames": 17, "num_inference_steps": 2, "latent_window_size": 3},
        chunks=2,
        components=_framepack_components,
        inputs=_framepack_inputs,
    ),
    StockPipeline(
        "WanPipeline",
        "WanTransformer3DModel",
        diffusers.FlowMatchEulerDiscreteScheduler,
        {"num_frames": 9, "num_inference_steps": 3, "guidance_scale": 1.0},
        chunks=1,
    ),
]


def timestep_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Read the largest timestep off a call of a transformer."""
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(torch.as_tensor(timestep).max())
