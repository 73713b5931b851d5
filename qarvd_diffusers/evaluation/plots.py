"""Draw plots as PNG files; matplotlib comes with the extra `bench`."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..calibration.sensitivity import SensitivityResult
from ..files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_matplotlib() -> bool:
    """Return whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise ImportError, with the remedy, if matplotlib is missing."""
    if not has_matplotlib():
        raise ImportError("plots need matplotlib: pip install matplotlib")


def plot_chunks(values: Sequence[float | None], path: str | os.PathLike[str], title: str, log: bool = False) -> None:
    """Plot one metric over chunks; missing and infinite values leave a gap. `log` applies if values differ tenfold."""
    figure, axes = _figure(title, len(values))
    finite = [math.nan if v is None or not math.isfinite(v) else v for v in values]
    axes.plot(range(len(values)), finite, marker="o", color="tab:blue")
    positive = [v for v in finite if v > 0]
    if log and positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
    _write(figure, path)


def plot_sensitivity(result: SensitivityResult, path: str | os.PathLike[str]) -> None:
    """Plot the sensitivity per chunk, of every prompt and on average, with the fitted exponential."""
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


def plot_outliers(layers: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw a bar per layer: the share of its input channels that are outliers.

    Args:
        layers: `name`, `shape` `[out, in]` and `outliers` of each.
        path: the PNG to write.
    """
    figure, axes = _empty_figure(9, 0.16 * len(layers) + 1.2)
    axes.barh([layer["name"] for layer in layers], [layer["outliers"] / layer["shape"][1] for layer in layers])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("share of input channels that are outliers")
    _write(figure, path)


def _empty_figure(width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure of inches, and its axes."""
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a backend for the whole process

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _figure(title: str, chunks: int) -> tuple[Figure, Any]:
    """Make a figure whose x axis counts chunks."""
    figure, axes = _empty_figure(5.6, 3.4)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("chunk")
    axes.set_xticks(range(chunks))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
