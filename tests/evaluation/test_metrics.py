"""Each metric against a value known otherwise: closed forms, and an independent implementation."""

import importlib.util
import math

import numpy as np
import pytest

from qarvd_diffusers.evaluation import metrics
from qarvd_diffusers.evaluation.fidelity import psnr_over_prompts


def pictures():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:56]
    clean = np.stack([127 + 90 * np.sin(x / 5 + k) * np.cos(y / (7 + k)) for k in range(3)], -1)
    noisy = clean + rng.normal(0, 12, clean.shape) + 6
    return [v.round().clip(0, 255).astype(np.uint8)[None] for v in (clean, noisy)]


def constant(value, frames=2):
    return np.full((frames, 16, 20, 3), value, np.uint8)


def test_ssim_of_an_independent_implementation():
    """scikit-image 0.25, structural_similarity with gaussian_weights=True, sigma=1.5, use_sample_covariance=False."""
    clean, noisy = pictures()
    assert (int(clean.sum()), int(noisy.sum())) == (857139, 897405), "the pictures the number was computed for"
    assert metrics.ssim(clean, noisy) == pytest.approx(0.7554063211, abs=2e-6)
    assert metrics.ssim(noisy, clean) == pytest.approx(metrics.ssim(clean, noisy))


def test_ssim_closed_forms():
    clean, noisy = pictures()
    assert metrics.ssim(clean, clean) == pytest.approx(1, abs=1e-6)
    a, b = 51 / 255, 102 / 255  # without structure only the luminance term is left
    want = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    assert metrics.ssim(constant(51), constant(102)) == pytest.approx(want, abs=1e-5)
    both = metrics.ssim(np.concatenate([clean, clean]), np.concatenate([clean, noisy]))
    assert both == pytest.approx((1 + metrics.ssim(clean, noisy)) / 2)


def test_ssim_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="at least 11 x 11 pixels"):
        metrics.ssim(np.zeros((1, 8, 20, 3), np.uint8), np.zeros((1, 8, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="videos of one shape"):
        metrics.ssim(constant(0, 1), constant(0, 2))


def ramp(*levels):
    return np.concatenate([constant(level, 1) for level in levels])


def test_frame_changes_count_the_seam():
    chunks = [ramp(0, 51), ramp(102, 102)]
    assert metrics.frame_changes(chunks, 0)[:, 0, 0, 0] == pytest.approx([0.2])
    assert metrics.frame_changes(chunks, 1)[:, 0, 0, 0] == pytest.approx([0.2, 0])
    assert metrics.frame_changes([ramp(7)], 0).shape == (0, 16, 20, 3)


def test_flicker_and_motion_energy():
    steady, shifted, trembling = (
        metrics.frame_changes([ramp(*levels)], 0) for levels in ((0, 51, 102), (51, 102, 153), (0, 102, 102))
    )
    assert metrics.flicker_error(steady, shifted) == pytest.approx(0, abs=1e-7), "a constant error does not flicker"
    assert metrics.flicker_error(steady, trembling) == pytest.approx(0.2)
    energies = [metrics.motion_energy(v) for v in (steady, trembling)]
    assert energies == pytest.approx([0.04, 0.08])
    assert metrics.motion_energy_error([0.04, 0.04], [0.08, 0.02]) == pytest.approx(0.06 / 0.08)
    assert metrics.motion_energy_error([0.0], [0.5]) is None


def test_lpips_says_why_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    distance, note = metrics.find_lpips()
    assert distance is None
    missing = [name for name in ("torchmetrics", "torchvision") if importlib.util.find_spec(name) is None]
    assert note.startswith("LPIPS was not measured: ") and (missing[0] if missing else str(tmp_path)) in note


def test_psnr_over_prompts():
    """Errors of 1 and 100 differ by 20 dB: their mean is near the worse one, the geometric mean in the middle."""
    best = 10 * math.log10(255**2)
    summary = psnr_over_prompts([1.0, 100.0])
    assert summary["psnr_db"] == pytest.approx(best - 10 * math.log10(50.5))
    assert summary["psnr_geometric_db"] == pytest.approx(best - 10)
    assert summary["psnr_worst_db"] == pytest.approx(best - 20)
    assert summary["psnr_interval_db"] == pytest.approx([best - 20, best])
    assert psnr_over_prompts([4.0] * 9)["psnr_interval_db"] == pytest.approx([best - 10 * math.log10(4)] * 2)
    assert psnr_over_prompts([0.0])["psnr_db"] == math.inf


def test_interval_of_many_prompts():
    """The bootstrap of a mean of n errors gives its standard error: 1.96 times std / sqrt(n) either way."""
    errors = np.random.default_rng(1).gamma(4.0, size=400)
    low, high = (255**2 / 10 ** (db / 10) for db in psnr_over_prompts(errors)["psnr_interval_db"][::-1])
    half = 1.96 * errors.std() / 20
    assert (low, high) == pytest.approx((errors.mean() - half, errors.mean() + half), rel=0.01)
