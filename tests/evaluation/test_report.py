"""From two pipelines to a report, its plots and its page."""

import base64
import json
import math
import re

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.calibration.sensitivity import SensitivityResult
from qarvd_diffusers.evaluation.fidelity import Rollout, compare, evaluate, join, roll_out
from qarvd_diffusers.evaluation.report import METRICS, strict_json, write_report
from qarvd_diffusers.hub.model_card import model_card

PROMPTS = ("a red circle", "a <blue> square & more")
DESCRIPTION = {"adherence": None, "bytes": 10, "seconds_per_chunk": 0.5, "seconds": 2.0, "peak_memory_bytes": 1000}
PER_CHUNK = (
    "psnr_db",
    "psnr_geometric_db",
    "psnr_worst_db",
    "psnr_interval_db",
    "latent_mse",
    "ssim",
    "flicker_error",
    "motion_energy_error",
)


def random_rollout(seed, noise=0):
    """Two prompts, two chunks of 3 frames, 24 x 32 pixels; `noise` of another seed on top."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 100)

    def chunk():
        frames = rng.integers(0, 200, (3, 24, 32, 3)) + other.integers(0, noise + 1, (3, 24, 32, 3))
        return frames.astype(np.uint8)

    frames = [[chunk(), chunk()] for _ in PROMPTS]
    latents = [[torch.from_numpy(c[:, :4, :4, 0].copy()).float() for c in video] for video in frames]
    return Rollout(latents, frames, [[1.0, 1.0]] * 2)


def test_compare_a_video_with_itself_and_with_a_noisy_one():
    same = compare(random_rollout(0), random_rollout(0))
    assert same["psnr_db"] == [math.inf] * 2 and same["latent_mse"] == [0, 0] and same["lpips"] is None
    assert same["flicker_error"] == same["motion_energy_error"] == [0, 0]
    assert same["ssim"] == pytest.approx([1, 1], abs=1e-6)
    noisy = compare(random_rollout(0), random_rollout(0, noise=40), lambda a, b: 0.25)
    assert all(0.5 < value < 1 for value in noisy["ssim"]) and noisy["lpips"] == [0.25, 0.25]
    # differences of two uniform numbers on 0..40, mean |d| = (n^2 - 1) / (3 n) for n = 41
    assert noisy["flicker_error"] == pytest.approx([(41**2 - 1) / (3 * 41) / 255] * 2, rel=0.05)


def test_evaluate_quantized_pipeline(tiny_pipeline, tmp_path):
    expected = roll_out(tiny_pipeline, PROMPTS, 2, seed=1)
    tiny_pipeline.quantize(QARVDConfig("w4a16"))
    report = evaluate(tiny_pipeline, tiny_pipeline, PROMPTS, num_chunks=2, seed=1)
    assert report["psnr_db"] == [math.inf] * 2, "a model against itself: the noise is the same"
    assert all(len(report[name]) == 2 for name in PER_CHUNK)
    assert (report["prompts"], report["num_chunks"], report["seed"]) == (2, 2, 1)
    assert report["reference_bytes"] == report["bytes"] and report["peak_memory_bytes"] > 1e8
    assert compare(expected, roll_out(tiny_pipeline, PROMPTS, 2, seed=1))["latent_mse"][0] > 0
    tiny_pipeline.save_pretrained(tmp_path / "q", report=strict_json(report))
    assert "| chunk | PSNR (dB) | SSIM | latent MSE |" in (tmp_path / "q" / "README.md").read_text()
    tiny_pipeline.write_card(tmp_path / "q", report | {"psnr_db": [30.0, 20.0]})
    assert "| 1 | 20.00 | 1.0000 |" in (tmp_path / "q" / "README.md").read_text()
    assert json.loads((tmp_path / "q" / "fidelity.json").read_text())["psnr_db"] == [30.0, 20.0]


def test_a_float_pipeline_has_no_card(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="this one is float"):
        tiny_pipeline.write_card(tmp_path)


def test_card_of_an_older_report():
    report = {"psnr_db": [30.0], "latent_mse": [0.5], "prompts": 1, "num_chunks": 1, "seed": 0, "adherence": None}
    card = str(model_card(QARVDConfig(), {"quantized": 1, "bfloat16": 2, "total": 3}, report))
    assert "| chunk | PSNR (dB) | latent MSE |\n|---|---|---|\n| 0 | 30.00 | 5.000e-01 |" in card


def test_written_report_stands_alone(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -e '.[test]'")
    expected, got = random_rollout(0), random_rollout(0, noise=40)
    report = join(expected, got, DESCRIPTION, DESCRIPTION, seed=5)
    report["psnr_db"][0] = math.inf
    files = write_report(tmp_path / "out", report, expected, got, PROMPTS, fps=8, max_videos=1)
    measured = [name for name in METRICS if report[name] is not None]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*(f"{name}.png" for name in measured), "report.json", "report.html"]
    )
    assert all(Image.open(files[name]).width > 300 for name in measured)
    stored = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert stored == strict_json(report) and stored["psnr_db"][0] is None
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r"src='([^']*)'", page)
    assert all(source.startswith("data:") for source in sources) and "http" not in re.sub(
        r"https?://\S+ is not at", "", page
    )
    videos = [base64.b64decode(s.partition(",")[2]) for s in sources if s.startswith("data:video/mp4")]
    assert len(videos) == 2
    for video in videos:
        (tmp_path / "x.mp4").write_bytes(video)
        assert sum(1 for _ in imageio.get_reader(tmp_path / "x.mp4").iter_data()) == 6
    assert "a red circle" in page and "1000" in page.replace(",", "")
    both = write_report(tmp_path / "two", report, expected, got, PROMPTS, fps=8, names=("float", "w4a8 <mine>"))
    page = (tmp_path / "two" / "report.html").read_text()
    assert "a &lt;blue&gt; square &amp; more" in page and "<th>w4a8 &lt;mine&gt;</th>" in page and both["page"]


def test_sensitivity_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -e '.[test]'")
    from qarvd_diffusers.evaluation.plots import plot_chunks, plot_sensitivity

    matrix = [[math.exp(-k) if k == c else 0.0 for c in range(4)] for k in range(4)]
    plot_sensitivity(SensitivityResult({}, 1, (3,) * 4).with_prompt(matrix), tmp_path / "s.png")
    plot_chunks([None, 0.0], tmp_path / "x.png", "nothing to draw", log=True)
    assert np.asarray(Image.open(tmp_path / "s.png").convert("L")).std() > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.png", "x.png"]
