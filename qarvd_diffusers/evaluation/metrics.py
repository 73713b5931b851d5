"""Compare videos by SSIM, temporal flicker, motion energy and LPIPS; they are uint8 `[frames, height, width, 3]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5  # pixels
_C1, _C2 = 0.01**2, 0.03**2  # for intensities in [0, 1]

# (frames of a, frames of b) -> mean distance
Distance = Callable[[np.ndarray, np.ndarray], float]


def ssim(reference: np.ndarray, frames: np.ndarray) -> float:
    """Compute the structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861), 1 for equal videos.

    The settings are the standard ones: a Gaussian window of 11 x 11 pixels and standard deviation 1.5 that lies inside
    the picture, `K1 = 0.01`, `K2 = 0.03`, population moments. The result is the mean over channels, pixels and frames.

    Raises:
        ValueError: shapes differ, or the frames are smaller than the window.
    """
    if reference.shape != frames.shape or min(frames.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"SSIM needs two videos of one shape, at least {_WINDOW} x {_WINDOW} pixels, got {reference.shape} and "
            f"{frames.shape}"
        )
    offsets = torch.arange(_WINDOW) - _WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = (window / window.sum()).tolist()
    # Frame by frame: the five filtered maps of a whole video would take too much memory.
    return float(np.mean([_ssim(_unit(a), _unit(b), window) for a, b in zip(reference, frames, strict=True)]))


def _unit(frame: np.ndarray) -> Tensor:
    """Convert uint8 `[H, W, 3]` to float32 `[3, H, W]` in [0, 1]."""
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255


def _blur(maps: Tensor, window: list[float], dim: int) -> Tensor:
    """Filter along `dim` by a sum of shifted maps, on the CPU several times faster than a convolution."""
    size = maps.shape[dim] - len(window) + 1
    total = maps.narrow(dim, 0, size) * window[0]
    for shift, weight in enumerate(window[1:], start=1):
        total.add_(maps.narrow(dim, shift, size), alpha=weight)
    return total


def _ssim(x: Tensor, y: Tensor, window: list[float]) -> float:
    """Compute the SSIM of two pictures, float32 `[3, H, W]`."""
    maps = _blur(_blur(torch.stack([x, y, x * x, y * y, x * y]), window, 3), window, 2)
    mean_x, mean_y = maps[0], maps[1]
    var_x, var_y, cov = maps[2] - mean_x**2, maps[3] - mean_y**2, maps[4] - mean_x * mean_y
    values = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
    return (values / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean().item()


def frame_changes(chunks: Sequence[np.ndarray], chunk: int) -> np.ndarray:
    """Compute the changes from frame to frame that end in `chunk`, float32 `[changes, height, width, 3]` in [-1, 1].

    The step from the last frame of the previous chunk is included, so that seams count.
    """
    frames = chunks[chunk] if chunk == 0 else np.concatenate([chunks[chunk - 1][-1:], chunks[chunk]])
    return np.diff(frames.astype(np.float32) / 255, axis=0)


def flicker_error(reference: np.ndarray, changes: np.ndarray) -> float:
    """Compute the mean absolute difference of two videos' frame changes, in units of full intensity.

    It measures how fast the difference of the videos changes: 0 if that difference is the same in every frame.
    """
    return float(np.abs(changes - reference).mean())


def motion_energy(changes: np.ndarray) -> float:
    """Compute the mean squared frame change: too low in a video that freezes, too high in one that trembles."""
    return float(np.square(changes, dtype=np.float64).mean())


def motion_energy_error(reference: Sequence[float], energies: Sequence[float]) -> float | None:
    """Sum absolute differences of motion energy over videos, relative to the reference's sum; None if that is 0."""
    total = sum(reference)
    return sum(abs(a - b) for a, b in zip(reference, energies, strict=True)) / total if total else None


def find_lpips() -> tuple[Distance | None, str]:
    """Find LPIPS on AlexNet features (Zhang et al. 2018, arXiv 1801.03924), if it needs no download.

    Returns:
        The distance, or None, and a sentence that says what was found or what is missing.
    """
    try:
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        return None, f"LPIPS was not measured: {error} (pip install torchmetrics torchvision)"
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name
    if not file.is_file():
        return None, f"LPIPS was not measured: {AlexNet_Weights.IMAGENET1K_V1.url} is not at {file}"

    def lpips(reference: np.ndarray, frames: np.ndarray) -> float:
        """Compute the mean distance over frames."""
        a, b = (torch.stack([_unit(frame) for frame in video]) for video in (reference, frames))
        with torch.no_grad():
            return float(distance(a, b, net_type="alex", normalize=True))

    return lpips, f"LPIPS by torchmetrics, AlexNet features from {file.name}"
