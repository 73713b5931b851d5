"""`qarvd sensitivity` and `qarvd evaluate`, from a float folder to a report."""

from __future__ import annotations

import json

import pytest

from qarvd_diffusers.cli import main

pytest.importorskip("matplotlib")


@pytest.fixture
def folder(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))
    tiny_pipeline.save_pretrained(tmp_path / "float")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    return tmp_path


def test_sensitivity_quantize_evaluate(folder, capsys):
    model, prompts = str(folder / "float"), str(folder / "prompts.txt")
    out, plot = str(folder / "s.json"), str(folder / "s.png")
    common = ["--num-chunks", "3", "--prompts", prompts]
    arguments = ["sensitivity", model, "--scheme", "w4a16", "--out", out, "--plot", plot, *common]
    assert main([*arguments, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert len(measured["chunk_weights"]) == 3 and measured["complete"] and (folder / "s.png").stat().st_size > 1000
    assert main(arguments) == 0
    assert "qarvd quantize MODEL OUT --sensitivity" in capsys.readouterr().out
    assert main([*arguments, "--seed", "5"]) == 1
    assert "s.json holds another measurement (seed: stored" in capsys.readouterr().err

    quantized = str(folder / "quantized")
    assert main(["quantize", model, quantized, "--scheme", "w4a16", "--sensitivity", out, "--evaluate", "0"]) == 0
    config = json.loads((folder / "quantized" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["chunk_weights"] == measured["chunk_weights"]
    capsys.readouterr()

    arguments = ["evaluate", model, quantized, "--out", str(folder / "report"), *common]
    assert main([*arguments, "--card", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("latent_mse", "psnr_db", "ssim", "flicker_error", "motion_energy_error"):
        assert len(report[name]) == 3 and (folder / "report" / f"{name}.png").exists()
    assert report["adherence"] is None and report["bytes"] < report["reference_bytes"]
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert "2 prompts, 3 chunks, seed 0" in (folder / "quantized" / "README.md").read_text()
    assert main(arguments) == 0
    assert "LPIPS" in capsys.readouterr().out


def test_bad_input(folder, capsys):
    model = str(folder / "float")
    (folder / "same.txt").write_text("a red circle\n" * 2)
    before = sorted(folder.iterdir())
    for arguments, message in (
        (
            ["sensitivity", model, "--prompts", str(folder / "same.txt"), "--out", str(folder / "x.json")],
            "are the same",
        ),
        (
            ["evaluate", model, model, "--prompts", str(folder / "prompts.txt"), "--out", str(folder / "r")],
            "FLOAT QUANTIZED",
        ),
        (["quantize", model, str(folder / "q"), "--sensitivity", str(folder / "no.json")], "no.json"),
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err
    assert sorted(folder.iterdir()) == before


def test_mixed_bits(folder, capsys):
    arguments = ["quantize", str(folder / "float"), str(folder / "q"), "--scheme", "w4a16", "--mixed-precision", "0.2"]
    arguments += ["--calibration-chunks", "2", "--evaluate", "0"]
    assert main([*arguments, "--calibration-prompts", str(folder / "prompts.txt")]) == 0
    config = json.loads((folder / "q" / "transformer" / "config.json").read_text())["quantization_config"]
    names = list(config["module_bits"])
    assert "8 bits: " in (shown := capsys.readouterr().out) and all(name in shown for name in names)
    assert {config["modules"][name]["weight_bits"] for name in names} == {8}
    assert main([*arguments, "--from-disk"]) == 1
    assert (
        "--mixed-precision runs the model, --from-disk does not: leave out one of the two" in capsys.readouterr().err
    )
