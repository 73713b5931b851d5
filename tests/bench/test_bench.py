"""The benchmark runs end to end at toy size, and what it reports is about the same computation."""

from __future__ import annotations

import json

import torch

from qarvd_diffusers.bench import VIDEO_VARIANTS
from qarvd_diffusers.bench.shapes import SHAPES, random_inputs, random_transformer
from qarvd_diffusers.bench.transformer import PassRunner, bench_passes
from qarvd_diffusers.cli import main

CPU = torch.device("cpu")


def test_variants_compute_the_same_pass():
    """Every variant's flow is the float model's up to its quantization, at every chunk."""
    names = ("bf16", "w8a8", "w4a8", "w8a8-attention8", "torchao-fp8")
    results = {one["name"]: one for one in bench_passes(SHAPES["toy"], names, CPU, chunks=(0, 2), repeats=1)}
    assert results["bf16"]["relative_error"] == {"1": 0.0, "3": 0.0}
    for chunk in ("1", "3"):
        eight, four = (results[name]["relative_error"][chunk] for name in ("w8a8", "w4a8"))
        assert 0 < eight < 0.05 and eight < four < 0.3
    assert all("ms" in results[name] for name in names[:4])
    # Without the package (or a GPU) a peer is reported as failed; it does not end the run.
    assert ("ms" in results["torchao-fp8"]) != ("error" in results["torchao-fp8"])


def test_planted_outliers_leave_the_function():
    flows = []
    for planted in (False, True):
        model = random_transformer(SHAPES["toy"], CPU, torch.float32, planted)
        latents, text = random_inputs(SHAPES["toy"], CPU, torch.float32)
        with torch.no_grad():
            flows.append(model(latents, torch.full((1,), 500.0), text, return_dict=False)[0])
    torch.testing.assert_close(*flows, atol=1e-4, rtol=1e-4)


def test_a_pass_repeats_itself():
    runner = PassRunner(random_transformer(SHAPES["toy"], CPU, torch.bfloat16), SHAPES["toy"])
    first = runner(0)
    assert torch.equal(runner(0), first)
    assert not torch.equal(runner(1), first)


def test_command(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["bench", "--shape", "toy", "--device", "cpu", "--repeats", "1", "--chunks", "1"]
    assert main([*arguments, "--variants", "bf16", "w8a8", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"gemm", "attention", "passes", "vae", "versions", "date", "command"} <= result.keys()
    assert "dual-scale int8" in capsys.readouterr().out


def test_whole_videos(tmp_path):
    out = tmp_path / "video.json"
    arguments = ["bench", "--shape", "toy", "--device", "cpu", "--end-to-end", "--frames", "21", "--out", str(out)]
    variants = ["bf16", "w8a8", "w8a8-attention8-overlap", "w4a8-attention8"]
    assert main([*arguments, "--variants", *variants]) == 0
    results = json.loads(out.read_text())["end_to_end"]
    assert [one["name"] for one in results] == variants
    for one in results:
        assert one["name"] in VIDEO_VARIANTS
        assert one["21"]["frames"] == 21
        assert one["21"]["first_frame_s"] < one["21"]["seconds"]
