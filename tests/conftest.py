"""Shared fixtures: golden data, and a tiny random pipeline of real classes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from qarvd_diffusers.conversion import load_transformer_config, to_diffusers_keys
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline

DATA = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Golden:
    """One folder of golden data. Files hold `[B, F, C, H, W]`; everything handed out is `[B, C, F, H, W]`."""

    folder: Path
    state_dict_name: str

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.exists():
            pytest.skip(
                f"{name} is not in {self.folder}; set QARVD_GOLDEN_DIR / QARVD_GOLDEN_FAMILY_DIR to a full set"
            )
        return load_file(path)

    def file(self, name: str) -> dict[str, torch.Tensor]:
        channels_first = ("patch_embedding_conv_out",)  # stored channels first already
        return {
            key: value.transpose(1, 2) if value.ndim == 5 and key not in channels_first else value
            for key, value in self.stored(name).items()
        }

    def original_config(self) -> dict:
        return json.loads((self.folder / "transformer_config.json").read_text())

    def config(self) -> dict:
        return load_transformer_config(self.folder / "transformer_config.json")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.stored(self.state_dict_name)

    def transformer(self) -> CausalWanTransformer3DModel:
        model = CausalWanTransformer3DModel(**self.config())
        model.load_state_dict(to_diffusers_keys(self.state_dict()), strict=True)
        return model.eval()


def golden_folder(variable: str, default: Path, member: str = "") -> Path:
    folder = Path(os.environ.get(variable, default)) / member
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}; set {variable} to the full set")
    return folder


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(golden_folder("QARVD_GOLDEN_DIR", DATA), "A_state_dict_generator_ema.safetensors")


@pytest.fixture(scope="session")
def golden_family():
    def member(name: str) -> Golden:
        return Golden(golden_folder("QARVD_GOLDEN_FAMILY_DIR", DATA / "family", name), "state_dict.safetensors")

    return member


PARALLEL = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure():
    """Give the processes that a parallel worker starts one thread each: there is one worker per core."""
    if PARALLEL:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def few_threads():
    """Use one thread beside other workers, else two: small tensors are slower on many."""
    torch.set_num_threads(1 if PARALLEL else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def needs_gpu(request):
    """Skip what is marked `gpu` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


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


@pytest.fixture
def tiny_pipeline() -> ARVDPipeline:
    """A float32 pipeline with random weights: every component of its real class, 32 x 48 pixels, 12 text tokens."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    pipe = ARVDPipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=build_vae(),
        height=32,
        width=48,
        max_sequence_length=12,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
