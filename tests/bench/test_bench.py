"""The benchmark runs end to end at toy size, and what it reports is about the same computation."""

from __future__ import annotations

import json
import time

import pytest
import torch

from qarvd_diffusers.bench import VIDEO_VARIANTS
from qarvd_diffusers.bench.breakdown import summarize
from qarvd_diffusers.bench.shapes import SHAPES, random_inputs, random_transformer
from qarvd_diffusers.bench.timing import median_ms
from qarvd_diffusers.bench.transformer import PassRunner, bench_passes
from qarvd_diffusers.cli import main

CPU = torch.device("cpu")


def test_variants_compute_the_same_pass():
    """Every variant's flow is the float model's up to its quantization, at every chunk."""
    names = ("bf16", "w8a8", "w4a8", "w8a8-int8", "torchao-fp8")
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
    arguments = ["bench", "--shape", "toy", "--device", "cpu", "--repeats", "1", "--at-chunks", "1"]
    assert main([*arguments, "--variants", "bf16", "w8a8", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"gemm", "attention", "passes", "vae", "versions", "date", "command"} <= result.keys()
    assert list(result["passes"][0]["ms"]) == ["1"]
    printed = capsys.readouterr().out
    assert "dual-scale int8" in printed
    assert "gemm of 18 rows, microseconds" in printed and "attention of 18 queries, microseconds" in printed


def test_passes_of_a_world(tmp_path, capsys):
    """With picture and camera; whole videos of one are refused by name."""
    out = tmp_path / "world.json"
    arguments = ["bench", "--shape", "toy-world", "--device", "cpu"]
    variants = ["bf16", "w8a8", "w8a8-int8"]
    passes = ["--parts", "passes", "--repeats", "1", "--at-chunks", "2", "--variants", *variants, "--out", str(out)]
    assert main([*arguments, *passes]) == 0
    rows = json.loads(out.read_text())["passes"]
    assert [row["name"] for row in rows] == variants and all(row["relative_error"]["2"] < 0.1 for row in rows)
    assert main([*arguments, "--end-to-end"]) == 1
    assert "toy-world from a picture: time its --parts passes" in capsys.readouterr().err


@pytest.mark.parametrize("frames", (1, 2))
def test_chunks_of_other_lengths(frames, tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["bench", "--shape", "toy", "--device", "cpu", "--frames-per-chunk", str(frames), "--out", str(out)]
    assert main([*arguments, "--repeats", "1", "--parts", "passes", "--variants", "bf16", "w8a8"]) == 0
    float_pass, ours = json.loads(out.read_text())["passes"]
    assert list(float_pass["ms"]) == list(ours["ms"]) == {1: ["3", "12", "21"], 2: ["1", "6", "10"]}[frames]
    assert all(0 < error < 0.05 for error in ours["relative_error"].values())
    assert main([*arguments, "--end-to-end", "--variants", "w8a8", "--frames", str(20 * frames - 3)]) == 0
    timed = json.loads(out.read_text())["end_to_end"][0][str(20 * frames - 3)]
    assert timed["frames"] == 20 * frames - 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames-per-chunk", "0"], "--frames-per-chunk: is 0, expected a whole number, at least 1"),
        (["--frames-per-chunk", "22"], "--frames-per-chunk is 22, expected 1 to 21"),
        (["--frames-per-chunk", "2", "--end-to-end", "--frames", "25"], "expected a multiple of 8 less 3, such as 53"),
        (["--end-to-end", "--frames", "80"], "does not fill chunks of 3 latent frames"),
    ],
)
def test_lengths_that_cannot_be(arguments, message, capsys):
    try:
        assert main(["bench", "--shape", "toy", "--device", "cpu", *arguments]) == 1
    except SystemExit as exit:
        assert exit.code == 2  # argparse: a value that cannot be read
    assert message in capsys.readouterr().err


def test_breakdown_sorts_kernels():
    kernels = [
        ("void qarvd::gemm_kernel<224, 64, (qarvd::Output)0>(qarvd::Maps)", 120, 4.0),
        ("void qarvd::gemm_kernel<256, 64, (qarvd::Output)2>(qarvd::Maps)", 30, 5.0),
        ("void (anonymous namespace)::rows_kernel<__nv_bfloat16, ((anonymous namespace)::Kind)2>()", 89, 2.0),
        ("void (anonymous namespace)::rows_kernel<__nv_bfloat16, ((anonymous namespace)::Kind)0>()", 60, 0.5),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<>>>()", 60, 45.0),
        ("Memcpy DtoD", 3, 0.25),
    ]
    rows = summarize(kernels, SHAPES["1.3b"], 7 * 4680, False, "NVIDIA H200")
    by_name = {row["operation"]: row for row in rows}
    assert sum(row["ms"] for row in rows) == 56.75
    assert by_name["the rest"] == {"operation": "the rest", "calls": 3, "ms": 0.25}
    up = by_name["FFN-up with GELU to int8"]
    assert up["floor_ms"] == pytest.approx(2 * 4680 * 1536 * 8960 * 30 / 1979e12 * 1000)
    attention = by_name["attention to the cache and to the prompt"]
    assert attention["floor_ms"] == pytest.approx(4 * 4680 * (32760 + 512) * 1536 * 30 / 989e12 * 1000)
    assert 0.3 < by_name["residual + norm + modulation to int8"]["floor_ms"] / 2.0 < 1
    assert all("floor_ms" not in row for row in summarize(kernels, SHAPES["1.3b"], 4680, False, "another GPU"))


def test_a_variant_that_takes_too_long_is_given_up():
    (result,) = bench_passes(SHAPES["toy"], ("w8a8",), CPU, chunks=(0,), repeats=1, seconds=0.01)
    assert result["error"] == "TimeoutError: not done within 0.01 s"


def test_whole_videos(tmp_path):
    out = tmp_path / "video.json"
    arguments = ["bench", "--shape", "toy", "--device", "cpu", "--end-to-end", "--frames", "21", "--out", str(out)]
    variants = ["bf16", "w8a8", "w8a8-int8-overlap", "w4a8-int8"]
    assert main([*arguments, "--variants", *variants]) == 0
    results = json.loads(out.read_text())["end_to_end"]
    assert [one["name"] for one in results] == variants
    for one in results:
        assert one["name"] in VIDEO_VARIANTS
        assert one["21"]["frames"] == 21
        assert one["21"]["first_frame_s"] < one["21"]["seconds"]


@pytest.mark.gpu
def test_a_kernel_is_timed_without_the_wait_for_its_launch():
    numbers = torch.zeros(8, device="cuda")

    def launch():
        time.sleep(1e-4)
        numbers.add_(1)

    assert median_ms(launch) < 0.05
