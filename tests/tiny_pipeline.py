"""Builds a tiny random pipeline of real classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from qarvd_diffusers.conversion.families import FAMILIES
from qarvd_diffusers.models.world import WorldWanTransformer3DModel
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per known word, `</s>` appended."""
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "a",
        "red",
        "green",
        "blue",
        "circle",
        "square",
        "triangle",
        "moves",
        "stays",
        "left",
        "right",
        "up",
        "down",
        "and",
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0, pad_token_id=0
    )
    return UMT5EncoderModel(config).eval()


def build_vae() -> AutoencoderKLWan:
    """8x smaller in space, 4x in time, as Wan's, with few channels."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    ).eval()


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
    ).eval()


def build_world_transformer(control_dim: int = 6) -> WorldWanTransformer3DModel:
    """Like `build_transformer`, with input channels for a picture, and controls."""
    config = {**build_transformer().config, "in_channels": 12}
    return WorldWanTransformer3DModel.from_config({**config, "control_dim": control_dim}).eval()


def build_world(control_dim: int = 6) -> ARVDPipeline:
    """Like `build_pipeline`, with a camera, or rays and keys, as LingBot-World has."""
    torch.manual_seed(0)
    return build_pipeline(build_world_transformer(control_dim), **FAMILIES["lingbot-world"].fields.to_dict())


def build_pipeline(transformer: WanTransformer3DModel | None = None, **fields) -> ARVDPipeline:
    """A float32 pipeline with random weights: every component of its real class, 32 x 48 pixels, 12 text tokens."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    pipe = ARVDPipeline(
        transformer=transformer or build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=build_vae(),
        height=32,
        width=48,
        max_sequence_length=12,
        **fields,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
