"""One bar over all of a calibration: its total is known before it begins, and every step is one of it."""

from __future__ import annotations

import re

import pytest

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.calibration import work_bar
from qarvd_diffusers.calibration.work_bar import WorkBar

LAYERS, GROUPS, PASSES = 22, 16, 2 * 2 * 5  # of the tiny pipeline; passes of two prompts, two chunks


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))


def config(scheme="w4a8", **options):
    prompts = ("a red circle", "a blue square")
    options = {"calibration_prompts": prompts, "calibration_chunks": 2, "outlier_alignment": 4} | options
    return QARVDConfig(scheme, **options)


def bars(text: str) -> list[str]:
    """The last state of every bar."""
    return [line.rpartition("\r")[2] for line in text.split("\n") if "\r" in line]


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (config("w8a8_dynamic"), LAYERS),
        (config("w8a8"), LAYERS + 2 * PASSES),
        (config("w8a8", outlier_detector="mad_zscore", activation="static"), LAYERS + PASSES),
        (config("w4a16"), LAYERS + PASSES + GROUPS),
        (config("w4a8"), LAYERS + 3 * PASSES + GROUPS),
        (config("w4a8", rounding_inputs="quantized"), LAYERS + (2 + 3) * PASSES + GROUPS),
        (config("w4a8", rounding="adaround", rounding_iterations=4), LAYERS + (2 + 3) * PASSES + 4 * GROUPS),
    ],
    ids=lambda value: f"{value.scheme}-{value.resolved_rounding}" if isinstance(value, QARVDConfig) else str(value),
)
def test_every_step_counts_towards_one_total(tiny_pipeline, capsys, config, total):
    tiny_pipeline.set_progress_bar_config(mininterval=0)
    capsys.readouterr()
    seen = []
    tiny_pipeline.calibrate(config, use_cache=False, progress=lambda *step: seen.append(step))
    assert [step[1:] for step in seen] == [(done, total) for done in range(1, total + 1)]
    (bar,) = bars(capsys.readouterr().err)
    assert f"{total}/{total}" in bar
    tiny_pipeline.set_progress_bar_config(disable=True)
    tiny_pipeline.calibrate(config, use_cache=False)
    assert capsys.readouterr().err == ""


def test_what_is_done_already_is_no_part_of_the_total(tiny_pipeline, tmp_path):
    seen = []

    def stop(text: str, step: int, steps: int) -> None:
        seen.append((step, steps))
        if text.startswith("rounding") and "blocks.1.attn1.to_q" in text:
            raise InterruptedError

    options = {"use_cache": False, "resume": tmp_path / "parts"}
    with pytest.raises(InterruptedError):
        tiny_pipeline.calibrate(config(), progress=stop, **options)
    stored = len(list((tmp_path / "parts").glob("*.safetensors"))) - 1  # one file holds the ranges
    assert 0 < stored < GROUPS
    seen.clear()
    tiny_pipeline.calibrate(config(), progress=lambda text, *step: seen.append(step), **options)
    total = PASSES + GROUPS - stored
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_sensitivity_counts_both_of_its_parts(tiny_pipeline, capsys):
    tiny_pipeline.set_progress_bar_config(mininterval=0)
    capsys.readouterr()
    tiny_pipeline.measure_sensitivity(config(), ["a red circle"])
    calibrating, measuring = bars(capsys.readouterr().err)
    assert f"{LAYERS + 2 * PASSES}/{LAYERS + 2 * PASSES}" in calibrating
    assert "measuring sensitivity" in measuring and "5/5" in measuring


def test_the_time_that_is_left_knows_kinds_of_steps(monkeypatch):
    """Ten seconds a pass, one a layer; of a kind that is still to come the mean of all steps."""
    clock = iter([0.0, 1.0, 2.0, 12.0, 22.0, 27.0])
    monkeypatch.setattr(work_bar.time, "perf_counter", lambda: next(clock))
    bar = WorkBar({"layer": 2, "pass": 4, "rounding": 3}, disable=True)
    assert bar.seconds_left is None
    left = []
    for kind in ("layer", "layer", "pass", "pass", "rounding"):
        bar.advance(kind, "")
        left.append(bar.seconds_left)
    assert left == [1 + 4 + 3, 0 + 4 + 3, 3 * 10 + 3 * 4, 2 * 10 + 3 * 5.5, 2 * 10 + 2 * 5]


def test_the_bar_shows_the_time_that_is_left(capsys, monkeypatch):
    clock = iter([0.0, 60.0, 120.0])
    monkeypatch.setattr(work_bar.time, "perf_counter", lambda: next(clock))
    with WorkBar({"layer": 2, "pass": 4}, desc="calibrating", mininterval=0) as bar:
        bar.advance("layer", "quantizing weights")
        bar.advance("layer", "quantizing weights")
    (shown,) = bars(capsys.readouterr().err)
    assert re.search(r"2/6 \[\d\d:\d\d<04:00, .*quantizing weights", shown)
