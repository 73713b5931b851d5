"""`quantize` and its companions: what they read off a pipeline, what they report, and that bits stay as they were."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stock_models import STOCK_MODELS, StockModel
from stock_pipelines import STOCK_PIPELINES

from qarvd_diffusers import (
    ARVDPipeline,
    PassInfo,
    QARVDConfig,
    bundled_model_path,
    choose_bits,
    measure_rollouts,
    quantize,
    quantized_linears,
)
from qarvd_diffusers.calibration.scout import scout
from qarvd_diffusers.calibration.targets import select
from qarvd_diffusers.calibration.watch import Watch, by_timestep

PROMPTS = ("a red circle moves to the left", "a blue square moves up")
TIMESTEPS = (1000.0, 500.0)


def stock(name: str) -> StockModel:
    return next(model for model in STOCK_MODELS if model.name == name)


def rollouts(kind: StockModel, model, videos: int = 2, chunks: int = 2):
    def rollout(video: int):
        return [kind.run(model, t, video * chunks + chunk) for chunk in range(chunks) for t in TIMESTEPS]

    return [lambda video=video: rollout(video) for video in range(videos)]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_the_bundled_model_gets_the_same_bytes_through_its_pipeline_and_through_its_calls(scheme, tmp_path):
    config = QARVDConfig(scheme, calibration_prompts=PROMPTS, calibration_chunks=2)
    pipes = [ARVDPipeline.from_pretrained(bundled_model_path()) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)

    def rollout(index: int) -> None:
        generator = torch.Generator().manual_seed(config.calibration_seed + index)
        for _ in pipes[1].stream(PROMPTS[index], num_chunks=2, generator=generator, output_type="latent"):
            pass

    pipes[0].quantize(config)
    report = quantize(pipes[1].transformer, [lambda i=i: rollout(i) for i in range(len(PROMPTS))], config)
    assert report.share_of_blocks > 0.98 and report.chunk_weights["why"].startswith("published")
    assert str(report) == str(pipes[0].transformer.hf_quantizer.report)
    for pipe, name in zip(pipes, "ab", strict=True):
        pipe.transformer.save_pretrained(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("timesteps", "places"),
    [
        ([1000, 500, 0, 1000, 500, 0], "0d0 0d1 0r0 1d0 1d1 1r0"),
        ([999, 999, 500, 500, 999, 999], "0d0 0d0 0d1 0d1 1d0 1d0"),  # guidance, and no cache pass
        ([0, 1000, 500], "-1c0 0d0 0d1"),  # a sink
        ([0.9, 0.4, 0.9], "0d0 0d1 1d0"),
    ],
)
def test_reads_chunk_and_step_off_the_timestep(timesteps, places):
    seen, last = [], None
    for timestep in timesteps:
        last = by_timestep(last, {"hidden_states": None, "timestep": torch.tensor([0.0, timestep])})
        seen.append(f"{last.chunk}{last.role[0]}{last.step}")
    assert " ".join(seen) == places


def test_the_timestep_may_have_another_name():
    assert by_timestep(None, {"vision_timesteps": torch.full((3,), 7.0), "mask": None}).timestep == 7


def test_reports_layers_ties_and_what_stayed_float(tmp_path, caplog):
    """Linears that read the time embedding get 8 bits, and scales at run time."""
    kind = stock("HunyuanVideoFramepackTransformer3DModel")
    model = kind.build()
    with caplog.at_level(logging.INFO, logger="qarvd_diffusers"):
        report = quantize(model, rollouts(kind, model), QARVDConfig("w4a8"))
    assert report.share_of_blocks >= 0.99
    assert [record.getMessage() for record in caplog.records if "quantized to" in record.getMessage()] == [str(report)]
    assert "\n" not in str(report)
    modulation = {
        name: layer for name, layer in report.layers.items() if name.endswith(("norm1.linear", "norm.linear"))
    }
    assert modulation and {(layer.weight_bits, layer.activation) for layer in modulation.values()} == {(8, "token")}
    others = [layer for name, layer in report.layers.items() if "norm" not in name]
    assert {(layer.weight_bits, layer.activation) for layer in others} == {(4, "static"), (4, "token")}
    assert ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v") in (
        report.ties
    )
    assert report.kept["proj_out"] == "outside the repeated blocks"
    assert report.kept["x_embedder.proj"] == "not a Linear"
    assert model.config["quantization_config"].module_bits is None
    stored = json.loads(report.save(tmp_path).read_text())
    assert (tmp_path / "report.json").is_file() and stored["layers"].keys() == report.layers.keys()
    assert report.bytes["after"] == sum(p.nbytes for p in model.parameters())


def test_all_layers_that_never_run_are_listed_at_once():
    kind = stock("SanaWMLTX2RefinerTransformer3DModel")
    model = kind.build()
    report = quantize(model, rollouts(kind, model), QARVDConfig("w8a8"))
    unused = [name for name, reason in report.kept.items() if reason == "never called in the first rollout"]
    assert len(unused) > 10 and all("audio" in name for name in unused)
    assert ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v") in report.ties


def test_names_overrule_the_structure_both_ways():
    kind = stock("SkyReelsV2Transformer3DModel")
    model = kind.build()
    config = QARVDConfig("w8a8", modules_to_convert=("proj_out",), modules_to_not_convert=("blocks.0.ffn",))
    report = quantize(model, rollouts(kind, model), config)
    assert "proj_out" in report.layers and "blocks.1.ffn.net.2" in report.layers
    assert report.kept["blocks.0.ffn.net.2"] == "named by modules_to_not_convert"
    with pytest.raises(ValueError, match=r"modules_to_convert names \['head'\]"):
        quantize(model := kind.build(), rollouts(kind, model), QARVDConfig(modules_to_convert=("head",)))


def test_sensitivity_and_bits_of_any_pipeline():
    kind = stock("SkyReelsV2Transformer3DModel")
    model = kind.build()
    before = kind.run(model)
    some, config = rollouts(kind, model, videos=1), QARVDConfig("w4a8", rounding="nearest")
    result = measure_rollouts(model, some, config)
    assert len(result.chunk_weights) == 2 and all(0.2 < weight < 1.8 for weight in result.chunk_weights)
    chosen = choose_bits(model, some, config, budget=0.2)
    assert torch.equal(kind.run(model), before) and not quantized_linears(model)
    report = quantize(model, some, chosen.replace(chunk_weights=result.chunk_weights))
    assert {layer.weight_bits for layer in report.layers.values()} == {4, 8}
    assert report.chunk_weights == {"weights": pytest.approx(result.chunk_weights), "why": "measured: as configured"}


def test_rollouts_that_differ_from_call_to_call_cannot_be_measured():
    kind = stock("SkyReelsV2Transformer3DModel")
    model = kind.build()
    seeds = iter(range(100))
    with pytest.raises(ValueError, match="rollout 0 generated something else"):
        measure_rollouts(model, [lambda: kind.run(model, seed=next(seeds))])
    with pytest.raises(ValueError, match="rollout 0 returns no tensor"):
        measure_rollouts(model, [lambda: [kind.run(model), None][1]])


def test_a_pass_may_be_placed_by_the_user():
    kind = stock("SkyReelsV2Transformer3DModel")
    model = kind.build()

    def frames(last, arguments):
        return PassInfo(2, timestep=float(arguments["timestep"].max()), chunks=(0, 1, 2))

    report = quantize(model, rollouts(kind, model), QARVDConfig("w8a8", chunk_weights=(4.0, 2.0, 1.0)), frames)
    assert len(report.chunk_weights["weights"]) == 3


def test_without_data_a_model_keeps_its_bits_and_reports(tmp_path, caplog):
    kind = stock("SkyReelsV2Transformer3DModel")
    kind.build().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="qarvd_diffusers"):
        model = kind.cls.from_pretrained(tmp_path, quantization_config=QARVDConfig("w4a8"))
    assert model.config["quantization_config"].scheme == "w4a8_dynamic"
    assert {layer.weight_bits for layer in quantized_linears(model).values()} == {4}
    assert "w4a8_dynamic" in caplog.text and str(model.hf_quantizer.report) in caplog.text


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_any_pipeline import QARVDConfig, quantize, rollouts, stock
from qarvd_diffusers.calibration.processes import Processes
torch.set_num_threads(1)
kind = stock("SkyReelsV2Transformer3DModel")
model = kind.build()
quantize(model, rollouts(kind, model, videos=3), QARVDConfig("w4a8"))
processes = Processes.launched()
model.save_pretrained(sys.argv[2] + f"/{processes.count}-{processes.index}")
processes.close()
"""


@pytest.mark.slow
def test_processes_of_a_launch_give_the_bytes_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    arguments = [str(tmp_path / "worker.py"), str(here), str(tmp_path)]
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        subprocess.run([sys.executable, *launcher, *arguments], check=True, env={**os.environ, "PYTHONPATH": path})
    files = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("1-0", "2-0", "2-1")]
    assert len({file.read_bytes() for file in files}) == 1


def test_what_reads_the_prompt_alone_is_seen():
    pipeline = next(one for one in STOCK_PIPELINES if one.name == "WanPipeline")
    pipe = pipeline.build()
    watch = Watch(pipe.transformer, pipeline.rollouts(pipe))
    targets, _ = scout(pipe.transformer, QARVDConfig("w8a8"), lambda on_pass: watch.run(on_pass, watch.rollouts[:1]))
    assert targets.prompt == select(pipe.transformer, QARVDConfig("w8a8")).prompt
    assert targets.words == select(pipe.transformer, QARVDConfig("w8a8")).words
