"""Writing an evaluation down: report.json, a plot per metric, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serialization import atomic_file
from .fidelity import Rollout
from .pictures import write_video
from .plots import plot_chunks

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

# Key of a report -> title, what it means, whether its scale is logarithmic.
METRICS = {
    "latent_mse": ("Latent MSE", "mean squared difference of the latents; lower is better", True),
    "psnr_db": ("PSNR (dB)", "of the frames; higher is better", False),
    "ssim": ("SSIM", "structural similarity of the frames, 11 x 11 Gaussian window; 1 is equal", False),
    "flicker_error": (
        "Flicker error",
        "mean absolute difference of the changes from frame to frame; 0 is equal",
        False,
    ),
    "motion_energy_error": ("Motion-energy error", "relative difference of the mean squared frame change", False),
    "lpips": ("LPIPS", "distance of AlexNet features; lower is better", False),
}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } figure { margin: 0 } figcaption { color: #555; font-size: .9em }
.row { display: flex; flex-wrap: wrap; gap: 1em } .row > * { flex: 1 1 20em } video { width: 100%; image-rendering: pixelated }
.plots img { width: 100%; max-width: 36em }
"""


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    expected: Rollout,
    got: Rollout,
    prompts: Sequence[str],
    fps: int,
    max_videos: int = 4,
) -> dict[str, str]:
    """Write `report.json`, `METRIC.png` for every metric that was measured, and `report.html`.

    Args:
        folder: where to; made if it is not there, files of these names are replaced.
        report: what `fidelity.join` returned.
        expected: the float rollout.
        got: the quantized rollout.
        prompts: one per video.
        fps: of the videos in the page.
        max_videos: prompts whose videos are put into the page, from the first one on.

    Returns:
        Name -> path of the written files.
    """
    files = {"report": folder / REPORT_FILE}
    for name, (title, _, log) in METRICS.items():
        if report.get(name) is not None:
            files[name] = folder / f"{name}.png"
            plot_chunks(report[name], files[name], f"{title} per chunk", log)
    files["page"] = folder / PAGE_FILE
    plots = {name: files[name] for name in METRICS if name in files}
    videos = [(prompts[i], _mp4(expected, i, fps), _mp4(got, i, fps)) for i in range(min(max_videos, len(prompts)))]
    _write(files["report"], json.dumps(strict_json(report), indent=2, allow_nan=False))
    _write(files["page"], _page(report, plots, videos))
    return {name: str(path) for name, path in files.items()}


def strict_json(value: Any) -> Any:
    """The same JSON value with None for infinity and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _mp4(rollout: Rollout, prompt: int, fps: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(rollout.video(prompt), path, fps)
        return path.read_bytes()


def _page(report: Mapping[str, Any], plots: Mapping[str, Path], videos: Sequence[tuple[str, bytes, bytes]]) -> str:
    rows = "".join(
        f"<section><h3>{html.escape(prompt)}</h3><div class=row>{_video('float', a)}{_video('quantized', b)}</div></section>"
        for prompt, a, b in videos
    )
    figures = "".join(
        f"<figure><img alt='{METRICS[name][0]}' src='data:image/png;base64,{_base64(path.read_bytes())}'>"
        f"<figcaption>{METRICS[name][1]}</figcaption></figure>"
        for name, path in plots.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Quantized against float</title><style>{_STYLE}</style></head><body>
<h1>Quantized against float</h1>
<p>{report["prompts"]} prompts, {report["num_chunks"]} chunks, seed {report["seed"]}; both models got the same initial noise
and re-noise.</p>
{_models_table(report)}
<h2>Per chunk</h2>
{_chunks_table(report)}
<p>{html.escape(report.get("lpips_note", ""))}</p>
<div class="row plots">{figures}</div>
<h2>Videos</h2>
{rows}
</body></html>
"""


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _video(label: str, mp4: bytes) -> str:
    source = f"data:video/mp4;base64,{_base64(mp4)}"
    return (
        f"<figure><video src='{source}' controls loop muted autoplay></video><figcaption>{label}</figcaption></figure>"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _models_table(report: Mapping[str, Any]) -> str:
    lines = (
        ("transformer, bytes", "bytes", ",d"),
        ("seconds per chunk (median)", "seconds_per_chunk", ".3f"),
        ("seconds in all", "seconds", ".1f"),
        ("peak memory, bytes", "peak_memory_bytes", ",d"),
        ("prompt adherence", "adherence", ".1%"),
    )
    rows = "".join(
        f"<tr><td>{title}</td><td>{_number(report.get(f'reference_{key}'), form)}</td><td>{_number(report.get(key), form)}</td></tr>"
        for title, key, form in lines
    )
    return f"<table><tr><th></th><th>float</th><th>quantized</th></tr>{rows}</table>"


def _chunks_table(report: Mapping[str, Any]) -> str:
    measured = [name for name in METRICS if report.get(name) is not None]
    header = "".join(f"<th>{METRICS[name][0]}</th>" for name in measured)
    rows = "".join(
        f"<tr><td>{chunk}</td>"
        + "".join(f"<td>{_number(report[name][chunk], '.4g')}</td>" for name in measured)
        + "</tr>"
        for chunk in range(report["num_chunks"])
    )
    return f"<table><tr><th>chunk</th>{header}</tr>{rows}</table>"
