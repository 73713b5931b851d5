"""Measure the fidelity of a quantized pipeline to its float model, per chunk, on identical noise and re-noise."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..quantization.model import stored_bytes
from . import metrics

if TYPE_CHECKING:
    from ..pipelines.arvd_mixin import ARVDMixin

_RESAMPLES = 2000

# (frames uint8 [F, H, W, 3], prompt) -> whether the video shows what the prompt says
Judge = Callable[[np.ndarray, str], bool]


@dataclass
class Rollout:
    """Hold the videos of one pipeline.

    Attributes:
        latents: per prompt and chunk, float32 `[C, F, H, W]`.
        frames: per prompt and chunk, uint8 `[frames, height, width, 3]`.
        seconds: per prompt and chunk, denoising and decoding.
        peak_memory_bytes: on a GPU, peak allocated memory during the rollouts; on the CPU, peak resident memory of the
            process since its start; None if the system does not report it.
    """

    latents: list[list[torch.Tensor]]
    frames: list[list[np.ndarray]]
    seconds: list[list[float]]
    peak_memory_bytes: int | None = None

    def video(self, prompt: int) -> np.ndarray:
        """Return all frames of a prompt, uint8 `[frames, height, width, 3]`."""
        return np.concatenate(self.frames[prompt])


def roll_out(
    pipe: ARVDMixin,
    prompts: Sequence[str],
    num_chunks: int,
    seed: int = 0,
    on_chunk: Callable[[], Any] = lambda: None,
) -> Rollout:
    """Stream every prompt with its own seed: noise and re-noise depend on `seed` and the prompt's index only."""
    rollout = Rollout([], [], [])
    if on_gpu := torch.cuda.is_available() and pipe.transformer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
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
    rollout.peak_memory_bytes = torch.cuda.max_memory_allocated() if on_gpu else resident_peak()
    return rollout


def resident_peak() -> int | None:
    """Return the peak resident memory of this process in bytes; None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Convert frames in [0, 1] to uint8 of the same shape."""
    return (np.asarray(frames) * 255).round().clip(0, 255).astype(np.uint8)


def psnr_db(reference: Sequence[np.ndarray], frames: Sequence[np.ndarray]) -> float:
    """Compute the PSNR in dB of uint8 arrays, with the squared error averaged over all arrays; inf if equal."""
    return _decibels(np.mean([_squared_error(a, b) for a, b in zip(reference, frames, strict=True)]))


def _squared_error(reference: np.ndarray, frames: np.ndarray) -> float:
    """Compute the mean squared difference of two uint8 arrays."""
    return float(np.mean((reference.astype(np.float64) - frames.astype(np.float64)) ** 2))


def _decibels(squared_error: float) -> float:
    """Convert a mean squared error of uint8 frames to PSNR."""
    return math.inf if squared_error == 0 else 10 * math.log10(255**2 / squared_error)


def psnr_over_prompts(squared_errors: Sequence[float]) -> dict[str, Any]:
    """Summarize the errors of several prompts; a mean over prompts is often carried by a few of them.

    Args:
        squared_errors: of the uint8 frames, one per prompt.

    Returns:
        In dB: `psnr_db` of the mean error, `psnr_geometric_db` of its geometric mean (the mean of the prompts' PSNR),
        `psnr_worst_db` of the worst prompt, and `psnr_interval_db`, the middle 95 % of `psnr_db` over 2000 sets of as
        many prompts drawn with replacement (the bootstrap, Efron 1979, doi:10.1214/aos/1176344552).
    """
    errors = np.asarray(squared_errors, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(errors), size=(_RESAMPLES, len(errors)))
    high, low = np.quantile(errors[drawn].mean(axis=1), (0.025, 0.975))
    return {
        "psnr_db": _decibels(errors.mean()),
        "psnr_geometric_db": float(np.mean([_decibels(error) for error in errors])),
        "psnr_worst_db": _decibels(errors.max()),
        "psnr_interval_db": [_decibels(low), _decibels(high)],
    }


def compare(reference: Rollout, rollout: Rollout, lpips: metrics.Distance | None = None) -> dict[str, Any]:
    """Compute every metric per chunk, over all prompts.

    Returns:
        Those of `psnr_over_prompts`, `ssim` of the frames, `latent_mse`, `flicker_error` and `motion_energy_error`
        (see `metrics`; None for a single-frame chunk, or if nothing moves) and `lpips` (None without `lpips`).
    """
    chunks = range(len(reference.frames[0]))
    latents = list(zip(reference.latents, rollout.latents, strict=True))
    videos = list(zip(reference.frames, rollout.frames, strict=True))
    psnr = [psnr_over_prompts([_squared_error(a[c], b[c]) for a, b in videos]) for c in chunks]
    report: dict[str, Any] = {name: [chunk[name] for chunk in psnr] for name in psnr[0]} | {
        "latent_mse": [float(np.mean([torch.mean((a[c] - b[c]) ** 2).item() for a, b in latents])) for c in chunks],
        "ssim": [float(np.mean([metrics.ssim(a[c], b[c]) for a, b in videos])) for c in chunks],
        "lpips": lpips and [float(np.mean([lpips(a[c], b[c]) for a, b in videos])) for c in chunks],
        "flicker_error": [],
        "motion_energy_error": [],
    }
    for c in chunks:
        changes = [(metrics.frame_changes(a, c), metrics.frame_changes(b, c)) for a, b in videos]
        flicker = energy = None
        if len(changes[0][0]):
            flicker = float(np.mean([metrics.flicker_error(a, b) for a, b in changes]))
            energy = metrics.motion_energy_error(*([metrics.motion_energy(v[i]) for v in changes] for i in (0, 1)))
        report["flicker_error"].append(flicker)
        report["motion_energy_error"].append(energy)
    return report


def describe(pipe: ARVDMixin, rollout: Rollout, prompts: Sequence[str], judge: Judge | None) -> dict[str, Any]:
    """Report the pipeline's part of a rollout: bytes of the transformer, seconds, peak memory, adherence if judged."""
    sizes = stored_bytes(pipe.transformer)
    report: dict[str, Any] = {
        "bytes": sizes["total"],
        "quantized_layer_bytes": sizes["quantized"],
        "quantized_layer_bytes_as_bfloat16": sizes["bfloat16"],
        "seconds_per_chunk": float(np.median(rollout.seconds)),
        "seconds": float(np.sum(rollout.seconds)),
        "peak_memory_bytes": rollout.peak_memory_bytes,
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
        judge: decides whether a finished video shows its prompt; None skips adherence.

    Returns:
        See `join`.
    """
    expected, got = (roll_out(model, prompts, num_chunks, seed) for model in (reference, pipe))
    described = (describe(reference, expected, prompts, judge), describe(pipe, got, prompts, judge))
    return join(expected, got, *described, seed)


def join(
    expected: Rollout, got: Rollout, of_reference: dict[str, Any], of_pipe: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Build the report of two rollouts on identical noise; the two models need not be in memory together.

    Returns:
        The metrics of `compare` per chunk; what `describe` reports for the quantized pipeline and, as `reference_*`,
        for the float one; `lpips_note` (why LPIPS was measured or not); `prompts`, `num_chunks`, `seed`.
    """
    lpips, note = metrics.find_lpips()
    report = compare(expected, got, lpips) | of_pipe
    for name in ("adherence", "bytes", "seconds_per_chunk", "seconds", "peak_memory_bytes"):
        report[f"reference_{name}"] = of_reference[name]
    counts = {"prompts": len(got.frames), "num_chunks": len(got.frames[0]), "seed": seed}
    return report | {"lpips_note": note} | counts
