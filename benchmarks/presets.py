"""Quantize a small model of every family, and measure passes per chunk and the error against float.

    python benchmarks/presets.py GOLDEN_FAMILY_DIR

The folder holds a model with inputs per family (see tests/data/golden/README.md). Errors are |quantized - float| /
|float| of all latents on the same noise. The weights are random: the figures show that the passes of a family are
calibrated and quantized consistently, not how good its videos are.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.conversion import load_transformer_config, to_diffusers_keys
from qarvd_diffusers.conversion.families import PRESETS, available
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.quantizer import attach

MEMBERS = {
    "causvid": "causvid",
    "krea": "krea_realtime",
    "longlive": "longlive",
    "longlive-2": "longlive2",
    "infinity-rope": "longlive",
    "reward-forcing": "longlive",
}
FRAMEWISE = "causal_forcing_framewise"
CHUNKS = 7


def load(folder: Path, family: str) -> tuple[ARVDPipeline, torch.Tensor]:
    """Load the small model of a family, and prompt embeddings."""
    folder = folder / MEMBERS.get(family, FRAMEWISE)
    transformer = CausalWanTransformer3DModel(**load_transformer_config(folder / "transformer_config.json"))
    transformer.load_state_dict(to_diffusers_keys(load_file(folder / "state_dict.safetensors")))
    fields = PRESETS[family].fields
    if fields.reencodes:  # the small models have no VAE
        fields = dataclasses.replace(fields, keep_first_frame=True)
    pipe = ARVDPipeline(transformer.eval(), **fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    inputs = load_file(folder / "inputs.safetensors")
    return pipe, inputs.get("prompt_embeds", inputs.get("prompt_embeds_a"))


def roll_out(pipe: ARVDPipeline, embeds: torch.Tensor, on_pass=None, seed: int = 0) -> torch.Tensor:
    """Generate the latents of `CHUNKS` chunks, `[1, C, F, 6, 8]`."""
    channels = pipe.transformer.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    frames = CHUNKS * pipe.config.num_frames_per_chunk
    noise = torch.randn(1, channels, frames, 6, 8, generator=generator)
    stream = pipe.stream(
        prompt_embeds=embeds, latents=noise, generator=generator, output_type="latent", on_pass=on_pass
    )
    return torch.cat([chunk.latents for chunk in stream], dim=2)


def quantized(pipe: ARVDPipeline, embeds: torch.Tensor, scheme: str) -> ARVDPipeline:
    """Return a quantized copy, calibrated on a rollout."""
    config = QARVDConfig(scheme, outlier_alignment=8, calibration_chunks=CHUNKS)
    result = calibrate(pipe.transformer, lambda on_pass: roll_out(pipe, embeds, on_pass), config)
    twin = copy.deepcopy(pipe)
    apply(twin.transformer, result)
    attach(twin.transformer, config)
    return twin


def main() -> None:
    """Print a table with a row per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    torch.set_num_threads(1)
    print("| family | passes of the first and of a later chunk | w8a8 | w4a8 |\n|---|---|---|---|")
    golden = parser.parse_args().golden
    for family in available():
        pipe, embeds = load(golden, family)
        infos = []
        want = roll_out(pipe, embeds, infos.append, seed=1)
        counts = Counter((info.chunk, info.role) for info in infos)
        passes = ", ".join(
            f"{counts[c, 'denoise']} + {counts[c, 'refresh'] + counts[c, 'rebuild']}" for c in (0, CHUNKS - 1)
        )
        errors = []
        for scheme in ("w8a8", "w4a8"):
            got = roll_out(quantized(pipe, embeds, scheme), embeds, seed=1)
            errors.append(f"{((got - want).norm() / want.norm()).item():.4f}")
        print(f"| `{family}` | {passes} | {errors[0]} | {errors[1]} |", flush=True)


if __name__ == "__main__":
    main()
