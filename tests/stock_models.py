"""Tiny random models of the video transformers of diffusers, and passes through them.

Every model is built from a seed and is wide enough for quantization to mean something. A pass takes latents noised to
a timestep from 0 to 1000, and returns the whole output as one vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn


class Draw:
    """Draw the inputs of one pass; equal names and shapes give equal values, whatever was drawn before.

    Args:
        timestep: noise of the latents, from 0 to 1000.
        seed: of the video.
        dtype: of everything drawn.
    """

    def __init__(self, timestep: float, seed: int, dtype: torch.dtype):
        self.timestep, self.seed, self.dtype = timestep, seed, dtype

    def condition(self, name: str, *shape: int) -> Tensor:
        """Draw a condition, of standard normal values: a prompt, a picture, earlier frames."""
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def latents(self, *shape: int, name: str = "latents") -> Tensor:
        """Draw latents between a video and noise."""
        sigma = self.timestep / 1000
        mixed = (1 - sigma) * self.condition(f"{name} clean", *shape) + sigma * self.condition(f"{name} noise", *shape)
        return mixed.to(self.dtype)

    def times(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Fill a float tensor with the timestep, times `scale`."""
        return torch.full(shape, self.timestep * scale)


@dataclass(frozen=True)
class StockModel:
    """One transformer class of diffusers.

    Attributes:
        name: of the class.
        config: of the tiny model.
        forward: runs one pass; gets the model and the inputs to draw.
        released: what differs from the defaults of the class at the released size.
    """

    name: str
    config: dict[str, Any]
    forward: Callable[[nn.Module, Draw], Any]
    released: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type:
        return getattr(diffusers, self.name)

    def build(self) -> nn.Module:
        """Build the tiny model in float32; what its class leaves at zero or uninitialized is drawn, to count."""
        torch.manual_seed(0)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
        try:
            model = self.cls(**self.config)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        with torch.no_grad():
            for parameter in model.parameters():
                if not torch.isfinite(parameter).all():
                    parameter.normal_(0, parameter.shape[1] ** -0.5)
                elif not parameter.any():
                    parameter.normal_(0, 0.02)
        return model.eval()

    def build_released(self) -> nn.Module:
        """Build the model at its released size, on the meta device."""
        with torch.device("meta"):
            return self.cls(**self.released)

    @torch.no_grad()
    def run(self, model: nn.Module, timestep: float = 500.0, seed: int = 0) -> Tensor:
        """Run one pass and flatten its output, `[N]`."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        # Masks of flexible attention are else compiled, which takes minutes on a CPU.
        with torch.compiler.set_stance("force_eager"):
            return torch.cat([x.flatten().float() for x in _tensors(self.forward(model, Draw(timestep, seed, dtype)))])


def aligned(model: nn.Module) -> nn.Module:
    """Move the tensors of a loaded model to memory of their own.

    Mapped from a file they start at any address, and the order of a CPU's float sums depends on that.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative Euclidean distance of two vectors."""
    return ((got - expected).norm() / expected.norm()).item()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


# What most models of the Wan family share.
_WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
}


def _wan(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 16, 3, 8, 8),
        timestep=draw.times(1),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
    )


def _anyflow_far(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 5, 16, 8, 8),
        timestep=draw.times(1, 5),
        r_timestep=draw.times(1, 5, scale=0.5),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        chunk_partition=[1, 2, 2],
    )


def _helios(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 16, 2, 8, 8),
        timestep=draw.times(1),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        indices_hidden_states=torch.arange(19, 21)[None],
        indices_latents_history_short=torch.arange(18, 19)[None],
        indices_latents_history_mid=torch.arange(16, 18)[None],
        indices_latents_history_long=torch.arange(0, 16)[None],
        latents_history_short=draw.condition("short", 1, 16, 1, 8, 8),
        latents_history_mid=draw.condition("mid", 1, 16, 2, 8, 8),
        latents_history_long=draw.condition("long", 1, 16, 16, 8, 8),
    )


def _framepack(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 4, 3, 8, 8),
        timestep=draw.times(1).long(),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        encoder_attention_mask=torch.ones(1, 12, dtype=torch.long),
        pooled_projections=draw.condition("pooled", 1, 32),
        image_embeds=draw.condition("image", 1, 6, 48),
        indices_latents=torch.arange(10, 13),
        guidance=torch.full((1,), 6000.0).to(draw.dtype),
        latents_clean=draw.condition("clean", 1, 4, 2, 8, 8),
        indices_latents_clean=torch.tensor([0, 13]),
        latents_history_2x=draw.condition("2x", 1, 4, 2, 8, 8),
        indices_latents_history_2x=torch.arange(8, 10),
        latents_history_4x=draw.condition("4x", 1, 4, 4, 8, 8),
        indices_latents_history_4x=torch.arange(4, 8),
    )


def _cameras(batch: int, frames: int) -> Tensor:
    """Build a camera that moves to the right: a 4 x 4 pose and four intrinsics for each frame, `[B, F, 20]`."""
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 0, 3] = torch.arange(frames) * 0.1
    intrinsics = torch.tensor([4.0, 4.0, 2.0, 2.0]).repeat(frames, 1)
    return torch.cat([poses.flatten(1), intrinsics], 1).repeat(batch, 1, 1)


def _sana_wm(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 16, 3, 4, 4),
        timestep=draw.times(1, 1, 3),
        encoder_hidden_states=draw.condition("text", 1, 1, 12, 64),
        encoder_attention_mask=torch.ones(1, 12, dtype=torch.long),
        camera_conditions=_cameras(1, 3).to(draw.dtype),
        chunk_plucker=draw.condition("plucker", 1, 48, 3, 4, 4),
    )


def _sana_wm_refiner(model: nn.Module, draw: Draw) -> Any:
    def rotary(frames: list[int]) -> tuple[Tensor, Tensor]:
        return model.build_rotary_emb_for_absolute_positions(1, frames, 4, 4, torch.device("cpu"), fps=16.0)

    cache = SanaWMRefinerKVCache(len(model.transformer_blocks))
    cache.sink_pe = rotary([0])
    text = draw.condition("text", 1, 12, 48)
    first = model(
        hidden_states=draw.condition("first frame", 1, 16, 16),
        encoder_hidden_states=text,
        timestep=torch.zeros(1, 16),
        video_rotary_emb=cache.sink_pe,
        kv_cache=cache,
        kv_cache_mode="capture_pre_rope",
    )
    return first, model(
        hidden_states=draw.latents(1, 32, 16),
        encoder_hidden_states=text,
        timestep=draw.times(1, 32),
        video_rotary_emb=rotary([1, 2]),
        kv_cache=cache,
        kv_cache_mode="inject",
    )


def _wan_animate_2(model: nn.Module, draw: Draw) -> Any:
    grid = torch.tensor([[3, 4, 4]])
    cache = WanAnimate2KVCache(len(model.blocks))
    shared = {
        "encoder_hidden_states": [draw.condition("text", 10, 64)],
        "encoder_hidden_states_image": draw.condition("image", 1, 6, 1280),
        "kv_cache": cache,
        "seq_len": 48,
    }
    reference = model(
        [draw.condition("reference", 16, 3, 8, 8)],
        timestep=draw.times(1),
        condition_latents=[draw.condition("reference mask", 20, 3, 8, 8)],
        kv_cache_mode="extract",
        offset_grid_sizes=grid,
        **shared,
    )
    return reference, model(
        [draw.latents(16, 3, 8, 8)],
        timestep=draw.times(1),
        condition_latents=[draw.condition("mask", 20, 3, 8, 8)],
        kv_cache_mode="cached",
        reference_grid_sizes=grid,
        origin_len=9,
        origin_area=[64, 64],
        **shared,
    )


def _wan_animate(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 36, 3, 8, 8),
        timestep=draw.times(1),
        encoder_hidden_states=draw.condition("text", 1, 512, 64),  # the model counts them from the end
        encoder_hidden_states_image=draw.condition("image", 1, 6, 48),
        pose_hidden_states=draw.condition("pose", 1, 16, 2, 8, 8),
        face_pixel_values=draw.condition("face", 1, 3, 5, 16, 16),
    )


def _ltx(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 48, 16),
        encoder_hidden_states=draw.condition("text", 1, 12, 48),
        timestep=draw.times(1),
        encoder_attention_mask=torch.ones(1, 12, dtype=torch.bool),
        num_frames=3,
        height=4,
        width=4,
    )


def _ltx2(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 48, 16),
        audio_hidden_states=draw.latents(1, 9, 8, name="audio"),
        encoder_hidden_states=draw.condition("text", 1, 12, 48),
        audio_encoder_hidden_states=draw.condition("audio text", 1, 12, 48),
        timestep=draw.times(1),
        num_frames=3,
        height=4,
        width=4,
        audio_num_frames=9,
    )


def _cosmos3(model: nn.Module, draw: Draw) -> Any:
    text, video, action = 12, 3 * 4 * 4, 4
    length = text + video + action
    return model(
        input_ids=torch.arange(draw.seed, draw.seed + text) % 100,
        text_indexes=torch.arange(text),
        position_ids=torch.arange(length).repeat(3, 1),
        und_len=text,
        sequence_length=length,
        vision_tokens=[draw.latents(1, 8, 3, 8, 8)],
        vision_token_shapes=[(3, 4, 4)],
        vision_sequence_indexes=torch.arange(text, text + video),
        vision_mse_loss_indexes=torch.arange(text, text + video),
        vision_timesteps=draw.times(video),
        vision_noisy_frame_indexes=[torch.arange(3)],
        action_tokens=[draw.latents(action, 10, name="action")],
        action_token_shapes=[(action, 1, 1)],
        action_sequence_indexes=torch.arange(text + video, length),
        action_mse_loss_indexes=torch.arange(text + video, length),
        action_timesteps=draw.times(action),
        action_noisy_frame_indexes=[torch.arange(action)],
        action_domain_ids=[torch.tensor(1)],
    )


def _cosmos(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 16, 3, 8, 8),
        timestep=draw.times(1, scale=0.001),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        fps=16,
        padding_mask=torch.zeros(1, 1, 64, 64).to(draw.dtype),
    )


def _sana_video(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 16, 3, 8, 8),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        timestep=draw.times(1),
        encoder_attention_mask=torch.ones(1, 12, dtype=torch.long),
    )


def _kandinsky5(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 3, 8, 8, 4),
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        timestep=draw.times(1),
        pooled_projections=draw.condition("pooled", 1, 32),
        visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(12),
    )


def _minimax_h3(model: nn.Module, draw: Draw) -> Any:
    text, video, audio = 12, 48, 6
    length = text + video + audio
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4))
    line = torch.arange(text)[:, None].expand(-1, 3)
    return model(
        hidden_states=draw.latents(1, video, 32),
        audio_hidden_states=draw.latents(1, audio, 8, name="audio"),
        encoder_hidden_states=draw.condition("text", 1, text, 64),
        timestep=torch.tensor([draw.timestep / 1000, 0.0]),
        timestep_indices=torch.cat([torch.ones(text), torch.zeros(video + audio)]).long(),
        token_tags=torch.tensor([1] * text + [0] * video + [2] * audio),
        position_ids=torch.cat([line, grid, line[:audio]]),
        video_indices=torch.arange(text, text + video),
        audio_indices=torch.arange(text + video, length),
        text_indices=torch.arange(text),
    )


def _nucleus_moe(model: nn.Module, draw: Draw) -> Any:
    return model(
        hidden_states=draw.latents(1, 16, 16),
        img_shapes=[(1, 4, 4)],
        encoder_hidden_states=draw.condition("text", 1, 12, 64),
        timestep=draw.times(1, scale=0.001),
    )


_LTX = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "num_layers": 2,
    "caption_channels": 48,
}
_LTX2 = {
    **_LTX,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
}

STOCK_MODELS = [
    StockModel("AnyFlowFARTransformer3DModel", {**_WAN, "chunk_partition": (1, 2, 2)}, _anyflow_far),
    StockModel("HeliosTransformer3DModel", {**_WAN, "rope_dim": (12, 10, 10)}, _helios),
    StockModel("SkyReelsV2Transformer3DModel", _WAN, _wan),
    StockModel(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "text_embed_dim": 64,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (12, 10, 10),
            "has_image_proj": True,
            "image_proj_dim": 48,
            "has_clean_x_embedder": True,
        },
        _framepack,
        {"has_image_proj": True, "has_clean_x_embedder": True},
    ),
    StockModel(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "linear_head_dim": 32,
            "softmax_every_n": 2,
            "caption_channels": 64,
        },
        _sana_wm,
    ),
    StockModel("SanaWMLTX2RefinerTransformer3DModel", _LTX2, _sana_wm_refiner),
    StockModel(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": 12,
            "dim": 128,
            "ffn_dim": 256,
            "freq_dim": 64,
            "text_dim": 64,
            "num_heads": 4,
            "num_layers": 2,
        },
        _wan_animate_2,
    ),
    StockModel(
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            "in_channels": 36,
            "latent_channels": 16,
            "image_dim": 48,
            "added_kv_proj_dim": 128,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 32,
            "face_encoder_hidden_dim": 32,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        _wan_animate,
        {"added_kv_proj_dim": 5120},
    ),
    StockModel("LTXVideoTransformer3DModel", _LTX, _ltx),
    StockModel("LTX2VideoTransformer3DModel", _LTX2, _ltx2),
    StockModel(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 32,
            "hidden_size": 128,
            "intermediate_size": 256,
            "latent_channel": 8,
            "patch_latent_dim": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "action_dim": 10,
            "action_gen": True,
            "num_embodiment_domains": 3,
            "vocab_size": 100,
        },
        _cosmos3,
        {"action_dim": 64, "action_gen": True},
    ),
    StockModel(
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 64,
            "adaln_lora_dim": 32,
            "max_size": (4, 32, 32),
        },
        _cosmos,
    ),
    StockModel(
        "SanaVideoTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 128,
            "caption_channels": 64,
        },
        _sana_video,
    ),
    StockModel(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 64,
            "in_text_dim2": 32,
            "time_dim": 64,
            "model_dim": 128,
            "ff_dim": 256,
            "num_text_blocks": 2,
            "num_visual_blocks": 2,
            "axes_dims": (8, 12, 12),
        },
        _kandinsky5,
    ),
    StockModel(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "hidden_size": 128,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "ffn_dim": 256,
            "in_channels": 8,
            "audio_in_channels": 8,
            "text_dim": 64,
            "freq_dim": 64,
            "time_embed_hidden_dim": 128,
            "time_embed_dim": 64,
            "rope_freq_dim": 4,
        },
        _minimax_h3,
    ),
    StockModel("ChronoEditTransformer3DModel", {**_WAN, "rope_temporal_skip_len": 4}, _wan),
    StockModel("WanTransformer3DModel", _WAN, _wan),
    StockModel(
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "axes_dims_rope": (8, 12, 12),
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 96,
            "capacity_factors": [0.0, 2.0, 2.0],
        },
        _nucleus_moe,
    ),
]
