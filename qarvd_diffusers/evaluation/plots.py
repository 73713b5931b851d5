"""Plots as PNG files; matplotlib comes with the extra `bench`."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..calibration.sensitivity import SensitivityResult
from ..files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises ImportError, with the remedy, where matplotlib is missing."""
    if not has_matplotlib():
        raise ImportError("plots need matplotlib: pip install matplotlib")


def plot_chunks(values: Sequence[float | None], path: str | os.PathLike[str], title: str, log: bool = False) -> None:
    """One metric over chunks; missing and infinite values leave a gap. `log` takes effect from a factor of ten on."""
    figure, axes = _figure(title, len(values))
    finite = [math.nan if v is None or not math.isfinite(v) else v for v in values]
    axes.plot(range(len(values)), finite, marker="o", color="tab:blue")
    positive = [v for v in finite if v > 0]
    if log and positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
    _write(figure, path)


def plot_sensitivity(result: SensitivityResult, path: str | os.PathLike[str]) -> None:
    """Sensitivity per chunk, of every prompt and on average, with the fitted exponential."""
    mean = result.sensitivity
    figure, axes = _figure("error of the whole video when one chunk is quantized", len(mean))
    for matrix in result.errors:
        single = SensitivityResult({}, 1, result.frames, (matrix,)).sensitivity
        axes.plot(range(len(single)), single, color="tab:gray", alpha=0.35, linewidth=0.8)
    axes.plot([], [], color="tab:gray", alpha=0.5, linewidth=0.8, label="single prompts")
    axes.plot(range(len(mean)), mean, marker="o", color="tab:blue", label=f"mean of {len(result.errors)} prompts")
    if (decay := result.decay) is not None:
        fitted = [decay.amplitude * math.exp(-decay.rate * k) for k in range(len(mean))]
        label = f"{decay.amplitude:.2g} exp(-{decay.rate:.2f} k), $R^2$ = {decay.r_squared:.3f}".replace("--", "")
        axes.plot(range(len(mean)), fitted, linestyle="--", color="tab:orange", label=label)
    axes.set_ylabel("mean squared latent error")
    axes.set_xlabel("quantized chunk k")
    if min(mean) > 0:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    _write(figure, path)


def _figure(title: str, chunks: int) -> tuple[Figure, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a backend for the whole process

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("chunk")
    axes.set_xticks(range(chunks))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
