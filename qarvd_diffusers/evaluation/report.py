"""Write an evaluation: report.json, a plot per metric, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files.atomic import atomic_file
from .fidelity import Rollout
from .pictures import write_video
from .plots import has_matplotlib, plot_chunks

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
NO_PLOTS = "No plots: they need matplotlib (pip install matplotlib)."


class Metric(NamedTuple):
    """Describe how a metric is shown: title, meaning, format of a number, and whether its plot may be logarithmic."""

    title: str
    meaning: str
    form: str
    log: bool = False


# By their keys in a report.
METRICS = {
    "latent_mse": Metric("Latent MSE", "mean squared difference of the latents; lower is better", ".3e", log=True),
    "psnr_db": Metric("PSNR (dB)", "of the frames, of the error's mean over prompts; higher is better", ".2f"),
    "psnr_geometric_db": Metric("PSNR, mean of prompts (dB)", "of the error's geometric mean over prompts", ".2f"),
    "psnr_worst_db": Metric("PSNR, worst prompt (dB)", "of the frames of the prompt that is worst there", ".2f"),
    "ssim": Metric("SSIM", "structural similarity of the frames, 11 x 11 Gaussian window; 1 is equal", ".4f"),
    "flicker_error": Metric(
        "Flicker error", "mean absolute difference of the changes from frame to frame; 0 is equal", ".4f"
    ),
    "motion_energy_error": Metric(
        "Motion-energy error", "relative difference of the mean squared frame change; 0 is equal", ".4f"
    ),
    "lpips": Metric("LPIPS", "distance of AlexNet features; lower is better", ".4f"),
}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } figure { margin: 0 } figcaption { color: #555; font-size: .9em }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20em, 100%), 1fr)); gap: 1em }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; max-width: 60em }
figcaption { overflow-wrap: anywhere }
video { width: 100%; image-rendering: pixelated } .plots img { width: 100% }
"""

# The two videos of a prompt play, pause and seek together, so that they can be compared frame by frame.
_SCRIPT = """
for (const pair of document.querySelectorAll(".pair")) {
  const [a, b] = pair.querySelectorAll("video");
  for (const [one, other] of [[a, b], [b, a]]) {
    const follow = () => { if (other.currentTime !== one.currentTime) other.currentTime = one.currentTime; };
    one.addEventListener("play", () => { if (other.paused) { follow(); other.play(); } });
    one.addEventListener("pause", () => { if (!other.paused) { other.pause(); follow(); } });
    one.addEventListener("seeked", () => { if (one.paused) follow(); });
  }
}
"""


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    expected: Rollout,
    got: Rollout,
    prompts: Sequence[str],
    fps: int,
    max_videos: int = 4,
    names: tuple[str, str] = ("float", "quantized"),
) -> dict[str, str]:
    """Write `report.json`, `METRIC.png` for every metric that was measured, and `report.html`.

    Without matplotlib there are no plots, and the page says so.

    Args:
        folder: where to write; created if missing, files of these names are replaced.
        report: what `fidelity.join` returned.
        expected: the rollout of the float model.
        got: the rollout of the quantized model.
        prompts: one per video.
        fps: frames per second of the videos in the page.
        max_videos: how many prompts, from the first one on, have their videos in the page.
        names: names of the two models in the page.

    Returns:
        Name -> path of the written files.
    """
    files = {"report": folder / REPORT_FILE}
    for name, metric in METRICS.items():
        if report.get(name) is not None and has_matplotlib():
            files[name] = folder / f"{name}.png"
            plot_chunks(report[name], files[name], f"{metric.title} per chunk", metric.log)
    files["page"] = folder / PAGE_FILE
    plots = {name: files[name] for name in METRICS if name in files}
    videos = [(prompts[i], _mp4(expected, i, fps), _mp4(got, i, fps)) for i in range(min(max_videos, len(prompts)))]
    _write(files["report"], json.dumps(strict_json(report), indent=2, allow_nan=False))
    _write(files["page"], _page(report, plots, videos, names))
    return {name: str(path) for name, path in files.items()}


def strict_json(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not have, by None in a JSON value."""
    if isinstance(value, Mapping):
        return {key: strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _mp4(rollout: Rollout, prompt: int, fps: int) -> bytes:
    """Encode the video of a prompt, by its index."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(rollout.video(prompt), path, fps)
        return path.read_bytes()


def _page(
    report: Mapping[str, Any],
    plots: Mapping[str, Path],  # empty without matplotlib
    videos: Sequence[tuple[str, bytes, bytes]],
    names: Sequence[str],
) -> str:
    """Build the page: tables, plots and videos, all inside one HTML text."""
    names = [html.escape(name) for name in names]
    rows = "".join(
        f"<section><h3>{html.escape(prompt)}</h3>"
        f"<div class=pair>{_video(names[0], a)}{_video(names[1], b)}</div></section>"
        for prompt, a, b in videos
    )
    figures = "".join(
        f"<figure><img alt='{METRICS[name].title}' src='data:image/png;base64,{_base64(path.read_bytes())}'>"
        f"<figcaption>{METRICS[name].meaning}</figcaption></figure>"
        for name, path in plots.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Quantized against float</title><style>{_STYLE}</style></head><body>
<h1>Quantized against float</h1>
<p>{report["prompts"]} prompts, {report["num_chunks"]} chunks, seed {report["seed"]}; both models got the same
initial noise and re-noise.</p>
{_models_table(report, names)}
<h2>Per chunk</h2>
{_chunks_table(report)}
<p>{html.escape(interval_note(report))}</p>
<p>{html.escape(report.get("lpips_note", ""))}</p>
{f"<div class='row plots'>{figures}</div>" if plots else f"<p>{NO_PLOTS}</p>"}
<h2>Videos</h2>
{rows}
<script>{_SCRIPT}</script>
</body></html>
"""


def _base64(data: bytes) -> str:
    """Encode bytes for a data URL."""
    return base64.b64encode(data).decode("ascii")


def _video(label: str, mp4: bytes) -> str:
    """Embed an MP4 file with its caption."""
    source = f"data:video/mp4;base64,{_base64(mp4)}"
    return (
        f"<figure><video src='{source}' controls loop muted autoplay></video><figcaption>{label}</figcaption></figure>"
    )


def format_number(value: float | None, form: str) -> str:
    """Format a number; None, a missing value, is empty."""
    return "" if value is None else format(value, form)


def interval_note(report: Mapping[str, Any]) -> str:
    """Say how far the PSNR of the last chunk depends on the choice of prompts; empty for reports of 0.1."""
    if not report.get("psnr_interval_db"):
        return ""
    low, high = (format_number(value, ".1f") or "infinity" for value in report["psnr_interval_db"][-1])
    return f"PSNR of the last chunk: 95 % of sets of prompts drawn from these give {low} to {high} dB."


def _models_table(report: Mapping[str, Any], names: Sequence[str]) -> str:
    """Compare the two models: bytes, seconds, memory, adherence."""
    lines = (
        ("transformer, bytes", "bytes", ",d"),
        ("seconds per chunk (median)", "seconds_per_chunk", ".3f"),
        ("seconds in total", "seconds", ".1f"),
        ("peak memory, bytes", "peak_memory_bytes", ",d"),
        ("prompt adherence", "adherence", ".1%"),
    )
    rows = "".join(
        f"<tr><td>{title}</td><td>{format_number(report.get(f'reference_{key}'), form)}</td>"
        f"<td>{format_number(report.get(key), form)}</td></tr>"
        for title, key, form in lines
        if report.get(key) is not None
    )
    return f"<table><tr><th></th><th>{names[0]}</th><th>{names[1]}</th></tr>{rows}</table>"


def _chunks_table(report: Mapping[str, Any]) -> str:
    """List the measured metrics, a row per chunk."""
    measured = {name: metric for name, metric in METRICS.items() if report.get(name) is not None}
    header = "".join(f"<th>{metric.title}</th>" for metric in measured.values())
    rows = "".join(
        f"<tr><td>{chunk}</td>"
        + "".join(f"<td>{format_number(report[name][chunk], metric.form)}</td>" for name, metric in measured.items())
        + "</tr>"
        for chunk in range(report["num_chunks"])
    )
    return f"<table><tr><th>chunk</th>{header}</tr>{rows}</table>"
