"""Fidelity of a quantized pipeline to its float model, per chunk, on identical initial noise and re-noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..serialization import stored_bytes

if TYPE_CHECKING:
    from ..pipelines.arvd_mixin import ARVDMixin

# (frames uint8 [F, H, W, 3], prompt) -> does the video show what the prompt asks for?
Judge = Callable[[np.ndarray, str], bool]


@dataclass
class Rollout:
    """One pipeline's videos of some prompts.

    Attributes:
        latents: per prompt and chunk, float32 `[C, F, H, W]`.
        frames: per prompt and chunk, uint8 `[frames, height, width, 3]`.
        seconds: per prompt and chunk, denoising and decoding.
    """

    latents: list[list[torch.Tensor]]
    frames: list[list[np.ndarray]]
    seconds: list[list[float]]

    def video(self, prompt: int) -> np.ndarray:
        """All frames of a prompt, uint8 `[frames, height, width, 3]`."""
        return np.concatenate(self.frames[prompt])


def roll_out(
    pipe: ARVDMixin,
    prompts: Sequence[str],
    num_chunks: int,
    seed: int = 0,
    on_chunk: Callable[[], Any] = lambda: None,
) -> Rollout:
    """Stream every prompt with its own seed; noise and re-noise depend on seed and prompt index alone, not on the model."""
    rollout = Rollout([], [], [])
    for index, prompt in enumerate(prompts):
        chunks = []
        generator = torch.Generator("cpu").manual_seed(seed + index)
        start = time.perf_counter()
        for chunk in pipe.stream(prompt, num_chunks=num_chunks, generator=generator, output_type="np"):
            now = time.perf_counter()
            chunks.append((chunk.latents[0].float().cpu(), to_uint8(chunk.frames[0]), now - start))
            start = now
            on_chunk()
        latents, frames, seconds = zip(*chunks, strict=True)
        rollout.latents.append(list(latents))
        rollout.frames.append(list(frames))
        rollout.seconds.append(list(seconds))
    return rollout


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] to uint8 of the same shape."""
    return (np.asarray(frames) * 255).round().clip(0, 255).astype(np.uint8)


def psnr_db(reference: Sequence[np.ndarray], frames: Sequence[np.ndarray]) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays, the squared error averaged over all of them; inf if equal."""
    errors = [
        np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2) for a, b in zip(reference, frames, strict=True)
    ]
    mse = float(np.mean(errors))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def compare(reference: Rollout, rollout: Rollout) -> dict[str, list[float]]:
    """Per chunk, over all prompts: `psnr_db` of the frames and `latent_mse`."""
    num_chunks = len(reference.frames[0])
    pairs = list(zip(reference.latents, rollout.latents, strict=True))
    return {
        "psnr_db": [
            psnr_db([video[c] for video in reference.frames], [video[c] for video in rollout.frames])
            for c in range(num_chunks)
        ],
        "latent_mse": [
            float(np.mean([torch.mean((a[c] - b[c]) ** 2).item() for a, b in pairs])) for c in range(num_chunks)
        ],
    }


def describe(pipe: ARVDMixin, rollout: Rollout, prompts: Sequence[str], judge: Judge | None) -> dict[str, Any]:
    """What one rollout says of its pipeline: bytes of the transformer, median seconds per chunk, adherence if judged."""
    sizes = stored_bytes(pipe.transformer)
    report: dict[str, Any] = {
        "bytes": sizes["total"],
        "quantized_layer_bytes": sizes["quantized"],
        "quantized_layer_bytes_as_bfloat16": sizes["bfloat16"],
        "seconds_per_chunk": float(np.median(rollout.seconds)),
        "adherence": None,
    }
    if judge is not None:
        report["adherence"] = float(np.mean([judge(rollout.video(i), prompt) for i, prompt in enumerate(prompts)]))
    return report


def evaluate(
    reference: ARVDMixin,
    pipe: ARVDMixin,
    prompts: Sequence[str],
    num_chunks: int = 7,
    seed: int = 0,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Compare a quantized pipeline with its float reference on identical noise.

    Args:
        reference: the float pipeline.
        pipe: the quantized pipeline.
        prompts: one video each.
        num_chunks: chunks per video.
        seed: prompt `i` draws its noise and re-noise from `seed + i`.
        judge: adherence of a finished video to its prompt; None where there is no such detector.

    Returns:
        `psnr_db` and `latent_mse` per chunk, `bytes`, `seconds_per_chunk`, `adherence` (share of prompts, or None),
        `reference_adherence`, and `prompts`, `num_chunks`, `seed` of the comparison.
    """
    expected, got = (roll_out(each, prompts, num_chunks, seed) for each in (reference, pipe))
    report = compare(expected, got) | describe(pipe, got, prompts, judge)
    report["reference_adherence"] = describe(reference, expected, prompts, judge)["adherence"]
    return report | {"prompts": len(prompts), "num_chunks": num_chunks, "seed": seed}
