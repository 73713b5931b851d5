"""The `qarvd` command as users run it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from qarvd_diffusers.cli import main


def qarvd(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qarvd_diffusers", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    """6 GB; w8a8 within 30 dB and 2 points of adherence; bytes as promised."""
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))
    result = qarvd("demo", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert set(report) == {"float", "w8a8", "w4a8", "files"}
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 <= 6e9
    assert len(report["w8a8"]["psnr_db"]) == 7 and min(report["w8a8"]["psnr_db"]) >= 30
    assert report["w8a8"]["adherence"] >= report["float"]["adherence"] - 0.02
    assert report["w8a8"]["bytes"] <= 0.56 * report["float"]["bytes"]
    assert report["w4a8"]["bytes"] <= 0.33 * report["float"]["bytes"]
    files = {name: tmp_path / path for name, path in report["files"].items()}
    assert all(path.exists() for path in files.values())
    for name in ("float_video", "w8a8_video", "w4a8_video"):
        frames = np.stack(imageio.mimread(files[name]))
        assert len(frames) == 81 and frames.std() > 10, "81 frames, not blank"
    sheet = Image.open(files["contact_sheet"])
    assert sheet.width > 7 * 64 and sheet.height > 3 * 64
    assert json.loads(files["report"].read_text()) == report


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] and report["operators"]
    assert all(operator["implementation"] and all(operator["refused"].values()) for operator in report["operators"])
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_inspect_float_and_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["inspect", "bundled", "--json", "--plot", str(tmp_path / "x.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] is None and report["bytes"]["quantized"] == 0
    assert len(report["layers"]) % 10 == 2
    assert Image.open(tmp_path / "x.png").width > 100


def test_quantize_generate_inspect(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))
    from qarvd_diffusers.bundled import bundled_model_path

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle moving left on a black background\n")
    out = str(tmp_path / "out")
    arguments = ["--scheme", "w4a8", "--calibration-prompts", str(prompts), "--calibration-chunks", "2", "--json"]
    assert main(["quantize", bundled_model_path(), out, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["report"]["psnr_db"]) == 2 == report["report"]["num_chunks"]
    assert (
        report["report"]["reference_bytes"] > report["report"]["bytes"]
        and report["sizes"]["quantized"] < report["sizes"]["bfloat16"] / 3
    )
    assert "4-bit weights" in (tmp_path / "out" / "README.md").read_text()
    video = str(tmp_path / "x.mp4")
    prompt = prompts.read_text().strip()
    assert main(["generate", out, "--prompt", prompt, "--num-chunks", "2", "--out", video, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 21 == len(imageio.mimread(video))
    assert main(["inspect", out, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["weight_bits"] for layer in layers} == {4}
    assert main(["inspect", out]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{tmp}/nothing", "{tmp}/out"], "nothing"),
        (["quantize", "bundled", "{tmp}/out", "--calibration-prompts", "{tmp}/empty.txt"], "empty.txt"),
        (["convert", "{tmp}/broken.pt", "{tmp}/out"], "broken.pt"),
        (["generate", "{tmp}/nothing", "--prompt", "a", "--out", "{tmp}/x.mp4"], "nothing"),
        (["inspect", "{tmp}/nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_leaves_nothing(capsys, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("# no prompt\n")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    before = sorted(tmp_path.iterdir())
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert sorted(tmp_path.iterdir()) == before
