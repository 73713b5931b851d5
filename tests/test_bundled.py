"""What ships with the package: small, complete, stock, and free of traces of the machine it was made on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from qarvd_diffusers import ARVDPipeline
from qarvd_diffusers.bundled import bundled_model_path, bundled_prompts
from qarvd_diffusers.calibration.pipeline import PROMPTS_FILE
from qarvd_diffusers.evaluation.moving_shapes import Scene, adherence, held_out_prompts

FOLDER = Path(bundled_model_path())


def test_weights_fit_16_mb_and_are_safetensors():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 16e6
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_no_trace_of_a_local_path():
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8")), path


def test_components_are_stock_classes():
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    WanTransformer3DModel.from_pretrained(FOLDER, subfolder="transformer")
    AutoencoderKLWan.from_pretrained(FOLDER, subfolder="vae")
    UMT5EncoderModel.from_pretrained(FOLDER, subfolder="text_encoder")


def test_calibration_prompts_are_of_the_training_split():
    prompts = [line for line in (FOLDER / PROMPTS_FILE).read_text().splitlines() if not line.startswith("#")]
    assert len(prompts) >= 4
    assert not any(Scene.from_prompt(prompt).held_out for prompt in prompts)
    assert len(bundled_prompts()) >= 4


def test_eight_bit_kv_cache_is_far_above_what_quantized_weights_lose():
    """8-bit weights leave 39 dB: the cache must not be what one sees."""
    pipe = ARVDPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    frames = {}
    for storage in ("auto", "int8", "fp8"):
        generator = torch.Generator().manual_seed(0)
        frames[storage] = pipe(held_out_prompts(1)[0], num_chunks=4, generator=generator, kv_cache=storage).frames
    expected = frames.pop("auto")
    psnr = {k: -10 * np.log10(np.mean((v[:, -12:] - expected[:, -12:]) ** 2)) for k, v in frames.items()}
    assert psnr["int8"] > 50 and psnr["fp8"] > 38


@pytest.mark.slow
def test_float_model_follows_held_out_prompts():
    """A spot check of the figure in examples/tiny_arvd/README.md: at most one of eight held-out prompts goes wrong."""
    pipe = ARVDPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    right = 0
    for seed, prompt in enumerate(held_out_prompts(8, seed=7)):
        frames = pipe(prompt, num_chunks=7, generator=torch.Generator().manual_seed(seed)).frames[0]
        assert frames.shape == (81, 64, 64, 3)
        right += adherence((frames * 255).round().astype("uint8"), prompt).correct
    assert right >= 7
