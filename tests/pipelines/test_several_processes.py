"""Whole streams in two processes (gloo on the CPU): one stream together, or prompts shared out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.cli import main

CONFIG = QARVDConfig("w8a8", outlier_alignment=8, calibration_prompts=("a green triangle",), calibration_chunks=1)

WORKER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/pipelines"]
import test_several_processes as tests
from qarvd_diffusers import ARVDPipeline
dist.init_process_group("gloo")
rank, out = dist.get_rank(), Path(sys.argv[2])
latents = {}
for name in ("quantized", "float"):
    pipe = ARVDPipeline.from_pretrained(out / name, dtype=torch.float32, local_attention_frames=9, sink_frames=3)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    latents[name] = tests.switching_stream(pipe, out / f"state.{rank}")
torch.save(latents, out / f"latents.{rank}.pt")
errors = []
for attempt in (
    lambda: pipe("a red circle", num_chunks=1, generator=torch.Generator().manual_seed(rank), output_type="latent"),
    lambda: pipe.restore_stream(out / f"state.{1 - rank}"),
    lambda: ARVDPipeline(transformer=pipe.transformer).calibrate(tests.CONFIG),
):
    try:
        attempt()
    except ValueError as error:
        errors.append(str(error))
(out / f"errors.{rank}.json").write_text(json.dumps(errors))
dist.destroy_process_group()
"""


@torch.no_grad()
def switching_stream(pipe, state=None):
    """Latents of five chunks with a re-caching switch of the prompt; saved and restored on the way if asked."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    stream = pipe.stream("a red circle", num_chunks=5, generator=generator, output_type="latent")
    latents = [next(stream).latents for _ in range(2)]
    stream.set_prompt("a blue square moves left", on_prompt_switch="recache")
    latents.append(next(stream).latents)
    if state is not None:
        stream.save_state(state)
        stream.close()
        stream = pipe.restore_stream(state)
    return torch.cat([*latents, *(chunk.latents for chunk in stream)], dim=2)


def launch(launcher, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


@pytest.fixture
def models(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    tiny_pipeline.save_pretrained(tmp_path / "float")
    tiny_pipeline.quantize(CONFIG)
    tiny_pipeline.save_pretrained(tmp_path / "quantized")
    return tmp_path


@pytest.mark.slow
def test_one_stream_in_two_processes(models):
    """Windows, sink, re-caching, saving and restoring included; every process holds the latents."""
    (models / "worker.py").write_text(WORKER)
    done = launch(TORCHRUN, models / "worker.py", Path(__file__).parent.parent, models)
    assert done.returncode == 0, done.stderr
    for name in ("float", "quantized"):
        pipe = ARVDPipeline.from_pretrained(
            models / name, dtype=torch.float32, local_attention_frames=9, sink_frames=3
        )
        alone = switching_stream(pipe)
        for rank in range(2):
            got = torch.load(models / f"latents.{rank}.pt", weights_only=True)[name]
            torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)
    for rank in range(2):
        seeds, part, calibration = json.loads((models / f"errors.{rank}.json").read_text())
        assert "differ in their latents" in seeds and "same seed" in seeds
        assert "process differ" in part
        assert "calibrate before" in calibration


@pytest.mark.slow
def test_generate_in_two_processes(models, capsys):
    (models / "prompts.txt").write_text("a red circle\na blue square moves left\na green circle stays\n")
    command = ["generate", str(models / "quantized"), "--chunks", "1", "--device", "cpu", "--json"]
    several = [*command, "--prompts", str(models / "prompts.txt"), "--out"]
    assert main([*several, str(models / "alone")]) == 0
    alone = json.loads(capsys.readouterr().out)["videos"]
    assert [Path(video["out"]).name for video in alone] == ["000.mp4", "001.mp4", "002.mp4"]

    done = launch(ACCELERATE, "-m", "qarvd_diffusers", *several, models / "shared")
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout[done.stdout.index("{") :])["videos"]
    assert [video["prompt"] for video in shared] == [video["prompt"] for video in alone]

    one = [*command, "--prompt", "a red circle", "--out"]
    done = launch(TORCHRUN, "-m", "qarvd_diffusers", *one, models / "together.mp4", "--context-parallel")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["frames"] == 9
    pairs = [(models / "alone" / f"00{i}.mp4", models / "shared" / f"00{i}.mp4") for i in range(3)]
    for mine, theirs in [*pairs, (models / "alone" / "000.mp4", models / "together.mp4")]:
        difference = np.abs(np.float32(imageio.mimread(mine)) - np.float32(imageio.mimread(theirs)))
        assert difference.max() <= 2, "a pixel may round the other way"

    done = launch(TORCHRUN, "-m", "qarvd_diffusers", *one, models / "x.mp4")
    assert done.returncode != 0 and "2 processes for one video" in done.stderr


def test_context_parallel_needs_processes(models, capsys):
    command = [
        "generate",
        str(models / "float"),
        "--prompt",
        "a",
        "--out",
        str(models / "x.mp4"),
        "--context-parallel",
    ]
    assert main(command) == 1
    assert "torchrun" in capsys.readouterr().err
