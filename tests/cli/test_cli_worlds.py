"""Commands that steer: a file of controls, lines while the video runs, and what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_pipeline import build_world

from qarvd_diffusers.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of a world model, a picture, and controls for two chunks."""
    folder = tmp_path_factory.mktemp("world")
    pipe = build_world()
    pipe.register_to_config(height=32, width=48)
    pipe.save_pretrained(folder / "model")
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(folder / "a.png")
    lines = [{"keys": "w", "event": "a blue square moves left"}, {"keys": "w arrowleft"}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def generate(files, out, *options, chunks=2):
    arguments = ["generate", str(files / "model"), "--prompt", "a red circle", "--num-chunks", str(chunks)]
    return main(
        [*arguments, "--device", "cpu", "--image", str(files / "a.png"), "--out", str(out), *options, "--json"]
    )


def test_a_file_of_controls(files, tmp_path, capsys):
    sizes = {}
    for name, options in {"still": [], "steered": ["--controls", str(files / "c.jsonl")]}.items():
        assert generate(files, tmp_path / f"{name}.webp", *options) == 0
        sizes[name] = (tmp_path / f"{name}.webp").read_bytes()
    assert sizes["still"] != sizes["steered"]
    assert '"frames": 21' in capsys.readouterr().out


def test_lines_while_it_runs(files, tmp_path, capsys, monkeypatch):
    """A line that cannot be read is reported, and the video goes on."""
    monkeypatch.setattr("sys.stdin", io.StringIO('{"keys": "x"}\n\n{"keys": "w"}\n'))
    assert generate(files, tmp_path / "live.webp", "--controls", "-", chunks=4) == 0
    assert "standard input, line 1: keys are 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--controls", "missing.jsonl"], "missing.jsonl"),
        (["--controls", "{c}", "--num-chunks", "1"], "has controls for chunk 1, the video has 1 chunks"),
        (["--controls", "-", "--prompts", "x.txt"], "not allowed with"),
    ],
)
def test_refused(files, tmp_path, capsys, options, message):
    options = [option.replace("{c}", str(files / "c.jsonl")) for option in options]
    try:
        assert generate(files, tmp_path / "out.webp", *options) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.webp").exists()


def test_a_model_that_takes_no_controls(files, tmp_path, capsys):
    arguments = ["generate", "bundled", "--prompt", "a red circle", "--num-chunks", "2", "--device", "cpu"]
    assert main([*arguments, "--controls", str(files / "c.jsonl"), "--out", str(tmp_path / "a.webp")]) == 1
    assert "this model takes none" in capsys.readouterr().err


def test_quantize_on_steered_rollouts(files, tmp_path):
    start = ["--image", str(files / "a.png"), "--controls", str(files / "c.jsonl")]
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    arguments = ["quantize", str(files / "model"), str(tmp_path / "out"), "--scheme", "w8a8", "--device", "cpu"]
    calibration = [
        "--calibration-chunks",
        "2",
        "--calibration-prompts",
        str(tmp_path / "prompts.txt"),
        "--rounding",
        "nearest",
    ]
    assert main([*arguments, *calibration, *start]) == 0
    assert main(["plan", str(tmp_path / "out")]) == 0
    assert generate(files, tmp_path / "float.webp") == 0
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "WorldWanTransformer3DModel" and "quantization_config" in config
    assert not [name for name in config["quantization_config"]["modules"] if "injector" in name]
    assert torch.get_num_threads() >= 1
