"""Every shipped workflow, submitted as a newcomer would run it: on the bundled model, on the CPU."""

from __future__ import annotations

import imageio.v3 as imageio
import numpy as np
import pytest
import workflows
from graphs import read_video
from make_examples import EXAMPLES, MOVING, PROMPT

from qarvd_diffusers.evaluation.moving_shapes import adherence

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(server, nodes):
    """Runs an example once, and what it needs before."""
    runs = {}

    def run(name):
        if name == "stream":
            run("quantize")
        if name not in runs:
            runs[name] = server.run(workflows.to_prompt(workflows.load(name), nodes))
            assert runs[name].status == "success", runs[name].error
        return runs[name]

    return run


def test_every_example_is_written_and_has_a_picture():
    files = {path.stem for path in workflows.EXAMPLES.glob("*.json")}
    assert files == set(EXAMPLES)
    assert {path.stem for path in workflows.EXAMPLES.glob("*.jpg")} == files


def test_quantize(server, done):
    run = done("quantize")
    assert (server.base / "output" / "qarvd" / "tiny-w4a8" / "model_index.json").is_file()
    assert "0.314 of bfloat16" in run.text("5")


def test_stream_from_the_quantized_model(server, done):
    run = done("stream")
    video = read_video(server.files(run, "4")[0])
    assert video.shape == (81, 64, 64, 3) and video.mean() > 10
    assert adherence(video, PROMPT).correct
    assert len(run.of("qarvd.chunk")) == 7


def test_image_to_video(server, done):
    """Starts with the given pictures and goes on as the prompt says."""
    run = done("image_to_video")
    video = read_video(server.files(run, "6")[0])
    given = server.files(run, "4")
    assert video.shape == (81, 64, 64, 3) and len(given) == 9
    for frame, path in zip(video, given, strict=False):
        assert np.abs(frame.astype(int) - imageio.imread(path)[..., :3]).mean() < 6
    assert adherence(video, MOVING).correct


def test_compare(server, done):
    run = done("compare")
    rows = run.text("7").splitlines()
    assert rows[0].split() == ["chunk", "PSNR", "(dB)", "SSIM"]
    psnr = [float(row.split()[1]) for row in rows[1:]]
    assert len(psnr) == 5 and min(psnr) > 22
    video = read_video(server.files(run, "9")[0])
    assert video.shape == (45, 284, 768, 3)
